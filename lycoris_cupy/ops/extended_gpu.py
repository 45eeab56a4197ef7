"""The launch of the extended product on Hopper: x * w + scale * (x2 * w2) + add + bias, one
rounding.

A plan (tile, band, numbers) is made once for shapes; `plan_forward` and `plan_dx` give None for
what the kernel does not take: other chips and dtypes, rows that are no multiple of 16 bytes, groups
of the base weight, input gradients with a stride, blocks of x2 that no tile fits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from math import isqrt, prod
from typing import NamedTuple

import numpy as np

from ..arrays import Array, bf16
from ..kernels import Kernel, kernel
from ..tensor_map import NOTHING, ROW, matrix_map, pixel_map
from .conv_gpu import processors
from .conv_plan import geometry_of
from .window import Window

_TERM = np.dtype([(name, np.int32) for name in ("taps", "width", "axes", "block", "flip")])
_TILE_M, _THREADS = 256, 384
_SHARED = 226 * 1024  # sm_90 has 227 KiB for a block; the barriers stand in the rest
# TILE_N of the variants. 144 is for w whose rows run along the inner axis: along the columns it was
# 18 % slower than its size says (H100).
_TILES = {False: (64, 96, 128, 144, 160), True: (64, 96, 128, 160)}
_NARROW_BLOCKS = (40, 80)  # EXT_N of the variants whose tile of 160 holds several blocks
_L2_BYTES = 52  # a multiprocessor's share of L2 a cycle; 64 is the port's width
_WASTE = 0.3  # of the columns that are fetched and not read, as time
_END = 30  # cycles a column of a tile, to hand it over and to begin the next
_ALL = 1 << 30  # columns of a block where all columns share one


class Extra(NamedTuple):
    """The second sum: scale[0] * (x * w). shared: x holds a block of channels for each block of w's
    columns."""

    x: Array
    w: Array
    window: Window
    scale: Array | None


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
    cycles: float  # estimated


def run(plan: Plan, x, w, out, *, extra: Extra | None, add, bias) -> Array:
    """Write the sum into `out`, (positions, columns) in any shape, and return it."""
    x2, w2, scale = (extra.x, extra.w, extra.scale) if extra else (None, None, None)
    maps = (
        NOTHING if x is None else _map_x(x, plan.image),
        NOTHING if w is None else matrix_map(w.data.ptr, w.shape, plan.boxes[0]),
        NOTHING if x2 is None else _map_x(x2, plan.other_image),
        NOTHING if w2 is None else matrix_map(w2.data.ptr, w2.shape, plan.boxes[1]),
    )
    args = (*maps, scale, add, bias, out, plan.geometry, plan.own, plan.other, *plan.numbers)
    plan.launch(plan.grid, (_THREADS,), *args, shared=_SHARED)
    return out


def _map_x(x, image):
    if image is None:
        rows, channels = prod(x.shape[:-1]), x.shape[-1]
        return matrix_map(x.data.ptr, (rows, channels), (_TILE_M, ROW))
    shape, *corners = image
    return pixel_map(x.data.ptr, (*shape, x.shape[-1]), _TILE_M, *corners)


def takes(*arrays) -> bool:
    """Whether the copy engine can read these: bf16 on Hopper, contiguous (it is told an address and
    a shape alone), rows and addresses multiples of 16 bytes.
    """
    return all(a is None or _readable(a) for a in arrays) and hopper()


def _readable(a: Array) -> bool:
    contiguous = a.flags.c_contiguous and a.dtype == bf16 and a.size > 0
    return contiguous and a.shape[-1] % 8 == 0 and a.data.ptr % 16 == 0


def hopper() -> bool:
    """Whether the current device is an sm_90."""
    import cupy

    return _hopper(cupy.cuda.runtime.getDevice())


@functools.cache
def _hopper(device: int) -> bool:
    import cupy

    return cupy.cuda.Device(device).compute_capability == "90"


@functools.lru_cache(maxsize=4096)
def plan_forward(x_shape, w_shape, window: Window, extra, count: int) -> Plan | None:
    """The plan of x * w + x2 * w2.  extra: (shape of w2, its window) or None.  count:
    multiprocessors."""
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
    other, block, other_image = _term(0, 0, None), _ALL, None
    if extra is not None:
        (taps, width, block_columns), extra_window = extra
        if not extra_window.pointwise and extra_window.grouped(1) != window.grouped(1):
            return None
        if extra_window.groups > 1 and not extra_window.shared:
            return None
        block = block_columns if extra_window.groups > 1 else _ALL
        other_image = None if extra_window.pointwise else image
        other = _term(taps, width, other_image, block)
        more = taps * _ceil(width, ROW)
    choice = _choose(True, positions, columns, steps, more, count, block)
    if choice is None:
        return None
    tile_n, ext_n, cycles = choice
    defines = {"TILE_N": tile_n, "B_ROWS": 1} | ({"EXT_N": ext_n} if ext_n != tile_n else {})
    return Plan(
        kernel("extended.cu", "extended", bf16, **defines),
        _grid(positions, columns, tile_n, count), geometry, own, other,
        (positions, columns, _band(tile_n, count)), image, other_image,
        ((1, ROW, ROW), (1, ROW, ROW)), cycles,
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def plan_dx(g_shape, w_shape, window: Window, in_space, extra, count: int) -> Plan | None:
    """The plan of the input's gradient, g * w^T + g2 @ w2^T.  extra: the shape of w2, (1, inputs,
    width), or None."""
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
    other = _term(0, 0, None)
    if extra is not None:
        other = _term(1, extra[2], None)
        more = _ceil(extra[2], ROW)
    choice = _choose(False, positions, columns, steps, more, count, _ALL)
    assert choice is not None  # any tile serves where there are no blocks
    tile_n, _, cycles = choice
    return Plan(
        kernel("extended.cu", "extended", bf16, TILE_N=tile_n, B_ROWS=0),
        _grid(positions, columns, tile_n, count), geometry, own, other,
        (positions, columns, _band(tile_n, count)), image, None,
        ((1, tile_n, ROW), (1, tile_n, ROW)), cycles,
    )  # fmt: skip


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
    b_rows, positions, columns, own: int, other: int, count, block
) -> tuple[int, int, float] | None:
    """(TILE_N, EXT_N, cycles) with the least time on the busiest multiprocessor; None if the blocks
    fit no tile. own, other: steps of the two sums, of the second for one block.
    """
    choices = [(t, t) for t in _TILES[b_rows] if block == _ALL or block % t == 0]
    if block in _NARROW_BLOCKS:
        choices = [(160, block)]

    def step(width):
        wide = _ceil(width, ROW) * ROW if b_rows else width  # columns that are fetched
        waste = 1 + _WASTE * (wide / width - 1)
        return max(8 * width, (_TILE_M + wide) * ROW * 2 / _L2_BYTES) * waste

    def cycles(tile, ext):
        waves = _ceil(_ceil(positions, _TILE_M) * _ceil(columns, tile), count)
        return waves * (own * step(tile) + tile // ext * other * step(ext) + tile * _END)

    timed = ((tile, ext, cycles(tile, ext)) for tile, ext in choices)
    return min(timed, key=lambda c: c[2], default=None)


def _grid(positions, columns, tile, count) -> tuple[int]:
    return (min(_ceil(positions, _TILE_M) * _ceil(columns, tile), count),)


def _band(tile: int, count: int) -> int:
    # As many rows as columns of operands are then in use at a time.
    return max(1, isqrt(count * tile // _TILE_M))


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
    choice = _choose(False, positions, columns, 0, taps * _ceil(outer, ROW), count, inner)
    if choice is None or columns % 8:
        return None
    tile_n, ext_n, cycles = choice
    defines = {"TILE_N": tile_n, "B_ROWS": 0} | ({"EXT_N": ext_n} if ext_n != tile_n else {})
    return Plan(
        kernel("extended.cu", "extended", bf16, **defines),
        _grid(positions, columns, tile_n, count), geometry,
        _term(0, 0, None), _term(taps, outer, image, inner, flip=1),
        (positions, columns, _band(tile_n, count)), None, image,
        ((1, tile_n, ROW), (1, ext_n, ROW)), cycles,
    )  # fmt: skip


def blocks_dx(g, w, window: Window, in_space, *, scale, add) -> Array:
    """add + scale * the gradient of x where groups share w. Only where `plan_blocks_dx` says so."""
    import cupy

    shapes = tuple(g.shape), tuple(w.shape)
    plan = plan_blocks_dx(*shapes, window, tuple(in_space), processors())
    assert plan is not None
    out = cupy.empty((g.shape[0], *in_space, w.shape[1] * window.groups), g.dtype)
    return run(plan, None, None, out, extra=Extra(g, w, window, scale), add=add, bias=None)


def extended_forward(x, w, window: Window, *, extra: Extra | None, add, bias) -> Array:
    """x * w + extra + add + bias, in the dtype of x.  Only where `takes` and `plan_forward` say
    so."""
    import cupy

    shapes = None if extra is None else (tuple(extra.w.shape), extra.window)
    plan = plan_forward(tuple(x.shape), tuple(w.shape), window, shapes, processors())
    assert plan is not None
    space = window.out_space(x.shape[1:-1]) if window.axes else x.shape[1:-1]
    shape = (*x.shape[:1], *space, w.shape[2]) if x.ndim > 1 else (w.shape[2],)
    return run(plan, x, w, cupy.empty(shape, x.dtype), extra=extra, add=add, bias=bias)


def extended_dx(g, w, window: Window, in_space, *, extra: Extra | None, add) -> Array:
    """g * w^T + extra + add, (N, *in_space, C). extra: x (positions, R) and w (1, C, R). As above,
    by `plan_dx`."""
    import cupy

    shape = None if extra is None else tuple(extra.w.shape)
    plan = plan_dx(tuple(g.shape), tuple(w.shape), window, tuple(in_space), shape, processors())
    assert plan is not None
    space = tuple(in_space) if window.axes else g.shape[1:-1]
    out = (*g.shape[:1], *space, w.shape[1]) if g.ndim > 1 else (w.shape[1],)
    return run(plan, g, w, cupy.empty(out, g.dtype), extra=extra, add=add, bias=None)
