"""The launch of a convolution's weight gradient on Hopper, cuda_src/outer.cu.

A plan is made once for shapes; `plan_outer` gives None for what the kernel does not take: groups
with columns of their own or of a few inputs, walks that the copy engine does not know, one
position each.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from math import prod

import numpy as np

from ..arrays import Array, bf16, f32
from ..kernels import Kernel, kernel
from ..tensor_map import ROW, matrix_map, pixel_map
from .conv_gpu import processors
from .conv_plan import sum_of_splits
from .extended_plan import walk_of
from .window import Window

_LEAST = 32  # inputs of a group; 64 rows of fewer would be mostly empty
_TILES = [(workers, columns) for workers in (2, 3) for columns in (40, 64, 80, 128, 160)]
_TILE_K = 64
_SHARED = 226 * 1024  # sm_90 has 227 KiB for a block; the barriers stand in the rest

# Cycles of 1.42 GHz.
_BYTES = 45  # copied a cycle by one multiprocessor: 32 KiB in 720 cycles, measured at 64 channels
_BEGIN = 2500  # of a block until its first product, and from its last one on
_PARTS = 2600  # bytes of splits a cycle, written and read again, mostly in L2
_SUM = 2800  # one more launch


@dataclass(frozen=True)
class Plan:
    """A launch but for its arrays. sum: of the splits, as `conv_plan` gives it; empty for one."""

    shape: tuple[int, int, int]
    launch: Kernel
    grid: tuple[int]
    threads: int
    geometry: np.ndarray
    image: tuple
    numbers: tuple[int, ...]
    splits: int
    sum: tuple


def outer_dw(x, g, window: Window, plan: Plan, *, scale) -> Array:
    """scale * the gradient of conv's w, (taps, I, O) in f32."""
    import cupy

    shape, *corners = plan.image
    x_map = pixel_map(x.data.ptr, (*shape, x.shape[-1]), _TILE_K, *corners)
    rows = prod(g.shape[:-1])
    g_map = matrix_map(g.data.ptr, (rows, g.shape[-1]), (_TILE_K, ROW))
    dw = cupy.empty(plan.shape, f32)
    out = dw if plan.splits == 1 else cupy.empty((plan.splits, *plan.shape), f32)
    own = scale if plan.splits == 1 else None
    args = (x_map, g_map, own, out, plan.geometry, *plan.numbers)
    plan.launch(plan.grid, (plan.threads,), *args, shared=_SHARED)
    if plan.splits > 1:
        total, grid, block, numbers = plan.sum
        total(grid, block, out, scale, dw, *numbers)
    return dw


def plan_for(x, g, window: Window) -> Plan | None:
    """The plan for these arrays, which `extended_gpu.takes`."""
    return plan_outer(tuple(x.shape), tuple(g.shape), window, processors())


@functools.lru_cache(maxsize=4096)
def plan_outer(x_shape, g_shape, window: Window, count: int) -> Plan | None:
    """count: multiprocessors."""
    groups = window.groups
    if window.pointwise or (groups > 1 and not window.shared):
        return None
    space, to = tuple(x_shape[1:-1]), tuple(g_shape[1:-1])
    image, geometry = walk_of(window, x_shape[0], space, to, window.padding, window.stride)
    inner, outer = x_shape[-1] // groups, g_shape[-1] // groups
    if image is None or geometry is None or outer % 2 or inner < _LEAST:
        return None
    positions = g_shape[0] * prod(to)
    chunks, units = -(-positions // _TILE_K), window.taps * -(-inner // 64)
    size = window.taps * inner * outer * 4

    def tiles(choice):
        return -(-units // choice[0]) * -(-outer // choice[1])

    def cycles(choice):  # of all rounds of blocks, each as long as a split; and of the splits' sum
        (workers, columns), splits = choice
        copies = (workers + -(-columns // 64)) * _TILE_K * ROW * 2 / _BYTES
        steps = -(-chunks // splits) * groups * max(workers * 2 * columns, copies)
        total = _SUM + 2 * splits * size / _PARTS if splits > 1 else 0
        return -(-tiles(choice[0]) * splits // count) * (steps + _BEGIN) + total

    counts = range(1, max(1, min(chunks // 4, 64)) + 1)
    tile, splits = min(itertools.product(_TILES, counts), key=cycles)
    span = -(-chunks // splits) * _TILE_K
    splits = -(-positions // span)
    shape = (window.taps, inner, outer)
    axes = len(image[0]) - 1
    numbers = (axes, inner, outer, groups, positions, span)
    total = sum_of_splits(bf16, splits, window.taps * inner, 1, outer) if splits > 1 else ()
    launch = kernel("outer.cu", "outer", bf16, WORKERS=tile[0], TILE_N=tile[1])
    grid, threads = (tiles(tile) * splits,), 128 * (tile[0] + 1)
    return Plan(shape, launch, grid, threads, geometry, image, numbers, splits, total)
