"""Both gradients of a product of a few rows from one launch on Hopper.

    y = x * w          dx = scale * g @ w^T,  dw = scale * x^T @ g

A launch takes longer than either of them. See cuda_src/few.cu; `thin_gpu` is for many rows.
"""

from __future__ import annotations

import functools
from math import prod
from typing import NamedTuple

from .. import plan
from ..arrays import Array, bf16, f32
from ..kernels import Kernel, kernel
from ..tensor_map import ROW, matrix_map
from .conv_gpu import processors
from .extended_gpu import takes
from .skinny_gpu import SHARED, THREADS
from .window import Window

_MOST, _WIDEST = 1024, 512  # rows; columns of dx
_BOX = (ROW, ROW)


class _Plan(NamedTuple):
    launch: Kernel
    grid: tuple[int]
    numbers: tuple[int, int, int]  # rows, inner, outer
    ways: tuple  # what `plan.choose` takes


def few_gradients(g, x, w, window: Window, scale) -> tuple[Array, Array] | None:
    """(dx as x, dw (1, inner, outer) f32); None where a launch each is better, or all there is.

    g: (..., blocks * outer). x: (..., blocks * inner). w: (1, inner, outer), shared by the blocks.
    """
    import cupy

    if not takes(g, x, w):
        return None
    planned = _plan(prod(g.shape[:-1]), tuple(w.shape), window, processors())
    if planned is None or plan.choose(*planned.ways) != "few":
        return None
    rows, inner, outer = planned.numbers
    maps = (
        matrix_map(a.data.ptr, shape, _BOX)
        for a, shape in ((x, (rows, inner)), (w, (inner, outer)), (g, (rows, outer)))
    )
    dx, dw = cupy.empty(x.shape, bf16), cupy.empty(w.shape, f32)
    args = (*maps, scale, dx, dw, *planned.numbers)
    planned.launch(planned.grid, (THREADS,), *args, shared=SHARED)
    return dx, dw


@functools.lru_cache(maxsize=4096)
def _plan(positions: int, w: tuple[int, int, int], window: Window, count: int) -> _Plan | None:
    """count: multiprocessors. A dx wider than g is left to wait for others: see `Deferred`."""
    _, inner, outer = w
    if not window.pointwise or (window.groups > 1 and not window.shared):
        return None
    rows = positions * window.groups
    if rows > _MOST or inner > _WIDEST or inner > outer or inner % 8:
        return None
    (tiles_r, tiles_i, tiles_o) = (-(-n // ROW) for n in (rows, inner, outer))
    back = tiles_r * tiles_i
    cluster = _cluster_of(back, tiles_o, count)
    grid = (back + -(-tiles_i * tiles_o // cluster)) * cluster
    steps = max(-(-tiles_o // cluster), tiles_r) * -(-grid // (2 * count))
    operations = 4 * rows * inner * outer
    moved = (rows * (2 * inner + outer) + inner * outer) * 2 + inner * outer * 4
    each = max(plan.library(operations // 2), plan.moving(moved // 2))
    seconds = {"few": plan.skinny(moved, steps * 2 * ROW * ROW * 2), "library": 2 * each}
    what = f"both gradients of x ({rows}, {inner}) * w {w}"
    launch = kernel("few.cu", "few", bf16, CLUSTER=cluster)
    return _Plan(launch, (grid,), (rows, inner, outer), (what, seconds, operations, moved))


def _cluster_of(tiles: int, steps: int, count: int) -> int:
    """Blocks that share the steps of a tile of dx: several where there are few tiles of many."""
    return 8 if steps >= 16 and tiles * 8 <= count else 1
