"""Both gradients of a product of a few rows, and those of the mix that made its x, from one launch
on Hopper.

    x2[..., l * N + n] = sum over m of w1[l, m] * x[..., m * N + n],    y = scale * (x2 * w2)

Where that x is a narrow product itself, of blocks of a source, also the gradient of its factor:

    x[..., m * N + n] = sum over c of source[..., m * C + c] * down[c, n]

See cuda_src/few_mixed.cu; `few_gpu` and `kron.mix_gradients` are the two launches that it spares.
"""

from __future__ import annotations

import functools
from math import prod
from typing import NamedTuple

from .. import plan
from ..arrays import Array, bf16, f32
from ..kernels import Kernel, kernel
from ..tensor_map import NOTHING, ROW, matrix_map
from .conv_gpu import processors
from .counters import counters
from .extended_gpu import takes
from .few_gpu import MOST, Plan, plan_few
from .skinny_gpu import RANKS, SHARED, THREADS
from .window import Window

_SIDES = (8, 16)  # rows and columns of w1 that the variants do


class _Mixed(NamedTuple):
    launch: Kernel
    side: int
    few: Plan  # of the product alone
    grid: tuple[int]
    ways: tuple  # what `plan.choose` takes


def few_mixed_gradients(
    g, x2, w2, x, w1, window: Window, scale, source=None
) -> tuple[Array, ...] | None:
    """(dx as x, dw1 (L, M) f32, dw2 (1, N, K) f32) from the gradient of y; None where launches
    apart are better, or all there is. With a source a fourth, ddown (1, C, N) f32, or None for it
    where that takes a launch of its own.

    flow[..., l * N + n] = scale * sum over k of g[..., l * K + k] * w2[n, k], rounded to bf16
    dx[..., m * N + n] = sum over l of w1[l, m] * flow[..., l * N + n]
    dw1[l, m] = sum over positions and n of flow[..., l * N + n] * x[..., m * N + n]
    dw2[n, k] = scale * sum over positions and l of x2[..., l * N + n] * g[..., l * K + k]
    ddown[c, n] = sum over positions and m of source[..., m * C + c] * dx[..., m * N + n]

    g: (..., L * K). x2: (..., L * N). w2: (1, N, K), shared by the L groups of the window. x: (...,
    M * N). w1: (L, M). source: (..., M * C). scale: (1,) f32, or None for 1. All others bf16.
    """
    import cupy

    if not takes(g, x2, w2, x) or w1.dtype != bf16 or not w1.flags.c_contiguous:
        return None
    shapes, positions = (tuple(w2.shape), tuple(w1.shape)), prod(g.shape[:-1])
    channels = 0 if source is None else _channels(source, positions, *shapes)
    planned = plan_few_mixed(positions, *shapes, window, processors(), channels)
    if planned is None or plan.choose(*planned.ways) != "few, mixed":
        return None
    few, side = planned.few, planned.side
    dx, dw1, dw2 = cupy.empty(x.shape, bf16), cupy.empty(w1.shape, f32), cupy.empty(w2.shape, f32)
    partial = cupy.empty((few.back, side, side), f32)
    ddown, more = None, [NOTHING, NOTHING]
    if channels:
        rows, n = positions * w1.shape[1], w2.shape[1]
        ddown = cupy.empty((1, channels, n), f32)
        more = [
            matrix_map(source.data.ptr, (rows, channels), (ROW, ROW)),
            matrix_map(dx.data.ptr, (rows, n), (ROW, RANKS)),
        ]
    planned.launch(
        planned.grid, (THREADS,), *few.maps(x2, w2, g), *more, scale, x, w1, dx, dw2, partial, dw1,
        ddown, counters(), *few.numbers, few.back, *w1.shape, *few.grid, channels, shared=SHARED,
    )  # fmt: skip
    return (dx, dw1, dw2) if source is None else (dx, dw1, dw2, ddown)


def _channels(source, positions: int, w2: tuple[int, int, int], w1: tuple[int, int]) -> int:
    """C of a source whose ddown the kernel makes; 0 of another."""
    channels, rows = source.shape[-1] // w1[1], positions * w1[1]
    fits = w2[1] <= RANKS and rows <= MOST and channels % 8 == 0
    return channels if fits and takes(source) else 0


@functools.lru_cache(maxsize=4096)
def plan_few_mixed(
    positions: int,
    w2: tuple[int, int, int],
    w1: tuple[int, int],
    window: Window,
    count: int,
    channels: int = 0,
) -> _Mixed | None:
    """The plan for shapes; None for tiles that would split the blocks of a position, too large a
    w1, what `plan_few` does not take. count: multiprocessors. channels: of a block of the source,
    if ddown is made too.
    """
    few, (rows, columns) = plan_few(positions, w2, window, count), w1
    if few is None or rows != window.groups or ROW % rows or not 1 <= max(w1) <= _SIDES[-1]:
        return None
    side = next(s for s in _SIDES if max(w1) <= s)
    what, apart, operations, moved = few.ways
    # A mix apart reads flow, which is written for it; both read x and write dx. So does ddown dx.
    flow, outside = (positions * n * w2[1] * bf16.itemsize for n in (rows, 2 * columns))
    mix, own, read = plan.moving(flow + outside), 2 * positions * columns * channels * w2[1], 0
    if channels:
        read = positions * columns * channels * bf16.itemsize + channels * w2[1] * f32.itemsize
        mix += max(plan.library(own), plan.moving(read + outside // 2))
    moved, operations = moved + outside + read, operations + own
    seconds = {"few, mixed": plan.skinny(moved - flow, few.copied)}
    seconds |= {way: of + mix for way, of in apart.items()}
    operations += 4 * positions * rows * columns * w2[1]
    ways = f"{what}, mixed by w1 {w1}", seconds, operations, moved
    grid = few.grid[0] + -(-channels // (ROW * few.cluster)) * few.cluster
    launch = kernel("few_mixed.cu", "few_mixed", bf16, CLUSTER=few.cluster, SIDE=side)
    return _Mixed(launch, side, few, (grid,), ways)
