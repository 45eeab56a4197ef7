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

MOST, _WIDEST = 1024, 512  # rows; columns of dx
_BOX = (ROW, ROW)


class Plan(NamedTuple):
    """A launch but for its arrays."""

    launch: Kernel
    cluster: int
    back: int  # blocks of tiles of dx, the first of the grid
    grid: tuple[int]
    numbers: tuple[int, int, int]  # rows, inner, outer
    copied: int  # bytes that the busiest multiprocessor copies
    ways: tuple  # what `plan.choose` takes

    def maps(self, x, w, g) -> list:
        """Of x (rows, inner), w (inner, outer) and g (rows, outer)."""
        rows, inner, outer = self.numbers
        shapes = (rows, inner), (inner, outer), (rows, outer)
        return [
            matrix_map(a.data.ptr, shape, _BOX) for a, shape in zip((x, w, g), shapes, strict=True)
        ]


def few_gradients(g, x, w, window: Window, scale) -> tuple[Array, Array] | None:
    """(dx as x, dw (1, inner, outer) f32); None where a launch each is better, or all there is.

    g: (..., blocks * outer). x: (..., blocks * inner). w: (1, inner, outer), shared by the blocks.
    """
    import cupy

    if not takes(g, x, w):
        return None
    planned = plan_few(prod(g.shape[:-1]), tuple(w.shape), window, processors())
    # A dx wider than g is left to wait for others: see `Deferred`.
    if planned is None or w.shape[1] > w.shape[2] or plan.choose(*planned.ways) != "few":
        return None
    dx, dw = cupy.empty(x.shape, bf16), cupy.empty(w.shape, f32)
    args = (*planned.maps(x, w, g), scale, dx, dw, *planned.numbers)
    planned.launch(planned.grid, (THREADS,), *args, shared=SHARED)
    return dx, dw


@functools.lru_cache(maxsize=4096)
def plan_few(positions: int, w: tuple[int, int, int], window: Window, count: int) -> Plan | None:
    """The plan for shapes; None where the kernel does not take them. count: multiprocessors."""
    _, inner, outer = w
    if not window.pointwise or (window.groups > 1 and not window.shared):
        return None
    rows = positions * window.groups
    if rows > MOST or inner > _WIDEST or inner % 8:
        return None
    (tiles_r, tiles_i, tiles_o) = (-(-n // ROW) for n in (rows, inner, outer))
    cluster = _cluster_of(tiles_r * tiles_i, tiles_o, count)
    back = tiles_r * tiles_i * cluster
    grid = back + -(-tiles_i * tiles_o // cluster) * cluster
    steps = max(-(-tiles_o // cluster), tiles_r) * -(-grid // (2 * count))
    copied = steps * 2 * ROW * ROW * bf16.itemsize
    operations = 4 * rows * inner * outer
    moved = (rows * (2 * inner + outer) + inner * outer) * 2 + inner * outer * 4
    each = max(plan.library(operations // 2), plan.moving(moved // 2))
    seconds = {"few": plan.skinny(moved, copied), "library": 2 * each}
    what = f"both gradients of x ({rows}, {inner}) * w {w}"
    launch = kernel("few.cu", "few", bf16, CLUSTER=cluster)
    ways = what, seconds, operations, moved
    return Plan(launch, cluster, back, (grid,), (rows, inner, outer), copied, ways)


def _cluster_of(tiles: int, steps: int, count: int) -> int:
    """Blocks that share the steps of a tile of dx: several where there are few tiles of many."""
    return 8 if steps >= 16 and tiles * 8 <= count else 1
