"""Plans of the convolution by mma.sync with a second sum in its accumulators: conv_extended and
conv_extended_dx of cuda_src/conv_extended.cu.

A plan is that of the first sum with another kernel and its own choice of tile. `joins` says which
second sums the kernel takes: not those of another walk over space, nor beside groups of a few
channels, which have no tiles.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from ..arrays import bf16
from ..kernels import kernel
from .conv_plan import THREADS, TILE_K, TILES, Plan, ceil, choose_tile, direct, memory_of, plan_conv
from .conv_plan import plan_dx as plan_conv_dx
from .window import Window

_TERM = np.dtype([(name, np.int32) for name in ("inner", "outer", "blocks", "shared", "single")])


class Term(NamedTuple):
    """struct Term of conv_term.cuh. inner, outer: channels that are read and columns of the result,
    a block. single: one tap, at the position itself.
    """

    inner: int
    outer: int
    blocks: int
    shared: bool
    single: bool

    def record(self) -> np.ndarray:
        return np.array(tuple(self), _TERM)

    def steps(self, taps: int) -> int:
        return ceil((1 if self.single else taps) * self.inner, TILE_K)

    def blocks_of(self, tile: int, own: Term) -> float:
        """Blocks that have a column of a tile, on average; the tile walks over each by itself."""
        count = total = 0
        for group in range(0, own.blocks * own.outer, own.outer):
            for at in range(0, own.outer, tile):
                first, past = group + at, group + min(at + tile, own.outer)
                count, total = count + 1, total + (past - 1) // self.outer - first // self.outer + 1
        return total / count


@dataclass(frozen=True)
class ExtendedPlan(Plan):
    """other: the second sum. repeats: how often a tile walks over it, on average. busiest: the
    operations if each multiprocessor had as many tiles as the one with the most, at the pace of
    the largest tile.
    """

    other: np.ndarray | None = None
    repeats: float = 1.0
    busiest: float = 0.0


def term_of(w_shape, window: Window, back: bool = False) -> Term:
    """The sum with a w of this shape, (taps, in, columns); back: turned, as for the gradient of the
    input.
    """
    sizes = w_shape[1], w_shape[2] // (1 if window.shared else window.groups)
    inner, outer = sizes[::-1] if back else sizes
    return Term(inner, outer, window.groups, window.shared, window.pointwise)


def joins(dtype, w_shape, window: Window, other_shape, other: Window, back: bool = False) -> bool:
    """Whether the second sum can be part of the first's kernel, and costs it nothing: it reads a
    single position or the same walk, and 16 bytes at a time where the first does. First sums over a
    single position, which are plain matrix products, are taken only where all is read so.
    """
    if dtype != bf16 or not (other.pointwise or other.grouped(1) == window.grouped(1)):
        return False
    own, more = term_of(w_shape, window, back), term_of(other_shape, other, back)
    if min(*own[:2], *more[:2]) == 0 or direct(own.inner, own.outer, own.blocks):
        return False
    pairs = (
        [(own.inner, more.inner)] if back else [(own.inner, more.inner), (own.outer, more.outer)]
    )
    if window.pointwise:
        return not any(size % 8 for pair in pairs for size in pair)
    return not any(first % 8 == 0 and second % 8 for first, second in pairs)


@functools.lru_cache(maxsize=4096)
def plan_forward(
    x_shape, w_shape, window: Window, other: Term, x_aligned: bool, w_aligned: bool, count: int
) -> ExtendedPlan:
    """The plan of x * w + x2 * w2, for what `joins`. x_aligned, w_aligned: both of them. count:
    multiprocessors.
    """
    first = plan_conv(bf16, x_shape, w_shape, window, x_aligned, w_aligned, count)
    copies = _width(first, "VEC_A", other.inner), _width(first, "VEC_B", other.outer)
    return _extended(first, term_of(w_shape, window), other, window.taps, copies, count)


@functools.lru_cache(maxsize=4096)
def plan_dx(
    g_shape, w_shape, window: Window, space, other: Term, g_aligned: bool, w_aligned: bool, count
) -> ExtendedPlan:
    """The plan of g * w^T + g2 * w2^T. As above."""
    first = plan_conv_dx(bf16, g_shape, w_shape, window, space, g_aligned, w_aligned, count)
    copies = (_width(first, "VEC_A", other.inner),) * 2  # both lie along the same channels
    return _extended(first, term_of(w_shape, window, True), other, window.taps, copies, count)


def _width(first: Plan, name: str, size: int) -> int:
    return int(first.launch.defines[name]) if size % 8 == 0 else 1


def _extended(first: Plan, own: Term, other: Term, taps: int, copies, count: int) -> ExtendedPlan:
    def depth(tile: int) -> float:
        return ceil(taps * own.inner, TILE_K) + other.steps(taps) * other.blocks_of(tile, own)

    positions = first.numbers[0]
    tile = choose_tile(positions, own.outer, own.blocks, copies, count, depth)
    blocks = ceil(positions, tile[0]) * ceil(own.outer, tile[1]) * own.blocks
    defines = {"TILE_M": tile[0], "TILE_N": tile[1], "VEC_A": copies[0], "VEC_B": copies[1]}
    name = first.launch.op.replace("conv", "conv_extended")
    products = 2 * tile[0] * tile[1] * TILE_K * depth(tile[1]) / TILES[tile][1]
    same = {f.name: getattr(first, f.name) for f in fields(first)}
    same |= {"launch": kernel("conv_extended.cu", name, bf16, **defines), "grid": (blocks,)}
    same |= {"block": (THREADS,), "shared": memory_of(tile)}
    return ExtendedPlan(
        **same,
        other=other.record(),
        repeats=other.blocks_of(tile[1], own),
        busiest=products * ceil(blocks, count) * count,
    )
