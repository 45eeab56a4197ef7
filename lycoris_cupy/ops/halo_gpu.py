"""The launch of a convolution to at most 16 columns that reads each pixel once, cuda_src/halo.cu.

For images that have pieces enough to fill the GPU; smaller ones are better off as one product.
"""

from __future__ import annotations

from math import prod

from ..arrays import Array, bf16
from ..kernels import kernel
from .aligned import aligned
from .conv_gpu import processors
from .conv_plan import geometry_of
from .window import Window

_DOWN, _ACROSS, _STAGES, _THREADS = 8, 32, 3, 256
_PIXELS = 512  # of a piece with its halo
_SHARED = 112 * 1024  # two blocks on a multiprocessor


def takes_halo(x, w, window: Window, *others, least: int | None = None) -> bool:
    """Whether the kernel takes these. x: (N, H, W, C). w: (taps, C, R). least: pieces (by default
    more than the multiprocessors)."""
    if (
        window.axes != 2
        or window.groups != 1
        or window.stride != (1, 1)
        or w.shape[2] not in (8, 16)
    ):
        return False
    pixels, shared = _sizes(window)
    if pixels > _PIXELS or shared > _SHARED or x.size >= 2**31 or not aligned(x, w, *others):
        return False
    return prod(_grid(x, window)) > (processors() if least is None else least - 1)


def halo_conv(x, w, window: Window, *, scale, add, bias, out=None) -> Array:
    """add + scale * (x * w) + bias, one rounding. Only where `takes_halo` says so. out: where the
    result goes, a new array by default; may be add.
    """
    import cupy

    space = window.out_space(x.shape[1:-1])
    y = cupy.empty((x.shape[0], *space, w.shape[2]), x.dtype) if out is None else out
    geometry = geometry_of(window, x.shape[1:-1], space)
    args = (x, w, scale, add, bias, y, geometry, x.shape[-1], w.shape[2])
    launch = kernel("halo.cu", "halo_conv", bf16)
    launch(_grid(x, window), (_THREADS,), *args, shared=_sizes(window)[1])
    return y


def _grid(x, window: Window) -> tuple[int, int, int]:
    down, across = window.out_space(x.shape[1:-1])
    return -(-across // _ACROSS), -(-down // _DOWN), x.shape[0]


def _sizes(window: Window) -> tuple[int, int]:
    """(pixels of a piece with its halo, bytes of shared memory)."""
    down, across = (d * (k - 1) for d, k in zip(window.dilation, window.kernel, strict=True))
    pixels = (_DOWN + down) * (_ACROSS + across)
    return pixels, _STAGES * (-(-pixels * 64 // 128) * 128 + window.taps * 1024)
