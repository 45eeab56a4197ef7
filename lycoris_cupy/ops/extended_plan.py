"""Plans of the extended product on Hopper: tile, band, maps and numbers, made once for shapes.

`plan_forward`, `plan_dx` and `plan_blocks_dx` give None for what the kernel does not take: groups
of the base weight, input gradients with a stride, walks that the copy engine does not know, blocks
of x2 that no tile fits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from math import isqrt, prod
from typing import NamedTuple

import numpy as np

from ..arrays import bf16
from ..kernels import Kernel, kernel
from ..tensor_map import ROW
from .conv_plan import geometry_of
from .window import Window

_TERM = np.dtype([(name, np.int32) for name in ("taps", "width", "axes", "block", "flip")])
# (TILE_M, TILE_N) of the variants, by B_ROWS. 128 rows are for results that have fewer tiles of 256
# than there are multiprocessors: they copy more for their products, but all have work. 144 is for w
# whose rows run along the inner axis: along the columns it was 18 % slower than its size says.
_BOTH = [*((256, n) for n in (64, 96, 128, 160)), (192, 192), *((128, n) for n in (64, 128, 160))]
TILES = {True: _BOTH, False: [*_BOTH, (256, 144)]}
# Of the variants that copy an x once which both sums read; the two sums have to fit the registers.
PAIRS = [(256, 64), (128, 64), (128, 128)]
_NARROW_BLOCKS = (40, 80)  # EXT_N of the variants whose tile of 160 holds several blocks
# Cycles that a step takes at least: the copying thread waits for a stage, and asks for two to four
# boxes, 50 each; a worker waits for the stage, starts four products and sees them end, 130 behind
# the last. Estimated, not measured; the least of today's tiles, 128 x 64, copies for 473.
_STEP = 300
# Bytes that a multiprocessor takes in a cycle, as measured: with tiles of 256 x 128, 128 x 128 and
# 128 x 160 it took 41 to 47, whether it had asked or the block beside it; 64 is the port's width.
_TAKEN = 45
_WASTE = 0.3  # of the columns that are fetched and not read, as time
# Cycles a value of a tile, to write it, or to hand it to the copy engine, and to begin the next.
_END, _STAGED_END = 30 / 256, 16 / 256
_ALL = 1 << 30  # columns of a block where all columns share one


class Second(NamedTuple):
    """What a plan knows of the second sum. same: its x is that of the first."""

    shape: tuple[int, int, int]  # of w2
    window: Window
    same: bool = False

    def pairs(self, shape: tuple[int, ...], window: Window) -> bool:
        """Whether it reads the same as a first sum with this shape of w and this window."""
        walk = self.window.grouped(1) == window.grouped(1) and self.window.groups == 1
        return self.same and walk and tuple(shape) == self.shape


class Tile(NamedTuple):
    """A variant of the kernel, and the cycles that it was estimated to take. ext: columns that the
    second sum does at a time. pair: both sums are done at once. scaled: the first has factors.
    """

    rows: int
    columns: int
    ext: int
    cycles: float
    pair: bool = False
    scaled: bool = False

    @property
    def cluster(self) -> int:
        """Blocks that copy the weights of the same columns together.

        As measured: 256 x 128 and 256 x 160 are 4 to 10 % faster in pairs, 192 x 192 is not. The
        scaled variant of 256 x 160 has no registers left for it.
        """
        if self.pair or (self.scaled and self.rows * self.columns == 256 * 160):
            return 1
        return 2 if 128 <= self.columns == self.ext < 192 else 1

    def staged(self, b_rows: int) -> bool:
        """Whether a finished tile to which nothing is added is written by the copy engine: STAGED
        of extended_tile.cuh."""
        return self.columns != 144 and not (b_rows and (self.rows, self.columns) == (256, 160))

    def launch(self, b_rows: int) -> Kernel:
        defines = {"TILE_N": self.columns, "B_ROWS": b_rows}
        defines |= {"TILE_M": self.rows} if self.rows != 256 else {}
        defines |= {"EXT_N": self.ext} if self.ext != self.columns else {}
        defines |= {"PAIR": 1} if self.pair else {}
        defines |= {"SCALED": 1} if self.scaled else {}
        defines |= {"CLUSTER": self.cluster} if self.cluster != 1 else {}
        return kernel("extended.cu", "extended", bf16, **defines)

    def grid(self, positions: int, columns: int, count: int) -> tuple[int]:
        return (min(self.clusters(positions, columns), count // self.cluster) * self.cluster,)

    def clusters(self, positions: int, columns: int) -> int:
        """Tiles, each as many rows as a cluster's blocks have together."""
        return _ceil(positions, self.rows * self.cluster) * _ceil(columns, self.columns)

    def band(self, count: int) -> int:
        """As many rows as columns of operands are then in use at a time."""
        clusters, rows = count // self.cluster, self.rows * self.cluster
        return max(1, isqrt(clusters * self.columns // rows))

    def boxes(self, b_rows: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """What a block copies of w and w2 at a time: all, or its share for the cluster."""
        if b_rows:
            box = (1, ROW // self.cluster, ROW)
            return box, box
        return (1, self.columns // self.cluster, ROW), (1, self.ext // self.cluster, ROW)


@dataclass(frozen=True)
class Plan:
    """A launch but for its arrays. image: (shape of x, lower, upper, stride) of its pixel map; None
    for a matrix."""

    launch: Kernel
    grid: tuple[int]
    geometry: np.ndarray
    own: np.ndarray
    other: np.ndarray
    numbers: tuple[int, int, int]  # positions, columns, band
    image: tuple | None
    other_image: tuple | None
    boxes: tuple[tuple[int, int, int], tuple[int, int, int]]  # of w and w2
    tile: Tile
    b_rows: int


@functools.lru_cache(maxsize=4096)
def plan_forward(
    x_shape, w_shape, window: Window, extra: Second | None, count: int, scaled: bool = False
) -> Plan | None:
    """The plan of x * w + x2 * w2.  count: multiprocessors. scaled: x * w has a scale of its
    columns.
    """
    if window.groups != 1:
        return None
    space = x_shape[1:-1] if not window.pointwise else ()
    to = window.out_space(space) if space else ()
    image, geometry = walk_of(window, x_shape[0], space, to, window.padding, window.stride)
    if geometry is None:
        return None
    positions = (x_shape[0] * prod(to)) if space else prod(x_shape[:-1])
    columns, steps, more = w_shape[2], w_shape[0] * _ceil(w_shape[1], ROW), 0
    own = _term(w_shape[0], w_shape[1], image)
    other, block, other_image, pair = _term(0, 0, None), _ALL, None, False
    if extra is not None:
        (taps, width, block_columns), extra_window, _ = extra
        pair = extra.pairs(w_shape, window) and not scaled
        if not extra_window.pointwise and extra_window.grouped(1) != window.grouped(1):
            return None
        if extra_window.groups > 1 and not extra_window.shared:
            return None
        block = block_columns if extra_window.groups > 1 else _ALL
        other_image = None if extra_window.pointwise else image
        other = _term(taps, width, other_image, block)
        more = taps * _ceil(width, ROW)
    tile = _choose(True, positions, columns, steps, more, count, block, pair)
    if tile is None or (scaled and tile.ext != tile.columns):
        return None
    tile = tile._replace(scaled=scaled)
    return Plan(
        tile.launch(1),
        tile.grid(positions, columns, count), geometry, own, other,
        (positions, columns, tile.band(count)), image, other_image,
        tile.boxes(1), tile, 1,
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def plan_dx(
    g_shape, w_shape, window: Window, in_space, extra: Second | None, count: int
) -> Plan | None:
    """The plan of the input's gradient, g * w^T + g2 * w2^T.  extra: what `joins_dx`, or None."""
    if window.groups != 1 or any(s != 1 for s in window.stride):
        return None
    space = g_shape[1:-1] if not window.pointwise else ()
    to = tuple(in_space) if space else ()
    reach = [d * (k - 1) for d, k in zip(window.dilation, window.kernel, strict=True)]
    padding = tuple(r - p for r, p in zip(reach, window.padding, strict=True))
    image, geometry = walk_of(window, g_shape[0], space, to, padding, window.stride)
    if geometry is None:
        return None
    positions = (g_shape[0] * prod(to)) if space else prod(g_shape[:-1])
    columns, steps, more = w_shape[1], w_shape[0] * _ceil(w_shape[2], ROW), 0
    if columns % 8:
        return None
    own = _term(w_shape[0], w_shape[2], image, flip=1)
    other, other_image, pair = _term(0, 0, None), None, False
    if extra is not None:
        (taps, _, width), extra_window, _ = extra
        pair = extra.pairs(w_shape, window)
        if not joins_dx(window, extra_window):
            return None
        other_image = None if extra_window.pointwise else image
        other = _term(taps, width, other_image, flip=1)
        more = taps * _ceil(width, ROW)
    tile = _choose(False, positions, columns, steps, more, count, _ALL, pair)
    assert tile is not None  # any serves where there are no blocks
    return Plan(
        tile.launch(0), tile.grid(positions, columns, count), geometry, own, other,
        (positions, columns, tile.band(count)), image, other_image,
        tile.boxes(0), tile, 0,
    )  # fmt: skip


def joins_dx(window: Window, extra: Window) -> bool:
    """Whether an input gradient's second term can be part of its sum: rows of its own, or the same
    walk over space."""
    return extra.groups == 1 and (extra.pointwise or extra.grouped(1) == window.grouped(1))


def walk_of(window: Window, images: int, space, to, padding, stride):
    """(what a pixel map needs, Geometry), or (None, None) for a walk that the copy engine does not
    know."""
    if not space:
        flat = Window()
        return None, geometry_of(flat, (), ())
    one = (1,) * max(0, 2 - len(space))  # a convolution over one axis is one over two
    none = (0,) * len(one)
    space, to, padding, stride = (*one, *space), (*one, *to), (*none, *padding), (*one, *stride)
    kernel_, dilation = (*one, *window.kernel), (*one, *window.dilation)
    lower = tuple(-p for p in padding)
    upper = tuple(
        (o - 1) * s + at - (n - 1) for o, s, at, n in zip(to, stride, lower, space, strict=True)
    )
    corner, offset = (128, 255) if len(space) == 2 else (16, 31)
    reach = [d * (k - 1) for d, k in zip(dilation, kernel_, strict=True)]
    if (
        any(not -corner <= c < corner for c in (*lower, *upper))
        or max(reach) > offset
        or max(stride) > 8
    ):
        return None, None
    walk = Window(kernel_, stride, padding, dilation)
    return ((images, *space), lower, upper, stride), geometry_of(walk, space, to)


def _term(taps: int, width: int, image, block: int = _ALL, flip: int = 0) -> np.ndarray:
    out = np.zeros((), _TERM)
    axes = 0 if image is None else len(image[0]) - 1
    for name, value in zip(_TERM.names or (), (taps, width, axes, block, flip), strict=True):
        out[name] = value
    return out


def _choose(
    b_rows, positions, columns, own: int, other: int, count, block, pair=False
) -> Tile | None:
    """The tile with the least time on the busiest multiprocessor; None if the blocks fit none. own,
    other: steps of the two sums, of the second for one block. pair: whether both can be done at
    once.
    """
    choices = [(m, n, n, False) for m, n in TILES[b_rows] if block == _ALL or block % n == 0]
    if block in _NARROW_BLOCKS:
        choices = [(256, 160, block, False)]
    choices += [(m, n, n, True) for m, n in PAIRS if pair]

    def step(tile, width, weights=1):
        wide = _ceil(width, ROW) * ROW if b_rows else width  # columns that are fetched
        waste = 1 + _WASTE * (wide / width - 1)
        products = weights * tile.rows * width / 32
        copies = (tile.rows + weights * wide) * ROW * 2 / _TAKEN
        return max(_STEP, max(products, copies) * waste)

    def timed(tile):
        rounds = _ceil(tile.clusters(positions, columns), count // tile.cluster)
        if tile.pair:
            steps = own * step(tile, tile.columns, 2)
        else:
            more = tile.columns // tile.ext * other * step(tile, tile.ext)
            steps = own * step(tile, tile.columns) + more
        end = tile.rows * tile.columns * (_STAGED_END if tile.staged(b_rows) else _END)
        return tile._replace(cycles=rounds * (steps + end))

    tiles = (timed(Tile(*choice[:3], 0.0, choice[3])) for choice in choices)
    return min(tiles, key=lambda tile: tile.cycles, default=None)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


@functools.lru_cache(maxsize=4096)
def plan_blocks_dx(g_shape, w_shape, window: Window, in_space, count: int) -> Plan | None:
    """The plan of the input's gradient where groups share w: a second sum without a first."""
    if window.pointwise or not window.shared or any(s != 1 for s in window.stride):
        return None
    reach = [d * (k - 1) for d, k in zip(window.dilation, window.kernel, strict=True)]
    padding = tuple(r - p for r, p in zip(reach, window.padding, strict=True))
    to = tuple(in_space)
    image, geometry = walk_of(window, g_shape[0], g_shape[1:-1], to, padding, window.stride)
    if geometry is None:
        return None
    taps, inner, outer = w_shape
    positions, columns = g_shape[0] * prod(to), inner * window.groups
    tile = _choose(False, positions, columns, 0, taps * _ceil(outer, ROW), count, inner)
    if tile is None or columns % 8:
        return None
    return Plan(
        tile.launch(0), tile.grid(positions, columns, count), geometry,
        _term(0, 0, None), _term(taps, outer, image, inner, flip=1),
        (positions, columns, tile.band(count)), None, image,
        tile.boxes(0), tile, 0,
    )  # fmt: skip
