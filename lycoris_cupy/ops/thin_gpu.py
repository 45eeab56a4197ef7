"""Both gradients of a thin product, whose w has a few rows, from one read of g on a GPU; with a
scale of the columns beside it also the gradients of that.

    y = x * w          dx = scale * g @ w^T,  dw = scale * x^T @ g
    y = c * z + ...    gc = c * g,  dc = sum over rows of g * z

g is as wide as the layer: read by a product for each of these it would cost more than all else that
an adapter does. See cuda_src/thin.cu.
"""

from __future__ import annotations

import functools
from math import prod
from typing import NamedTuple

from ..arrays import Array, bf16, f32
from ..kernels import Kernel, kernel
from .aligned import aligned
from .conv_gpu import processors
from .window import Window

_ROWS, _WARPS, _BLOCKS = 32, 4, 2  # rows of a tile, warps of a block, blocks on a multiprocessor
_SLICES = {  # of 16 columns a warp, by (ranks, scaled): what fits the registers
    (16, False): (6, 5),
    (32, False): (6, 5),
    (16, True): (5, 4),
    (32, True): (4,),
}
_LEAST = 1024  # rows: fewer are read from L2 whatever is done


class Gradients(NamedTuple):
    """dx as x, dw (1, R, N) f32; gc as g and dc (N,) f32 where there is a c, else None."""

    dx: Array
    dw: Array
    gc: Array | None
    dc: Array | None


class _Plan(NamedTuple):
    launch: Kernel
    total: Kernel
    grid: tuple[int, int]
    span: int
    shared: int


def pays(g: Array, w: Array) -> bool:
    """Whether one read of g is faster than two products: with more than 16 ranks only where the
    second one does not find g in L2 (H100: 31 us to 25 at 4608 x 3072, 65 to 91 at 4608 x 12288).
    """
    return w.shape[1] <= 16 or g.nbytes > 48 << 20


def thin_seconds(moved: int) -> float:
    """Estimated of both gradients, of up to 16 ranks, by a g of so many bytes (H100: 25.2 us for 28
    MB, 54.6 for 113)."""
    return 15.5e-6 + moved / 2.9e12


def thin_gradients(
    g: Array, x: Array, w: Array, window: Window, scale: Array | None,
    c: Array | None = None, z: Array | None = None,
) -> Gradients | None:  # fmt: skip
    """See Gradients. g: (..., N), x: (..., R), w: (1, R, N), bf16. c: (N,) f32, z: like g. scale:
    (1,) f32 or None.

    None for what the kernel does not take: other dtypes, walks over space, groups, more than 32
    ranks, rows that are no multiple of 16 bytes.
    """
    import cupy

    if not (window.pointwise and window.groups == 1) or not aligned(g, x, w, z):
        return None
    rows, columns, ranks = prod(g.shape[:-1]), g.shape[-1], w.shape[1]
    plan = _plan(rows, columns, ranks, c is not None, processors())
    if plan is None:
        return None
    chunks, strips = plan.grid
    dx_parts = cupy.empty((chunks, rows, ranks), f32) if chunks > 1 else None
    dw_parts = cupy.empty((strips, ranks, columns), f32)
    dx, dw = cupy.empty(x.shape, bf16), cupy.empty((1, ranks, columns), f32)
    gc = dc = dc_parts = None
    if c is not None:
        gc, dc = cupy.empty(g.shape, bf16), cupy.empty((columns,), f32)
        dc_parts = cupy.empty((strips, columns), f32)
    args = (g, x, w, c, z, scale, dx_parts, dx, dw_parts, gc, dc_parts)
    args += (rows, columns, ranks, plan.span)
    plan.launch(plan.grid, (32 * _WARPS,), *args, shared=plan.shared)
    thin_blocks = -(-rows * ranks // 256) if chunks > 1 else 0
    shares = 8 if strips >= 64 else 1  # threads an element of dw
    blocks = thin_blocks + -(-(ranks + (c is not None)) * columns // (256 // shares))
    plan.total(
        (blocks,), (256,), dx_parts, dw_parts, dc_parts, scale, dx, dw, dc,
        rows, columns, ranks, chunks, strips, thin_blocks, shares,
    )  # fmt: skip
    return Gradients(dx, dw, gc, dc)


@functools.lru_cache(maxsize=4096)
def _plan(rows: int, columns: int, ranks: int, scaled: bool, count: int) -> _Plan | None:
    """count: multiprocessors."""
    if ranks > 32 or rows < _LEAST:
        return None
    width = 16 if ranks <= 16 else 32

    def chunk(slices):
        return 16 * _WARPS * slices

    # The columns past the last one are the waste; among equals the wider chunk has fewer parts.
    slices = min(_SLICES[width, scaled], key=lambda s: -(-columns // chunk(s)) * chunk(s))
    chunks, tiles = -(-columns // chunk(slices)), -(-rows // _ROWS)
    span = -(-tiles // max(1, min(tiles, _BLOCKS * count // chunks)))
    strips = -(-tiles // span)
    tile = _ROWS * chunk(slices) * 2
    shared = (2 * (2 * tile + _ROWS * width * 2)) if scaled else 3 * (tile + _ROWS * width * 2)
    defines = {"RANKS": width, "SLICES": slices, "SCALED": int(scaled)}
    launch, total = (kernel("thin.cu", op, bf16, **defines) for op in ("thin", "thin_sum"))
    return _Plan(launch, total, (chunks, strips), span, shared)
