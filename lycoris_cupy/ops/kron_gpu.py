"""The launches of the kernels that apply a Kronecker product in one piece, cuda_src/kron_conv.cu
and kron_conv_dw.cu: the product, its gradients for x and w1 in one launch, and that for w2.

For 4 or 8 blocks on either side whose widths are multiples of 8, over two axes or single positions,
with a stride of 1. Plans are made once for shapes.
"""

from __future__ import annotations

import functools
from math import prod
from typing import NamedTuple

import numpy as np

from .. import plan
from ..arrays import Array, bf16, f32
from ..kernels import Kernel, kernel
from .aligned import aligned
from .columns import column_sum
from .conv_gpu import processors
from .conv_plan import geometry_of, sum_of_splits
from .window import Window

_TILES = {8: (5, 4, 3, 2), 4: (8, 5, 4, 3, 2)}  # of 8 columns, by blocks: what registers hold
_DW_TILES = (5, 4, 3, 2)
_SIDE = 8  # a piece is 8 x 8 positions
_DW_TAPS = 3  # times 16 rows, taps by channels, that a warp of the weight's gradient holds
_THREADS, _DW_THREADS = 128, 512
_SHARED = 111 * 1024  # two blocks on a multiprocessor
# Channels a block up to which mixing first is slower, where w2 walks over several taps: at 160 the
# products of Hopper's warpgroups win, at one tap they do at any width (H100: benchmarks/NOTES.md).
_WIDEST = 80


class _Plan(NamedTuple):
    launch: Kernel
    grid: tuple[int, int]
    geometry: np.ndarray
    numbers: tuple[
        int, ...
    ]  # pixels, positions, pieces, channels in, channels out, blocks out, part
    shared: int


def prefers(x, w1, w2: tuple[int, int, int], window: Window) -> bool:
    """Whether this is the faster way, and possible. w2: its shape."""
    if window.taps == 1 or max(w2[1:]) > _WIDEST or not takes(x, w1, w2, window):
        return False
    space = window.out_space(x.shape[1:-1]) if window.axes else x.shape[1:-1]
    positions = prod((*x.shape[:-1][:1], *space))
    operations = 2 * positions * prod(w2) * w1.shape[1]
    moved = (x.size + positions * w1.shape[0] * w2[2]) * x.dtype.itemsize
    seconds = max(plan.portable(operations), plan.moving(moved))
    what = f"x {tuple(x.shape)} * (w1 {tuple(w1.shape)} kron w2 {w2})"
    plan.choose(what, {"kron": seconds}, operations, moved)
    return True


def takes(x, w1, w2: tuple[int, int, int], window: Window, *others) -> bool:
    """Whether the kernels take these, and all three have a plan. w2: its shape. others: w2 itself,
    add, or the gradient of y."""
    if not aligned(x, *others) or w1.dtype != bf16 or not w1.flags.c_contiguous:
        return False
    if max(a.size for a in (x, *others) if a is not None) >= 2**31:
        return False
    return all(_plans(tuple(x.shape), tuple(w1.shape), w2, window, processors()))


def kron_conv(x, w1, w2, window: Window, *, scale, add) -> Array:
    """add + scale * (x * kron(w1, w2)), rounded once."""
    import cupy

    p = _plans(tuple(x.shape), tuple(w1.shape), tuple(w2.shape), window, processors())[0]
    assert p is not None
    space = window.out_space(x.shape[1:-1]) if window.axes else x.shape[1:-1]
    columns = w1.shape[0] * w2.shape[2]
    y = cupy.empty((*x.shape[:1], *space, columns) if x.ndim > 1 else (columns,), x.dtype)
    args = (x, w1, w2, scale, add, None, y, None, p.geometry, *p.numbers)
    p.launch(p.grid, (_THREADS,), *args, shared=p.shared)
    return y


def kron_gradients(
    g, x, w1, w2, window: Window, in_space, *, scale, both: bool
) -> tuple[Array, Array | None]:
    """The gradients of kron_conv for x, and, if both, for w1, (L, M) f32."""
    import cupy

    p = _plans(tuple(x.shape), tuple(w1.shape), tuple(w2.shape), window, processors())[1]
    assert p is not None
    dx = cupy.empty(x.shape, x.dtype)
    dots = cupy.empty((prod(p.grid), w1.size), f32) if both else None
    args = (g, w1, w2, scale, None, x if both else None, dx, dots, p.geometry, *p.numbers)
    p.launch(p.grid, (_THREADS,), *args, shared=p.shared)
    return dx, None if dots is None else column_sum(dots).reshape(w1.shape)


def kron_conv_dw(x, g, w1, w2, window: Window, *, scale) -> Array:
    """The gradient of kron_conv for w2, (taps, N, K) f32."""
    import cupy

    p = _plans(tuple(x.shape), tuple(w1.shape), tuple(w2.shape), window, processors())[2]
    assert p is not None
    taps, inner, outer = w2.shape
    parts, dw = cupy.empty((p.grid[0], *w2.shape), f32), cupy.empty(w2.shape, f32)
    args = (x, g, w1, parts, p.geometry, *p.numbers)
    p.launch(p.grid, (_DW_THREADS,), *args, shared=p.shared)
    total, grid, block, numbers = sum_of_splits(bf16, p.grid[0], taps * inner, 1, outer)
    total(grid, block, parts, scale, dw, *numbers)
    return dw


@functools.lru_cache(maxsize=4096)
def _plans(x, w1, w2, window: Window, count: int) -> tuple[_Plan | None, ...]:
    """Of the product, of its gradients for x and w1, and of that for w2; None for what no kernel
    does. count: multiprocessors."""
    (outs, blocks), (_, inner, outer) = w1, w2
    walk = _walk(x, window)
    if walk is None or not {outs, blocks} <= set(_TILES) or inner % 8 or outer % 8:
        return None, None, None
    images, space, to, walk_window = walk
    reach = [d * (k - 1) for d, k in zip(walk_window.dilation, walk_window.kernel, strict=True)]
    back = Window(
        walk_window.kernel,
        walk_window.stride,
        tuple(r - p for r, p in zip(reach, walk_window.padding, strict=True)),
        walk_window.dilation,
    )
    pixels = prod(x[:-1])
    positions = images * prod(to) if window.axes and not window.pointwise else pixels
    ends = pixels, positions
    return (
        _plan_conv(walk_window, images, space, to, ends, blocks, outs, inner, outer, 0, count),
        _plan_conv(back, images, to, space, ends[::-1], outs, blocks, outer, inner, 1, count),
        _plan_dw(walk_window, images, space, to, ends, blocks, outs, inner, outer, count),
    )


def _walk(x, window: Window):
    """(images, extents of x, of y, a window over two axes); None for what no kernel does. Single
    positions are rows of eight pixels of one image.
    """
    if window.groups != 1 or any(s != 1 for s in window.stride):
        return None
    if window.pointwise:
        rows = -(-prod(x[:-1]) // _SIDE), _SIDE
        return 1, rows, rows, Window.of((1, 1))
    if window.axes != 2:
        return None
    space, to = tuple(x[1:-1]), window.out_space(x[1:-1])
    # Pieces that lie half outside make twice the work.
    whole = all(2 * n >= -(-n // _SIDE) * _SIDE for n in (*space, *to))
    return (x[0], space, to, window) if whole else None


def _pieces(images: int, to) -> int:
    return images * prod(-(-n // _SIDE) for n in to)


def _piece_pixels(window: Window) -> int:
    down, across = window.dilation
    return (_SIDE + down * (window.kernel[0] - 1)) * (_SIDE + across * (window.kernel[1] - 1))


def _row(chunks: int) -> int:
    """Bytes of a row in shared memory: odd_row of kron_conv.cuh."""
    return (chunks | 1) * 16


def _plan_conv(
    window, images, space, to, ends, blocks, outs, inner, outer, turned, count
) -> _Plan | None:
    tiles = next((t for t in _TILES[blocks] if outer % (8 * t) == 0), None)
    if tiles is None:
        return None

    def shared(part):
        pairs = -(-window.taps * part // 16)
        weight = 8 * tiles * _row(2 * pairs) if turned else 16 * pairs * _row(tiles)
        image = _piece_pixels(window) * _row(blocks * part // 8)
        lists = 16 * pairs + 4 * blocks * part // 8
        if turned:  # z takes the place of the image
            image = max(image, _SIDE * _SIDE * _row(outs * tiles))
            lists += 4 * outs * tiles
        return -(-lists // 16) * 16 + weight + image

    part = _part(inner, lambda part: shared(part) <= _SHARED)
    if part is None:
        return None
    passes, pieces = outer // (8 * tiles), _pieces(images, to)
    launch = kernel("kron_conv.cu", "kron_conv", bf16, BLOCKS=blocks, TILES=tiles, TURNED=turned)
    grid = (min(pieces, max(1, 2 * count // passes)), passes)
    numbers = (*ends, pieces, inner, outer, outs, part)
    return _Plan(launch, grid, geometry_of(window, space, to), numbers, shared(part))


def _plan_dw(window, images, space, to, ends, blocks, outs, inner, outer, count) -> _Plan | None:
    tiles = next((t for t in _DW_TILES if outer % (8 * t) == 0), None)
    if tiles is None:
        return None
    # Taps one below the other, one row apart, share what is loaded of the image.
    down = 3 if window.kernel[0] == 3 and window.dilation[0] == 1 else 1

    def warps(part):  # that hold one sum between them
        return -(-window.taps * part // (16 * _DW_TAPS))

    def shared(part):
        pairs = -(-window.taps // down * part // 16)
        image = _piece_pixels(window) * _row(blocks * part // 8)
        flow = _SIDE * _SIDE * _row(max(blocks, outs) * tiles)
        lists = 8 * pairs + 4 * (blocks * part // 8 + outs * tiles)
        groups = min(_DW_THREADS // 32 // warps(part), blocks)
        sums = (groups - 1) * warps(part) * _DW_TAPS * tiles * 512  # all but one, at the end
        return max(-(-lists // 16) * 16 + 2 * (image + flow), sums)

    most = _shared_of_one_block()

    def fits(part):
        return warps(part) <= _DW_THREADS // 32 and shared(part) <= most

    part = _part(inner, fits)
    if part is None:
        return None
    passes, pieces = inner // part * (outer // (8 * tiles)), _pieces(images, to)
    launch = kernel("kron_conv_dw.cu", "kron_conv_dw", bf16, DOWN=down, TILES=tiles)
    grid = (min(pieces, max(1, count // passes)), passes)
    numbers = (*ends, pieces, inner, outer, blocks, outs, part)  # with the blocks of x
    return _Plan(launch, grid, geometry_of(window, space, to), numbers, shared(part))


def _shared_of_one_block() -> int:
    """Bytes of shared memory that a block may ask for on the current device."""
    import cupy

    # cudaDevAttrMaxSharedMemoryPerBlockOptin
    return cupy.cuda.runtime.deviceGetAttribute(97, cupy.cuda.runtime.getDevice())


def _part(inner: int, fits) -> int | None:
    """The most channels of a block at a time: a divisor of `inner`, whole chunks of 8."""
    parts = (p for p in range(inner, 7, -8) if inner % p == 0)
    return next((p for p in parts if fits(p)), None)
