"""Products of few positions on Hopper: scale * (x2 * w2 + bias2) + x * w + add + bias, one
rounding, in the time of reading w.

For arrays that `extended_gpu.takes` allows, and shapes that `plan_forward` or `plan_dx` has a plan
for: linear products, of which the second, or one by itself, may have blocks of channels that share
its w. See cuda_src/skinny.cu.
"""

from __future__ import annotations

import functools
from math import prod
from typing import NamedTuple

from .. import plan
from ..arrays import Array, bf16
from ..kernels import Kernel, kernel
from ..tensor_map import NOTHING, ROW, matrix_map
from .conv_gpu import processors
from .extended_gpu import Extra
from .extended_plan import Second
from .window import Window

MOST = 128  # positions; more multiply for longer than it takes to read w
_MOST_ROWS = 1024  # of all the blocks that share a w
_ROWS = 64  # of a tile
# Of the kernels that share skinny.cuh: a warpgroup that multiplies and a warp that copies; 96 KiB
# of stages, and what their alignment may cost.
THREADS, SHARED = 160, 97 * 1024
_TOGETHER = 2  # blocks on a multiprocessor
_ROW_SECONDS = 9e-8  # as measured on 3072 -> 3072: 13.7 us for one position, 19.4 for 64
# (TILE_N, CLUSTER) of the variants, the preferred first: wide strips read x fewer times, and many
# blocks to a strip share out its work.
VARIANTS = [*((128, c) for c in (8, 4, 2, 1)), *((64, c) for c in (8, 4))]


class Plan(NamedTuple):
    """A launch but for its arrays. numbers: positions, columns, width, width2, block."""

    launch: Kernel
    tile: int
    cluster: int
    grid: tuple[int, int]
    w_box: tuple[int, int, int]
    numbers: tuple[int, int, int, int, int]
    block_bytes: int  # that a place on a multiprocessor copies, by all the blocks it has in turn

    def maps(self, x, w, width: int) -> tuple:
        """Of a sum's operands: x as (positions, blocks, width), w as it is."""
        positions = self.numbers[0]
        blocks = x.size // (positions * width)
        return (
            matrix_map(x.data.ptr, (positions, blocks, width), (_ROWS, 1, ROW)),
            matrix_map(w.data.ptr, tuple(w.shape), self.w_box),
        )

    def seconds(self, moved: int) -> float:
        """Estimated, where the operands of the first sum and the result are so many bytes."""
        positions, columns, _, width2, block = self.numbers
        second = (positions * (columns // block) + block) * width2 * bf16.itemsize
        rows = _ROW_SECONDS * min(positions, _ROWS)
        return plan.skinny(moved + second, self.block_bytes) + rows


def plan_forward(x, w, window: Window, extra: Second | None, count: int) -> Plan | None:
    """The plan of x * w + x2 * w2, from shapes. count: multiprocessors."""
    return _plan(True, x, w[2], w[1], window, extra, count)


def plan_dx(g, w, window: Window, extra: Second | None, count: int) -> Plan | None:
    """The plan of the input's gradient, g * w^T + g2 * w2^T."""
    return _plan(False, g, w[1], w[2], window, extra, count)


@functools.lru_cache(maxsize=4096)
def _plan(b_rows, x, columns, width, window: Window, extra: Second | None, count) -> Plan | None:
    """b_rows: whether rows of w, and of w2, run along the columns of the result."""
    positions, width2, blocks = prod(x[:-1]) * window.groups, 0, 1
    if not window.pointwise or not 1 <= positions <= (MOST if window.groups == 1 else _MOST_ROWS):
        return None
    if window.groups > 1 and (extra is not None or not window.shared):
        return None
    if extra is not None:
        width2, blocks = extra.shape[1 if b_rows else 2], extra.window.groups
        if not extra.window.pointwise or (blocks > 1 and not extra.window.shared):
            return None
    # A row of y, and of each block of x2 and w2, is whole chunks of 16 bytes.
    if columns % (8 * blocks) or (blocks > 1 and width2 % 8):
        return None
    block, steps = columns // blocks, -(-width // ROW) + -(-width2 // ROW)
    bands = -(-positions // _ROWS)
    tile, cluster = _choose(block, blocks * bands, steps, count)
    grid = blocks * -(-block // tile) * cluster, bands
    turns = -(-prod(grid) // (_TOGETHER * count))
    copied = turns * -(-steps // cluster) * (tile + _ROWS) * ROW * 2
    launch = kernel("skinny.cu", "skinny", bf16, TILE_N=tile, B_ROWS=int(b_rows), CLUSTER=cluster)
    w_box = (1, ROW if b_rows else tile, ROW)
    numbers = (positions, columns, width, width2, block)
    return Plan(launch, tile, cluster, grid, w_box, numbers, copied)


def _choose(block: int, blocks: int, steps: int, count: int) -> tuple[int, int]:
    """The first variant that gives every multiprocessor a block and runs at once; else of those
    that run at once the one with the most blocks, narrow ones at that; else that with the fewest.
    """

    def size(variant):
        tile, cluster = variant
        return blocks * -(-block // tile) * cluster

    fit = [v for v in VARIANTS if v[1] <= steps or v[1] == 1]
    together = [v for v in fit if size(v) <= _TOGETHER * count]
    full = (v for v in together if size(v) >= count)
    most = max(together, key=lambda v: (size(v), -v[0]), default=None)
    return next(full, None) or most or min(fit, key=size)


def skinny_forward(x, w, window: Window, *, extra: Extra | None, scale, add, bias) -> Array:
    """add + scale * (x * w) + bias + extra, in the dtype of x. Both a scale and an extra are never
    there. Only where `plan_forward` says so.
    """
    second = None if extra is None else extra.beside(x)
    planned = plan_forward(tuple(x.shape), tuple(w.shape), window, second, processors())
    return _run(planned, x, w, extra, scale, add, bias)


def skinny_dx(g, w, window: Window, *, extra: Extra | None, scale, add) -> Array:
    """add + scale * g * w^T + extra, as above. Only where `plan_dx` says so."""
    second = None if extra is None else extra.beside(g)
    planned = plan_dx(tuple(g.shape), tuple(w.shape), window, second, processors())
    return _run(planned, g, w, extra, scale, add, None)


def _run(planned: Plan | None, x, w, extra: Extra | None, scale, add, bias) -> Array:
    import cupy

    assert planned is not None
    positions, columns, width, width2, block = planned.numbers
    out = cupy.empty((*x.shape[:-1], positions * columns // prod(x.shape[:-1])), x.dtype)
    maps = planned.maps(x, w, width)
    if scale is not None:  # a second sum without a first
        maps, width, width2 = (NOTHING, NOTHING, *maps), 0, width
    elif extra is None:
        maps = (*maps, NOTHING, NOTHING)
    else:
        maps, scale = (*maps, *planned.maps(extra.x, extra.w, width2)), extra.scale
    bias2 = None if extra is None else extra.bias
    args = (*maps, scale, add, bias, bias2, out, positions, columns, width, width2, block)
    planned.launch(planned.grid, (THREADS,), *args, shared=SHARED)
    return out
