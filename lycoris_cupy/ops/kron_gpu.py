"""The launches of the kernels that apply a Kronecker product in one piece, cuda_src/kron_conv.cu
and kron_conv_dw.cu: the product, its gradients for x and w1 in one launch, and that for w2.

For 4 or 8 blocks on either side whose widths are multiples of 8, and several taps over two axes
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
_GROUPS = 2  # of a block, each with a piece of its own
_THREADS, _DW_THREADS = 128 * _GROUPS, 512
# Channels a block up to which mixing first is slower: at 160 the products of Hopper's warpgroups
# win, at one tap they do at any width (H100: benchmarks/NOTES.md).
_WIDEST = 80


class _Plan(NamedTuple):
    launch: Kernel
    grid: tuple[int, int]
    geometry: np.ndarray
    numbers: tuple[int, ...]  # of the kernel, from `pixels` on
    shared: int


class _Walk(NamedTuple):
    """What is read and written: images, their extents, and the blocks of channels on both sides."""

    window: Window
    images: int
    space: tuple[int, ...]  # two extents
    to: tuple[int, ...]
    pixels: int
    positions: int
    blocks: int
    outs: int
    inner: int  # channels of a block
    outer: int  # columns of a block of the output

    @property
    def pieces(self) -> int:
        return self.images * prod(-(-n // _SIDE) for n in self.to)

    @property
    def piece_pixels(self) -> int:
        """Of a piece with its halo."""
        reach = (d * (k - 1) for d, k in zip(self.window.dilation, self.window.kernel, strict=True))
        return prod(_SIDE + r for r in reach)

    def back(self) -> _Walk:
        """The walk of the gradient of what is read."""
        window = self.window
        reach = [d * (k - 1) for d, k in zip(window.dilation, window.kernel, strict=True)]
        padding = tuple(r - p for r, p in zip(reach, window.padding, strict=True))
        return _Walk(
            Window(window.kernel, window.stride, padding, window.dilation),
            self.images, self.to, self.space, self.positions, self.pixels,
            self.outs, self.blocks, self.outer, self.inner,
        )  # fmt: skip


def prefers(x, w1, w2: tuple[int, int, int], window: Window) -> bool:
    """Whether this is the faster way, and possible. w2: its shape."""
    if max(w2[1:]) > _WIDEST or not takes(x, w1, w2, window):
        return False
    positions = prod((x.shape[0], *window.out_space(x.shape[1:-1])))
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
    return all(_plans(tuple(x.shape), tuple(w1.shape), w2, window, *_device()))


def kron_conv(x, w1, w2, window: Window, *, scale, add) -> Array:
    """add + scale * (x * kron(w1, w2)), rounded once."""
    import cupy

    p = _plans(tuple(x.shape), tuple(w1.shape), tuple(w2.shape), window, *_device())[0]
    assert p is not None
    space, columns = window.out_space(x.shape[1:-1]), w1.shape[0] * w2.shape[2]
    y = cupy.empty((x.shape[0], *space, columns), x.dtype)
    args = (x, w1, w2, scale, add, y, None, p.geometry, *p.numbers)
    p.launch(p.grid, (_THREADS,), *args, shared=p.shared)
    return y


def kron_gradients(
    g, x, w1, w2, window: Window, in_space, *, scale, both: bool
) -> tuple[Array, Array | None]:
    """The gradients of kron_conv for x, and, if both, for w1, (L, M) f32."""
    import cupy

    p = _plans(tuple(x.shape), tuple(w1.shape), tuple(w2.shape), window, *_device())[1]
    assert p is not None
    dx = cupy.empty(x.shape, x.dtype)
    dots = cupy.empty((prod(p.grid), w1.size), f32) if both else None
    args = (g, w1, w2, scale, x if both else None, dx, dots, p.geometry, *p.numbers)
    p.launch(p.grid, (_THREADS,), *args, shared=p.shared)
    return dx, None if dots is None else column_sum(dots).reshape(w1.shape)


def kron_conv_dw(x, g, w1, w2, window: Window, *, scale) -> Array:
    """The gradient of kron_conv for w2, (taps, N, K) f32."""
    import cupy

    p = _plans(tuple(x.shape), tuple(w1.shape), tuple(w2.shape), window, *_device())[2]
    assert p is not None
    taps, inner, outer = w2.shape
    parts, dw = cupy.empty((p.grid[0], *w2.shape), f32), cupy.empty(w2.shape, f32)
    args = (x, g, w1, parts, p.geometry, *p.numbers)
    p.launch(p.grid, (_DW_THREADS,), *args, shared=p.shared)
    total, grid, block, numbers = sum_of_splits(bf16, p.grid[0], taps * inner, 1, outer)
    total(grid, block, parts, scale, dw, *numbers)
    return dw


@functools.lru_cache(maxsize=4096)
def _plans(x, w1, w2, window: Window, count: int, most: int) -> tuple[_Plan | None, ...]:
    """Of the product, of its gradients for x and w1, and of that for w2; None for what no kernel
    does. count: multiprocessors. most: bytes of shared memory that a block may have."""
    walk = _walk(x, w1, w2, window)
    if walk is None:
        return None, None, None
    forward, back = _plan_conv(walk, 0, count, most), _plan_conv(walk.back(), 1, count, most)
    return forward, back, _plan_dw(walk, count, most)


def _walk(x, w1, w2, window: Window) -> _Walk | None:
    """None for what no kernel does, and for single positions, where mixing first wins."""
    (outs, blocks), (_, inner, outer) = w1, w2
    if not {outs, blocks} <= set(_TILES) or inner % 8 or outer % 8:
        return None
    if window.axes != 2 or window.pointwise or window.groups != 1 or window.stride != (1, 1):
        return None
    space, to = tuple(x[1:-1]), window.out_space(x[1:-1])
    # Pieces that lie half outside make twice the work.
    if any(2 * n < -(-n // _SIDE) * _SIDE for n in (*space, *to)):
        return None
    pixels, positions = x[0] * prod(space), x[0] * prod(to)
    return _Walk(window, x[0], space, to, pixels, positions, blocks, outs, inner, outer)


def _device() -> tuple[int, int]:
    """(multiprocessors, bytes of shared memory that a block may have) of the current device."""
    import cupy

    device = cupy.cuda.runtime.getDevice()
    return processors(), _shared_of(device)


@functools.cache
def _shared_of(device: int) -> int:
    import cupy

    # cudaDevAttrMaxSharedMemoryPerBlockOptin, less what the kernels declare themselves
    return cupy.cuda.runtime.deviceGetAttribute(97, device) - 2560


def _row(chunks: int) -> int:
    """Bytes of a row in shared memory: odd_row of kron_conv.cuh."""
    return (chunks | 1) * 16


def _plan_conv(walk: _Walk, turned: int, count: int, most: int) -> _Plan | None:
    window, blocks, outs = walk.window, walk.blocks, walk.outs

    def shared(tiles, part):
        pairs = -(-window.taps * part // 16)
        weight = 8 * tiles * _row(2 * pairs) if turned else 16 * pairs * _row(tiles)
        lists = 16 * pairs + 4 * blocks * part // 8
        image = walk.piece_pixels * _row(blocks * part // 8)
        slots = 16 * 4 * _row(2 * tiles)  # of 16 positions a warp, and two blocks of the output
        return -(-lists // 16) * 16 + walk.inner // part * weight + _GROUPS * (image + slots)

    for tiles in (t for t in _TILES[blocks] if walk.outer % (8 * t) == 0):
        part = _part(walk.inner, lambda part, tiles=tiles: shared(tiles, part) <= most)
        if part is not None:
            break
    else:
        return None
    passes, pieces = walk.outer // (8 * tiles), walk.pieces
    launch = kernel("kron_conv.cu", "kron_conv", bf16, BLOCKS=blocks, TILES=tiles, TURNED=turned)
    grid = (min(pieces, max(1, count // passes)), passes)
    numbers = (walk.pixels, walk.positions, pieces, walk.inner, walk.outer, outs, part)
    geometry = geometry_of(window, walk.space, walk.to)
    return _Plan(launch, grid, geometry, numbers, shared(tiles, part))


def _plan_dw(walk: _Walk, count: int, most: int) -> _Plan | None:
    window, blocks, outs = walk.window, walk.blocks, walk.outs
    tiles = next((t for t in _DW_TILES if walk.outer % (8 * t) == 0), None)
    if tiles is None:
        return None
    # Taps one below the other, one row apart, share what is loaded of the image.
    down = 3 if window.kernel[0] == 3 and window.dilation[0] == 1 else 1

    def warps(part):  # that hold one sum between them
        return -(-window.taps * part // (16 * _DW_TAPS))

    def shared(part):
        pairs = -(-window.taps // down * part // 16)
        image = walk.piece_pixels * _row(blocks * part // 8)
        flow = _SIDE * _SIDE * _row(max(blocks, outs) * tiles)
        lists = 8 * pairs + 4 * (blocks * part // 8 + outs * tiles)
        groups = min(_DW_THREADS // 32 // warps(part), blocks)
        sums = (groups - 1) * warps(part) * _DW_TAPS * tiles * 512  # all but one, at the end
        return max(-(-lists // 16) * 16 + 2 * (image + flow), sums)

    def fits(part):
        return warps(part) <= _DW_THREADS // 32 and shared(part) <= most

    part = _part(walk.inner, fits)
    if part is None:
        return None
    passes, pieces = walk.inner // part * (walk.outer // (8 * tiles)), walk.pieces
    launch = kernel("kron_conv_dw.cu", "kron_conv_dw", bf16, DOWN=down, TILES=tiles)
    grid = (min(pieces, max(1, count // passes)), passes)
    numbers = (walk.pixels, walk.positions, pieces, walk.inner, walk.outer, blocks, outs, part)
    return _Plan(launch, grid, geometry_of(window, walk.space, walk.to), numbers, shared(part))


def _part(inner: int, fits) -> int | None:
    """The most channels of a block at a time: a divisor of `inner`, whole chunks of 8."""
    parts = (p for p in range(inner, 7, -8) if inner % p == 0)
    return next((p for p in parts if fits(p)), None)
