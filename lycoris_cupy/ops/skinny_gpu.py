"""Products of few positions on Hopper: scale * (x2 * w2 + bias2) + x * w + add + bias, one
rounding, in the time of reading w.

For arrays that `extended_gpu.takes` allows, and shapes that `plan_forward` or `plan_dx` has a plan
for: linear products, of which the second, or one by itself, may have blocks of channels that share
its w. `skinny_mixed` makes the x2 of a LoKr inside, by `plan_mixed`, `skinny_low_rank` that of a
LoRA, by `plan_low_rank`; `skinny_mixed_down_gpu` that of a LoKr with a factored w2. See
cuda_src/skinny.cu.
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
from .extended_gpu import Extra, takes
from .extended_plan import Second
from .window import Window

MOST = 128  # positions; more multiply for longer than it takes to read w
_MOST_ROWS = 1024  # of all the blocks that share a w
MOST_MIXED, RANKS = 64, 16  # columns of a w1, or of a down, whose product with x is made inside
_ROWS = 64  # of a tile
# Of the kernels that share skinny.cuh: a warpgroup that multiplies and a warp that copies; 96 KiB
# of stages, and what their alignment may cost.
THREADS, SHARED = 160, 97 * 1024
_SHARED = {1: 226 * 1024, 2: 112 * 1024}  # of skinny.cu, by the blocks that share a multiprocessor
# (TILE_N, CLUSTER, EACH) of the variants, the preferred first where they cost the same; of those
# that mix x, and of those that make x * down. As measured on 3072 -> 3072 (H100): narrow strips are
# 1.3 us faster at 64 positions, and 2 slower at one.
VARIANTS = [*((64, c, 2) for c in (4, 3, 8)), *((128, c, 2) for c in (6, 4, 8, 2, 1))]
MIXED = [*((64, c, 2) for c in (2, 3)), *((128, c, 2) for c in (6, 8, 4, 3, 2, 1))]
LOW_RANK = [(64, 4, 2), *((128, c, 1) for c in (3, 4, 2, 1)), (128, 1, 2)]
_NARROW = 9  # positions from which narrow strips are considered


class Plan(NamedTuple):
    """A launch but for its arrays. numbers: positions, columns, width, width2, block, blocks."""

    launch: Kernel
    tile: int
    cluster: int
    each: int
    grid: tuple[int, int]
    w_box: tuple[int, int, int]
    numbers: tuple[int, int, int, int, int, int]
    copied: int  # bytes that the busiest multiprocessor copies, by all the blocks it has in turn
    added: int  # bytes of sums that it is sent

    def maps(self, x, w, width: int) -> tuple:
        """Of a sum's operands: x as (positions, blocks, width), w as it is."""
        positions = self.numbers[0]
        blocks = x.size // (positions * width)
        return (
            matrix_map(x.data.ptr, (positions, blocks, width), (_ROWS, 1, ROW)),
            matrix_map(w.data.ptr, tuple(w.shape), self.w_box),
        )

    def inner_maps(self, x, w, down, up) -> tuple:
        """Of x, w, down and up."""
        return (*self.maps(x, w, self.numbers[2]), *self.low_rank_maps(down, up))

    def low_rank_maps(self, down, up) -> tuple:
        boxes = (1, ROW, RANKS), self.w_box
        return tuple(
            matrix_map(a.data.ptr, tuple(a.shape), box)
            for a, box in zip((down, up), boxes, strict=True)
        )

    def mixed_maps(self, x, w, w2) -> tuple:
        """Of x and w by the blocks of channels that are mixed, and of w2."""
        positions, columns, width, width2, _, blocks = self.numbers
        return (
            matrix_map(x.data.ptr, (positions, blocks, width2), (_ROWS, 1, ROW)),
            matrix_map(w.data.ptr, (blocks, width2, columns), self.w_box),
            NOTHING,
            matrix_map(w2.data.ptr, tuple(w2.shape), self.w_box),
        )

    def seconds(self, moved: int) -> float:
        """Estimated, where the operands of the first sum and the result are so many bytes."""
        positions, columns, _, width2, block, blocks = self.numbers
        read = 0 if blocks > 1 else positions * (columns // block)
        return plan.skinny(moved + (read + block) * width2 * bf16.itemsize, self.copied, self.added)


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
    numbers = positions, columns, width, width2, columns // blocks, 1
    size = Size(numbers, -(-width // ROW) + -(-width2 // ROW), count)
    return size.planned(VARIANTS, b_rows)


def plan_mixed(x, w, window: Window, w1, extra: Second, count: int) -> Plan | None:
    """The plan of x * w + (x mixed by w1) * w2, from shapes. w1: (L, M), for L blocks of w2."""
    apart = _plan(True, x, w[2], w[1], window, extra, count)
    (rows, blocks), width2 = w1, extra.shape[1]
    if apart is None or extra.window.groups != rows or w[1] != blocks * width2 or width2 % 8:
        return None
    if not 1 < blocks <= MOST_MIXED:
        return None
    return _plan_mixed((*apart.numbers[:5], blocks), count)


@functools.lru_cache(maxsize=4096)
def _plan_mixed(numbers, count: int) -> Plan | None:
    # A step is a slice of all blocks of x, and of w2.
    size = Size(numbers, -(-numbers[3] // ROW), count, numbers[5] + 1)
    return size.planned(MIXED, True)


def plan_low_rank(x, w, window: Window, down, extra: Second, count: int) -> Plan | None:
    """The plan of x * w + (x * down) * up, from shapes. down: (1, IN, R)."""
    apart = _plan(True, x, w[2], w[1], window, extra, count)
    if apart is None or extra.window.groups > 1 or down != (1, w[1], extra.shape[1]):
        return None
    return _plan_low_rank(apart.numbers, count) if down[2] in (8, RANKS) else None


@functools.lru_cache(maxsize=4096)
def _plan_low_rank(numbers, count: int) -> Plan | None:
    return Size(numbers, -(-numbers[2] // ROW), count).planned(LOW_RANK, True, RANKS=RANKS)


class Size(NamedTuple):
    """What is cut into blocks. numbers: as in Plan. steps: that the blocks of a cluster share.
    stages: of a step.
    """

    numbers: tuple[int, int, int, int, int, int]
    steps: int
    count: int
    stages: int = 1

    def grid(self, variant) -> tuple[int, int]:
        positions, columns, _, _, block, _ = self.numbers
        tile, cluster, _ = variant
        return columns // block * -(-block // tile) * cluster, -(-positions // _ROWS)

    def loads(self, variant) -> tuple[int, int]:
        """`copied` and `added` of Plan."""
        positions, (tile, cluster, _) = self.numbers[0], variant
        turns = -(-prod(self.grid(variant)) // self.count)
        stages = -(-self.steps // cluster) * self.stages
        rows = -(-min(positions, _ROWS) // 16) * 16
        added = rows * tile * 4 * (cluster - 1) // cluster  # by each, at the same time
        return turns * stages * (tile + _ROWS) * ROW * bf16.itemsize, added

    def seconds(self, variant) -> float:
        positions, columns, width, *_ = self.numbers
        return plan.skinny((positions + columns) * width * bf16.itemsize, *self.loads(variant))

    def planned(self, variants, b_rows: bool, **more) -> Plan | None:
        """By the best of the variants. more: further defines."""
        variant = _choose(self, variants)
        if variant is None:
            return None
        tile, cluster, each = variant
        more |= {"TILE_N": tile, "B_ROWS": int(b_rows), "CLUSTER": cluster, "EACH": each}
        launch = kernel("skinny.cu", "skinny", bf16, MIXED=int(self.numbers[5] > 1), **more)
        w_box, loads = (1, ROW if b_rows else tile, ROW), self.loads(variant)
        return Plan(launch, *variant, self.grid(variant), w_box, self.numbers, *loads)


def _choose(size: Size, variants) -> tuple[int, int, int] | None:
    """The variant that is estimated to be the fastest, of those with a step for each block, blocks
    alone on a multiprocessor only where there are enough of these, and narrow strips only for more
    than a few positions.
    """
    fit = [v for v in variants if v[1] <= max(size.steps, 1)]
    fit = [v for v in fit if v[2] > 1 or prod(size.grid(v)) <= size.count]
    fit = [v for v in fit if v[0] > 64 or size.numbers[0] >= _NARROW]
    return min(fit, key=size.seconds, default=None)


def skinny_forward(
    x, w, window: Window, *, extra: Extra | None, scale, add, bias, out=None
) -> Array:
    """add + scale * (x * w) + bias + extra, in the dtype of x. Both a scale and an extra are never
    there. Only where `plan_forward` says so. out: where it goes, a new array by default; may be
    add.
    """
    second = None if extra is None else extra.beside(x)
    planned = plan_forward(tuple(x.shape), tuple(w.shape), window, second, processors())
    return _run(planned, x, w, extra, scale, add, bias, out)


def skinny_dx(g, w, window: Window, *, extra: Extra | None, scale, add, out=None) -> Array:
    """add + scale * g * w^T + extra, as above. Only where `plan_dx` says so."""
    second = None if extra is None else extra.beside(g)
    planned = plan_dx(tuple(g.shape), tuple(w.shape), window, second, processors())
    return _run(planned, g, w, extra, scale, add, None, out)


def _run(planned: Plan | None, x, w, extra: Extra | None, scale, add, bias, out) -> Array:
    import cupy

    assert planned is not None
    positions, columns, width, width2, block, _ = planned.numbers
    if out is None:
        out = cupy.empty((*x.shape[:-1], positions * columns // prod(x.shape[:-1])), x.dtype)
    maps = planned.maps(x, w, width)
    if scale is not None:  # a second sum without a first
        maps, width, width2 = (NOTHING, NOTHING, *maps), 0, width
    elif extra is None:
        maps = (*maps, NOTHING, NOTHING)
    else:
        maps, scale = (*maps, *planned.maps(extra.x, extra.w, width2)), extra.scale
    bias2 = None if extra is None else extra.bias
    numbers = (positions, columns, width, width2, block, 1)
    _launch(planned, *maps, scale, add, bias, bias2, None, None, None, out, *numbers)
    return out


def mixed_plan(x, w, window: Window, w1, w2, other: Window, *more) -> Plan | None:
    """`plan_mixed` of these arrays, w2 shared by the groups of `other`, where the kernel takes
    them. more: what is added, or None.
    """
    if not other.shared or w1.dtype != bf16 or not w1.flags.c_contiguous:
        return None
    if not takes(x, w, w2, *more):
        return None
    shapes = tuple(x.shape), tuple(w.shape), window, tuple(w1.shape)
    return plan_mixed(*shapes, Second(tuple(w2.shape), other), processors())


def low_rank_plan(x, w, window: Window, down, up, other: Window, *more) -> Plan | None:
    """`plan_low_rank` of these arrays, likewise."""
    if not takes(x, w, down, up, *more):
        return None
    shapes = tuple(x.shape), tuple(w.shape), window, tuple(down.shape)
    return plan_low_rank(*shapes, Second(tuple(up.shape), other), processors())


def skinny_mixed(x, w, w1, planned: Plan, extra: Extra, *, add, bias, keep, out=None) -> tuple:
    """(add + x * w + bias + extra, x2 if keep), where extra's x is x2, the mix of x by w1."""
    maps = planned.mixed_maps(x, w, extra.w)
    return inside(x, maps, w1, planned, extra, add, bias, keep, out)


def skinny_low_rank(x, w, down, planned: Plan, extra: Extra, *, add, bias, keep, out=None) -> tuple:
    """(add + x * w + bias + extra, x2 if keep), where extra's x is x2 = x * down."""
    maps = planned.inner_maps(x, w, down, extra.w)
    return inside(x, maps, None, planned, extra, add, bias, keep, out)


def inside(
    x, maps, w1, planned: Plan, extra: Extra, add, bias, keep, out, inner=None
) -> tuple[Array, Array | None]:
    """(The result, x2 if keep) by a plan whose x2 is made there. w1, inner: of a mix, or None."""
    import cupy

    _, columns, _, width2, block, _ = planned.numbers
    out = cupy.empty((*x.shape[:-1], columns), x.dtype) if out is None else out
    kept = cupy.empty((*x.shape[:-1], columns // block * width2), x.dtype) if keep else None
    terms = (extra.scale, add, bias, extra.bias, w1, kept, inner)
    _launch(planned, *maps, *terms, out, *planned.numbers)
    return out, kept


def _launch(planned: Plan, *args) -> None:
    planned.launch(planned.grid, (THREADS,), *args, shared=_SHARED[planned.each])
