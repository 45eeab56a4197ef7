"""Plans of convolution launches: which kernel, which grid, which numbers, from shapes alone.

Three routes: tensor-core tiles (bf16), the same walk in plain arithmetic (f32, f64, for checking),
and one thread an output for groups of a few channels. Refused: shapes that do not fit the window,
2^31 positions or more.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from math import prod

import numpy as np

from ..arrays import bf16
from ..errors import ShapeError
from ..kernels import Kernel, kernel
from .window import Window

_FIELDS = ("from", "to", "kernel", "stride", "padding", "dilation")
GEOMETRY = np.dtype([(name, np.int32, 3) for name in _FIELDS])  # struct Geometry of conv_walk.cuh

_STAGES, TILE_K, THREADS = 4, 32, 128  # of conv_mma.cuh
_SIMT_THREADS, _SIMT_TILE = 256, 64
_DIRECT = 64  # channels in * out of a group up to which a matrix tile would be mostly empty
# Tile -> (blocks a multiprocessor holds, share of the big tile's speed by operand traffic: each
# step reads M + N to make M * N)
TILES = {(128, 128): (2, 1.0), (64, 64): (4, 0.65), (128, 32): (4, 0.5)}
_LARGEST = 2**31 - 2**16  # 32-bit position and pixel numbers, with room for the last tile


@dataclass(frozen=True)
class Plan:
    """A launch but for its arrays. shape: of the result. splits: partial sums to add up afterwards,
    each of `size`.
    """

    shape: tuple[int, ...]
    launch: Kernel
    grid: tuple[int, ...]
    block: tuple[int, ...]
    geometry: np.ndarray
    numbers: tuple[int, ...]
    shared: int = 0
    splits: int = 0
    size: int = 0
    # (kernel, grid, block, numbers) of conv_dw_sum; empty if the launch writes the result
    sum: tuple = ()


@functools.lru_cache(maxsize=4096)
def plan_conv(
    dtype, x_shape, w_shape, window: Window, x_aligned: bool, w_aligned: bool, processors: int
) -> Plan:
    n, space, channels = _split(x_shape, window, "x")
    inner, outer = _channels(channels, w_shape, window)
    out_space = window.out_space(space)
    shape = (n, *out_space, outer * window.groups)
    pixels, positions = n * prod(space), n * prod(out_space)
    geometry = geometry_of(window, space, out_space)
    copies = (8 if x_aligned and inner % 8 == 0 else 1, 8 if w_aligned and outer % 8 == 0 else 1)
    return _plan_gather(
        "conv", dtype, shape, geometry, window, (pixels, positions), inner, outer, copies,
        x_aligned and w_aligned, processors,
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def plan_dx(
    dtype,
    dy_shape,
    w_shape,
    window: Window,
    space,
    dy_aligned: bool,
    w_aligned: bool,
    processors: int,
) -> Plan:
    n, out_space, columns = _split(dy_shape, window, "dy")
    inner, outer = _channels(None, w_shape, window)
    if columns != outer * window.groups or out_space != window.out_space(space):
        expected = (n, *window.out_space(space), outer * window.groups)
        raise ShapeError(
            f"dy has shape {dy_shape}, expected {expected} for an input of extents {space}"
        )
    shape = (n, *space, inner * window.groups)
    pixels, positions = n * prod(out_space), n * prod(space)
    geometry = geometry_of(window, out_space, space)
    copies = (8, 8) if dy_aligned and w_aligned and outer % 8 == 0 else (1, 1)
    return _plan_gather(
        "conv_dx", dtype, shape, geometry, window, (pixels, positions), inner, outer, copies,
        dy_aligned and w_aligned, processors,
    )  # fmt: skip


def _plan_gather(
    op, dtype, shape, geometry, window, counts, inner, outer, copies, aligned, processors
) -> Plan:
    positions = _countable(*counts)
    groups = window.groups
    numbers = (positions, inner, outer, groups, int(window.shared))
    columns = inner if op == "conv_dx" else outer  # of the result, a group
    if direct(inner, outer, groups):
        width = 16 // dtype.itemsize
        depthwise = inner == outer == 1 and groups % width == 0 and aligned and not window.shared
        name = ("conv_depthwise" if depthwise else "conv_narrow") + op[len("conv") :]
        chunks = groups * columns // (width if depthwise else 1)
        across = min(32, 1 << (chunks - 1).bit_length())
        grid = (ceil(positions, 256 // across), ceil(chunks, across))
        return Plan(
            shape,
            kernel("conv.cu", name, dtype, DIRECT=1),
            grid,
            (across, 256 // across),
            geometry,
            numbers,
        )
    launch, block, shared, tile, _ = _tiled(
        op, dtype, copies, positions, columns, groups, processors
    )
    grid = (ceil(positions, tile[0]) * ceil(columns, tile[1]) * groups,)
    return Plan(shape, launch, grid, block, geometry, numbers, shared)


def direct(inner: int, outer: int, groups: int) -> bool:
    """Whether the groups are too narrow for tiles."""
    return groups > 1 and inner * outer <= _DIRECT


@functools.lru_cache(maxsize=4096)
def plan_dw(
    dtype, x_shape, dy_shape, window: Window, x_aligned: bool, dy_aligned: bool, processors: int
) -> Plan:
    n, space, _ = _split(x_shape, window, "x")
    shape = dw_shape(x_shape, dy_shape, window)
    inner, groups = shape[1], window.groups
    outer = dy_shape[-1] // groups
    out_space = window.out_space(space)
    if tuple(dy_shape) != (n, *out_space, groups * outer):
        raise ShapeError(f"dy has shape {dy_shape}, expected {(n, *out_space, groups * outer)}")
    positions = _countable(n * prod(space), n * prod(out_space))
    geometry = geometry_of(window, space, out_space)
    rows = window.taps * inner
    if direct(inner, outer, groups) and rows < 65536:
        blocks = ceil(groups * outer, 32)
        span, splits = _spans(positions, 16 * processors // (blocks * rows), least=64)
        total = sum_of_splits(dtype, splits, rows, groups if window.shared else 1, shape[2])
        launch = kernel("conv.cu", "conv_narrow_dw", dtype, DIRECT=1)
        numbers = (positions, inner, outer, groups, span)
        grid = (blocks, splits, rows)
        return Plan(
            shape, launch, grid, (32, 8), geometry, numbers, 0, splits, rows * groups * outer, total
        )
    own = 1 if window.shared else groups
    copies = (8 if x_aligned and inner % 8 == 0 else 1, 8 if dy_aligned and outer % 8 == 0 else 1)
    launch, block, shared, tile, slots = _tiled(
        "conv_dw", dtype, copies, rows, outer, own, processors
    )
    tiles = ceil(rows, tile[0]) * ceil(outer, tile[1]) * own
    span, splits = _spans(
        positions, slots // tiles, least=8 * TILE_K
    )  # 8 steps a split pay for the sum of the partials
    numbers = (positions, inner, outer, groups, int(window.shared), span)
    total = sum_of_splits(dtype, splits, rows, 1, shape[2]) if splits > 1 else ()
    grid = (tiles * splits,)
    return Plan(shape, launch, grid, block, geometry, numbers, shared, splits, prod(shape), total)


def _tiled(op, dtype, copies, rows, columns, groups, processors):
    """(kernel, block, shared bytes, tile, blocks that run at once) for a rows x columns product in
    each group.
    """
    if dtype != bf16:
        tile = (_SIMT_TILE, _SIMT_TILE)
        launch = kernel("conv.cu", op, dtype, TILE_M=tile[0], TILE_N=tile[1])
        return launch, (_SIMT_THREADS,), 0, tile, 2 * processors
    tile = choose_tile(rows, columns, groups, copies, processors)
    launch = kernel(
        "conv.cu", op, dtype, TILE_M=tile[0], TILE_N=tile[1], VEC_A=copies[0], VEC_B=copies[1]
    )
    return launch, (THREADS,), memory_of(tile), tile, TILES[tile][0] * processors


def memory_of(tile: tuple[int, int]) -> int:
    """Bytes of shared memory a block."""
    return _STAGES * (tile[0] + tile[1]) * TILE_K * 2


def choose_tile(
    rows: int, columns: int, groups: int, copies: tuple[int, int], processors: int, depth=None
) -> tuple[int, int]:
    """The tile with the least time on the busiest multiprocessor; one that reads elements has a
    single tile. depth: the steps of a tile, from its columns, where that makes a difference.
    """
    if copies != (8, 8):
        return (128, 32) if copies == (8, 1) else (64, 64)

    def time(tile):
        blocks = ceil(rows, tile[0]) * ceil(columns, tile[1]) * groups
        steps = depth(tile[1]) if depth else 1
        return ceil(blocks, processors) * tile[0] * tile[1] * steps / TILES[tile][1]

    return min(TILES, key=time)


def _spans(positions: int, splits: int, least: int) -> tuple[int, int]:
    """(positions a split, splits): about so many splits, of whole steps, of at least `least`
    positions, none empty.
    """
    splits = max(1, min(splits, positions // least, 65535))
    span = ceil(ceil(positions, splits), TILE_K) * TILE_K
    return span, ceil(positions, span)


def sum_of_splits(dtype, splits: int, rows: int, repeats: int, columns: int) -> tuple:
    """(kernel, grid, block, numbers) of the sum of partial weight gradients, in a fixed order."""
    launch = kernel("conv.cu", "conv_dw_sum", dtype, DIRECT=1)
    size, terms = rows * columns, splits * repeats
    # Threads an element: as its terms need (each has eight loads under way) where elements alone do
    # not fill a device of some 2^18 threads.
    shares = next((s for s in (32, 8) if terms >= 2 * s and size * s <= 1 << 19), 1)
    block = (256, 1) if shares == 1 else (32, shares)
    return launch, (ceil(size, block[0]),), block, (splits, rows, repeats, columns)


@functools.lru_cache(maxsize=4096)
def geometry_of(window: Window, read: tuple[int, ...], positions: tuple[int, ...]) -> np.ndarray:
    one = (1,) * (3 - window.axes)
    none = (0,) * (3 - window.axes)
    out = np.zeros((), GEOMETRY)
    values = (
        one + read,
        one + positions,
        one + window.kernel,
        one + window.stride,
        none + window.padding,
    )
    for name, value in zip(_FIELDS, (*values, one + window.dilation), strict=True):
        out[name] = value
    return out


def _split(shape, window: Window, name: str):
    if len(shape) != window.axes + 2:
        raise ShapeError(
            f"{name} has shape {shape}, expected (N, {window.axes} spatial axes, channels) "
            f"for {window}"
        )
    return shape[0], tuple(shape[1:-1]), shape[-1]


def _channels(channels: int | None, w_shape, window: Window) -> tuple[int, int]:
    """(channels in, channels out) of a group."""
    own = 1 if window.shared else window.groups
    inner = w_shape[1] if channels is None else channels // window.groups
    outer = w_shape[-1] // own
    if tuple(w_shape) != (window.taps, inner, outer * own) or (
        channels is not None and channels % window.groups
    ):
        raise ShapeError(
            f"w has shape {w_shape}, expected (taps {window.taps}, channels in a group {inner}, "
            f"a multiple of {own} columns)"
            + (
                f" for {channels} channels in {window.groups} groups"
                if channels is not None
                else ""
            )
        )
    if inner == 0 or outer == 0:
        raise ShapeError(f"w has shape {w_shape}: a convolution needs at least one channel")
    return inner, outer


def dw_shape(x_shape, dy_shape, window: Window) -> tuple[int, int, int]:
    groups = window.groups
    if x_shape[-1] % groups or dy_shape[-1] % groups:
        raise ShapeError(
            f"x has {x_shape[-1]} and dy {dy_shape[-1]} channels: {groups} groups must divide both"
        )
    return window.taps, x_shape[-1] // groups, dy_shape[-1] // (groups if window.shared else 1)


def _countable(pixels: int, positions: int) -> int:
    if max(pixels, positions) > _LARGEST:
        raise ShapeError(
            f"{max(pixels, positions)} positions are more than {_LARGEST}: split the batch"
        )
    return positions


def ceil(a: int, b: int) -> int:
    return -(-a // b)
