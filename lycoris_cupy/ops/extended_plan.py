"""Plans of the extended product on Hopper: tile, band, maps and numbers, made once for shapes.

`plan_forward`, `plan_dx` and `plan_blocks_dx` give None for what the kernel does not take: groups
of the base weight, input gradients with a stride, walks that the copy engine does not know, blocks
of x2 that no tile fits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np

from ..kernels import Kernel
from ..tensor_map import ROW
from .conv_plan import ceil, geometry_of
from .extended_tile import ALL, Tile, choose
from .window import Window

_TERM = np.dtype([(name, np.int32) for name in ("taps", "width", "axes", "block", "flip")])


class Second(NamedTuple):
    """What a plan knows of the second sum. same: its x is that of the first."""

    shape: tuple[int, int, int]  # of w2
    window: Window
    same: bool = False

    def pairs(self, shape: tuple[int, ...], window: Window) -> bool:
        """Whether it reads the same as a first sum with this shape of w and this window."""
        walk = self.window.grouped(1) == window.grouped(1) and self.window.groups == 1
        return self.same and walk and tuple(shape) == self.shape


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
    columns, steps, more = w_shape[2], w_shape[0] * ceil(w_shape[1], ROW), 0
    own = term(w_shape[0], w_shape[1], image)
    other, block, other_image, pair = term(0, 0, None), ALL, None, False
    if extra is not None:
        (taps, width, block_columns), extra_window, _ = extra
        pair = extra.pairs(w_shape, window) and not scaled
        if not extra_window.pointwise and extra_window.grouped(1) != window.grouped(1):
            return None
        if extra_window.groups > 1 and not extra_window.shared:
            return None
        block = block_columns if extra_window.groups > 1 else ALL
        other_image = None if extra_window.pointwise else image
        other = term(taps, width, other_image, block)
        more = taps * ceil(width, ROW)
    tile = choose(True, positions, columns, steps, more, count, block, pair)
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
    columns, steps, more = w_shape[1], w_shape[0] * ceil(w_shape[2], ROW), 0
    if columns % 8:
        return None
    own = term(w_shape[0], w_shape[2], image, flip=1)
    other, other_image, pair = term(0, 0, None), None, False
    if extra is not None:
        (taps, _, width), extra_window, _ = extra
        pair = extra.pairs(w_shape, window)
        if not joins_dx(window, extra_window):
            return None
        other_image = None if extra_window.pointwise else image
        other = term(taps, width, other_image, flip=1)
        more = taps * ceil(width, ROW)
    tile = choose(False, positions, columns, steps, more, count, ALL, pair)
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


def term(taps: int, width: int, image, block: int = ALL, flip: int = 0) -> np.ndarray:
    """One of the two sums, as the kernel is told of it. width: channels a tap, of one block. block:
    columns that share one. flip: taps of w in reverse."""
    out = np.zeros((), _TERM)
    axes = 0 if image is None else len(image[0]) - 1
    for name, value in zip(_TERM.names or (), (taps, width, axes, block, flip), strict=True):
        out[name] = value
    return out


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
    tile = choose(False, positions, columns, 0, taps * ceil(outer, ROW), count, inner)
    if tile is None or columns % 8:
        return None
    return Plan(
        tile.launch(0), tile.grid(positions, columns, count), geometry,
        term(0, 0, None), term(taps, outer, image, inner, flip=1),
        (positions, columns, tile.band(count)), None, image,
        tile.boxes(0), tile, 0,
    )  # fmt: skip
