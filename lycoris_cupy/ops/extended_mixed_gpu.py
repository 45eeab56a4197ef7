"""The launch of cuda_src/extended_mixed.cu on Hopper: y = x @ w + scale * mix(x, w1) * w2 + bias, a
linear layer and a LoKr with a full w2, mixed while the first tiles are multiplied; one rounding.

For arrays that `extended_gpu.takes` allows, and shapes that there is a plan for.
"""

from __future__ import annotations

import functools
from math import prod
from typing import NamedTuple

import numpy as np

from .. import plan
from ..arrays import bf16
from ..kernels import Kernel, kernel
from ..tensor_map import ROW, matrix_map
from . import cooperative
from .conv_gpu import processors
from .conv_plan import ceil, geometry_of
from .counters import COUNTERS, counters
from .extended_gpu import OUT_BOX, SHARED, takes
from .extended_plan import term
from .extended_tile import Tile
from .window import Window

_SIDE, _MOST_ROWS = 8, 16  # columns and rows of w1, as in extended_mixed.cu
_TILE = Tile(192, 192, 192, 0.0)
_THREADS = 512
# Cycles that four channels of a position take one of the mixing threads, and each row of w1 more of
# them: 48 us for 35 times four channels and 8 rows as measured beside the products.
_QUAD, _ROW = 300, 220
_MIXERS = 96


class Plan(NamedTuple):
    """A launch but for its arrays. numbers: positions, columns, rows, blocks, width, band."""

    launch: Kernel
    grid: tuple[int]
    own: np.ndarray
    other: np.ndarray
    numbers: tuple[int, int, int, int, int, int]
    seconds: float


@functools.lru_cache(maxsize=4096)
def plan_mixed(
    positions: int, columns: int, rows: int, blocks: int, width: int, count: int
) -> Plan | None:
    """The plan for shapes; None for tiles that do not fit the blocks of w2, too large a w1, rows
    that are no multiple of 16 bytes.  rows, blocks: of w1. width: of a block of x. count:
    multiprocessors.
    """
    if not 1 < blocks <= _SIDE or not rows <= _MOST_ROWS or width % 8 or not positions:
        return None
    if columns % (rows * _TILE.columns) or positions * max(rows, blocks) * width >= 2**31:
        return None
    if 2 * ceil(positions, _TILE.rows) > COUNTERS:
        return None
    steps = ceil(blocks * width, ROW), ceil(width, ROW)
    tile = _TILE.timed(True, positions, columns, *steps, count)
    grid = tile.grid(positions, columns, count)
    # Blocks mix band after band of rows; tiles of the first wait for it, if it takes longer.
    band = tile.band(count)

    def mixing(positions):
        return ceil(positions * width // 4, grid[0] * _MIXERS) * (_QUAD + rows * _ROW)

    first = tile.cycles / ceil(tile.clusters(positions, columns), count)
    late = mixing(min(positions, band * _TILE.rows)) - first, mixing(positions) - tile.cycles
    moved = positions * (blocks * width + columns) + blocks * width * columns
    seconds = plan.extended(tile.cycles + max(0.0, *late), moved * bf16.itemsize)
    defines = {"TILE_M": 192, "TILE_N": 192, "B_ROWS": 1}
    return Plan(
        kernel("extended_mixed.cu", "extended_mixed", bf16, **defines), grid,
        term(1, blocks * width, None), term(1, width, None, columns // rows),
        (positions, columns, rows, blocks, width, band), seconds,
    )  # fmt: skip


def mixed_plan(x, w, window: Window, w1, w2, other: Window, add, bias, bias2) -> Plan | None:
    """`plan_mixed` of these arrays, where the kernel takes them: linear, nothing to add. other: the
    window of w2, which its groups share."""
    if add is not None or bias2 is not None or cooperative.refused():
        return None
    if not window.pointwise or window.groups != 1 or not other.pointwise or not other.shared:
        return None
    (rows, blocks), columns, width = w1.shape, w.shape[2], w2.shape[1]
    if (other.groups, w.shape[1], rows * w2.shape[2]) != (rows, blocks * width, columns):
        return None
    if w1.dtype != bf16 or not w1.flags.c_contiguous or not takes(x, w, w2, bias):
        return None
    return plan_mixed(prod(x.shape[:-1]), columns, rows, blocks, width, processors())


def mixed(x, w, w1, w2, planned: Plan, *, scale, bias, keep: bool, out) -> tuple | None:
    """(y, x2 = mix_blocks(x, w1) if keep).  x: (..., M * N). w: (1, M * N, L * K). w1: (L, M). w2:
    (1, N, K). out: where y goes, or None. None where the driver has no room for the launch.
    """
    import cupy

    positions, columns, rows, blocks, width, _ = planned.numbers
    y = cupy.empty((*x.shape[:-1], columns), bf16) if out is None else out
    scaled = cupy.empty((*x.shape[:-1], rows * width), bf16)
    x2 = cupy.empty(scaled.shape, bf16) if keep else None
    maps = (
        matrix_map(x.data.ptr, (positions, blocks * width), (_TILE.rows, ROW)),
        matrix_map(w.data.ptr, tuple(w.shape), (1, ROW, ROW)),
        matrix_map(scaled.data.ptr, (positions, rows * width), (_TILE.rows, ROW)),
        matrix_map(w2.data.ptr, tuple(w2.shape), (1, ROW, ROW)),
        matrix_map(y.data.ptr, (positions, columns), OUT_BOX),
    )
    args = (*maps, x, w1, scale, bias, x2, scaled, counters(), geometry_of(Window(), (), ()))
    args += (planned.own, planned.other, *planned.numbers)
    if not cooperative.launched(planned.launch, planned.grid, (_THREADS,), *args, shared=SHARED):
        return None
    return y, x2
