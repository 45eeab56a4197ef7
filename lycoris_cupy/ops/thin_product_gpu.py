"""Products of a wide x with a few columns on Hopper, from one read of x: cuda_src/thin_product.cu.

    y = scale * x @ w          the prologue of an adapter: x @ down
    dw = scale * x^T @ g       the gradient of that w

A result so narrow costs what reading x costs: the launch keeps as many bytes under way as it can.
"""

from __future__ import annotations

import functools
from math import prod
from typing import NamedTuple

from .. import plan
from ..arrays import Array, bf16, f32, wide_dtype
from ..kernels import Kernel, kernel
from ..tensor_map import ROW, matrix_map
from .conv_gpu import processors
from .window import Window

# As in thin_product.cu.
_ROWS, _STEPS, _STAGES, _THREADS = 128, 64, 4, 160
_WIDTHS = {16: 3, 32: 2, 64: 2}  # columns that are computed: blocks that a multiprocessor holds
_SPLITS = (8, 4, 2, 1)  # among equals the most blocks, so that every multiprocessor has some
_HELD = 0.9  # of the places for blocks, where clusters do not fit the last of a group
# Bytes a second of a block by itself: its stages every 0.9 us, somewhat more than a read of memory
# takes that nobody else waits for. Estimated.
_ALONE = _STAGES * _ROWS * _STEPS * 2 / 0.9e-6
_MEET = 1e-6  # seconds until the blocks of a cluster have added up. Estimated


class Plan(NamedTuple):
    """A launch but for its arrays."""

    launch: Kernel
    grid: tuple[int]
    width: int
    shared: int
    seconds: float


def thin_product(x: Array, w: Array, *, scale: Array | None) -> Array:
    """scale * x @ w, rounded once.  x: (..., IN).  w: (1, IN, R).  scale: (1,) f32 or None.

    Only where `extended_gpu.takes` the arrays and there is a `plan_thin`.
    """
    import cupy

    inner, ranks = w.shape[1:]
    out = cupy.empty((*x.shape[:-1], ranks), bf16)
    return _run("thin_product", x, w, scale, out, prod(x.shape[:-1]), inner, (_ROWS, ROW))


def thin_outer(x: Array, g: Array, *, scale: Array | None) -> Array:
    """scale * x^T @ g, (1, IN, R) f32.  x: (..., IN).  g: (..., R).  As above, IN the rows."""
    import cupy

    out = cupy.empty((1, x.shape[-1], g.shape[-1]), f32)
    return _run("thin_outer", x, g, scale, out, x.shape[-1], prod(x.shape[:-1]), (_STEPS, ROW))


def _run(op, x, w, scale, out, rows, inner, box) -> Array:
    ranks = w.shape[-1]
    planned = plan_thin(op, rows, inner, ranks, processors())
    assert planned is not None
    x_map = matrix_map(x.data.ptr, (prod(x.shape[:-1]), x.shape[-1]), box)
    w_map = matrix_map(w.data.ptr, (inner, ranks), (_STEPS, planned.width))
    args = (x_map, w_map, scale, out, rows, inner, ranks)
    planned.launch(planned.grid, (_THREADS,), *args, shared=planned.shared)
    return out


@functools.lru_cache(maxsize=4096)
def plan_thin(op: str, rows: int, inner: int, ranks: int, count: int) -> Plan | None:
    """The plan of one of the two kernels; None for more than 64 columns.

    rows: of the result. inner: the axis that is summed over. count: multiprocessors.
    """
    width = next((w for w in _WIDTHS if ranks <= w), None)
    if width is None:
        return None
    tiles, steps = -(-rows // _ROWS), -(-inner // _STEPS)
    held = max(1, int(_HELD * count)) * _WIDTHS[width]
    itemsize = 2 if op == "thin_product" else 4
    moved = 2 * inner * (rows + ranks) + itemsize * rows * ranks

    def seconds(splits: int) -> float:
        blocks, own = tiles * splits, -(-steps // splits) * _ROWS * _STEPS * 2  # bytes of x
        begin = plan.LAUNCH + (_MEET if splits > 1 else 0)
        rate = plan.READ * min(1.0, blocks / count)
        # Blocks of a last round that are too few to keep the memory busy.
        last = blocks - (rounds(splits) - 1) * held
        tail = max(0.0, own / _ALONE - last * own / rate) if blocks > held else 0.0
        return max(begin + moved / rate + tail, rounds(splits) * (begin + own / _ALONE))

    def rounds(splits: int) -> int:
        return -(-tiles * splits // held)

    possible = (s for s in _SPLITS if s <= max(steps, 1))
    splits = min(possible, key=lambda s: (seconds(s), rounds(s)))
    launch = kernel("thin_product.cu", op, bf16, RANKS=width, SPLITS=splits)
    shared = _STAGES * 2 * _STEPS * (_ROWS + width) + 1024  # and what the alignment may cost
    return Plan(launch, (tiles * splits,), width, shared, seconds(splits))


def outer_ways(x: Array, g: Array, window: Window, hopper: bool):
    """(what, seconds of each way, operations, bytes) of the weight gradient of a product over
    single positions: by cuBLASLt or `thin_outer`."""
    return _outer_ways(tuple(x.shape), tuple(g.shape), window, hopper, x.dtype, processors())


@functools.lru_cache(maxsize=4096)
def _outer_ways(x, g, window: Window, hopper: bool, dtype, count: int):
    positions, inputs, columns = prod(x[:-1]), x[-1], g[-1]
    operations = 2 * positions * inputs * columns // window.groups
    size = inputs * columns // window.groups // (window.groups if window.shared else 1)
    moved = positions * (inputs + columns) * dtype.itemsize + size * wide_dtype(dtype).itemsize
    ways = {"library": max(plan.library(operations), plan.moving(moved))}
    if hopper and window.groups == 1:
        planned = plan_thin("thin_outer", inputs, positions, columns, count)
        if planned is not None:
            ways["thin"] = planned.seconds
    return f"x {x} turned * g {g}", ways, operations, moved
