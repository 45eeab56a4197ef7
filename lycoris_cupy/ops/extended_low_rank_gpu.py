"""The launches of cuda_src/extended_low_rank.cu on Hopper: y = x @ w + scale * (x @ down) @ up +
bias from one read of x, one rounding, and its input gradient from one read of y's.

For arrays that `extended_gpu.takes` allows, and shapes that there is a plan for.
"""

from __future__ import annotations

import functools
from math import prod
from typing import NamedTuple

from .. import plan
from ..arrays import Array, bf16
from ..kernels import Kernel, kernel
from ..tensor_map import ROW, matrix_map
from . import cooperative
from .conv_gpu import processors
from .conv_plan import ceil
from .counters import COUNTERS, counters
from .extended_gpu import OUT_BOX, SHARED, takes
from .extended_tile import Tile
from .window import Window

RANKS = 16  # as in extended_tile.cuh
_TILES = [Tile(192, n, n, 0.0, alone=True) for n in (192, 160)]
_THREADS = 512
_MAKERS = (3, 1)  # tiles of a row of tiles that make its h
_WAIT = 4000  # cycles until the first round has h: made, told and copied. Estimated


class Plan(NamedTuple):
    """A launch but for its arrays. numbers: positions, columns, inner, ranks, band."""

    launch: Kernel
    grid: tuple[int]
    numbers: tuple[int, int, int, int, int]
    tile: Tile
    seconds: float


@functools.lru_cache(maxsize=4096)
def plan_low_rank(
    positions: int, inner: int, ranks: int, columns: int, count: int, b_rows: int = 1
) -> Plan | None:
    """The plan for shapes; None for more than 16 ranks, rows that are no multiple of 16 bytes,
    more rows than one round of tiles has. count: multiprocessors. b_rows: 0 for an input gradient,
    whose columns are the inputs.
    """
    if not 0 < ranks <= RANKS or ranks % 8 or inner % 8 or columns % 8 or not positions:
        return None
    plans = [_planned(tile, positions, inner, ranks, columns, count, b_rows) for tile in _TILES]
    return min((p for p in plans if p), key=lambda p: p.seconds, default=None)


def _planned(tile: Tile, positions, inner, ranks, columns, count, b_rows) -> Plan | None:
    height, width = ceil(positions, tile.rows), ceil(columns, tile.columns)
    # The tiles that make h are the first of their blocks: else whole rounds would wait for a few.
    makers = next((n for n in _MAKERS if n <= width and n * height <= count), None)
    if makers is None or 2 * height * tile.rows // ROW > COUNTERS:
        return None
    tile = tile.timed(b_rows, positions, columns, ceil(inner, ROW), 1, count)
    moved = bf16.itemsize * (positions * (inner + columns) + inner * columns)
    defines = {"TILE_M": tile.rows, "TILE_N": tile.columns, "B_ROWS": b_rows, "MAKERS": makers}
    return Plan(
        kernel("extended_low_rank.cu", "extended_low_rank", bf16, **defines),
        tile.grid(positions, columns, count),
        (positions, columns, inner, ranks, tile.band(count)),
        tile,
        plan.extended(tile.cycles + _WAIT, moved),
    )


def low_rank_plan(
    x, w, window: Window, down, inner: Window, up, other: Window, add, bias, bias2
) -> Plan | None:
    """`plan_low_rank` of these arrays, where the kernel takes them: linear, nothing to add.
    inner, other: the windows of down and of up."""
    if add is not None or bias2 is not None:
        return None
    if not _linear(window, inner, other) or not takes(x, w, down, up, bias):
        return None
    (_, inputs, outputs), ranks = w.shape, down.shape[2]
    return plan_low_rank(prod(x.shape[:-1]), inputs, ranks, outputs, processors())


def low_rank_dx_plan(g, w, window: Window, down, inner: Window, up, other: Window) -> Plan | None:
    """The same of the input gradient, by that of the result."""
    if not _linear(window, inner, other) or not takes(g, w, down, up):
        return None
    (_, inputs, outputs), ranks = w.shape, down.shape[2]
    return plan_low_rank(prod(g.shape[:-1]), outputs, ranks, inputs, processors(), 0)


def _linear(*windows: Window) -> bool:
    return not cooperative.refused() and all(v.pointwise and v.groups == 1 for v in windows)


def low_rank(x, w, down, up, planned: Plan, *, scale, bias) -> tuple[Array, Array] | None:
    """(y, h = x @ down).  x: (..., IN). w: (1, IN, OUT). down: (1, IN, R). up: (1, R, OUT).

    planned: a `low_rank_plan`. None where the driver has no room for the launch.
    """
    return _run(x, w, down, up, planned, scale, bias, 1)


def low_rank_dx(g, w, down, up, planned: Plan, *, scale) -> tuple[Array, Array] | None:
    """(dx = g @ w^T + dh @ down^T, dh = scale * g @ up^T, rounded), by the gradient g of y, as
    above. planned: a `low_rank_dx_plan`.
    """
    return _run(g, w, up, down, planned, scale, None, 0)


def _run(x, w, first, second, planned: Plan, scale, bias, b_rows: int):
    """(y, h) forward; (y, scale * h) of what is turned."""
    import cupy

    (positions, columns, inner, ranks, _), of = planned.numbers, planned.tile
    y = cupy.empty((*x.shape[:-1], columns), bf16)
    scaled = cupy.empty((*x.shape[:-1], ranks), bf16)
    h = cupy.empty(scaled.shape, bf16) if b_rows else None
    boxes = (ROW, ROW), (ROW, RANKS), (RANKS, ROW)
    if not b_rows:
        boxes = (of.columns, ROW), (RANKS, ROW), (of.columns, RANKS)
    maps = (
        matrix_map(x.data.ptr, (positions, inner), (of.rows, ROW)),
        matrix_map(w.data.ptr, tuple(w.shape), (1, *boxes[0])),
        matrix_map(first.data.ptr, tuple(first.shape[1:]), boxes[1]),
        matrix_map(scaled.data.ptr, (positions, ranks), (ROW, RANKS)),
        matrix_map(second.data.ptr, tuple(second.shape[1:]), boxes[2]),
        matrix_map(y.data.ptr, (positions, columns), OUT_BOX),
    )
    args = (*maps, scale, bias, h, scaled, counters(), *planned.numbers)
    if not cooperative.launched(planned.launch, planned.grid, (_THREADS,), *args, shared=SHARED):
        return None
    return y, scaled if h is None else h
