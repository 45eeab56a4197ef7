"""Changed weights: W + dW in the dtype of W, summed wide and rounded once, in one pass over W.

For inference and for merging: nothing here is differentiated, and the change is not kept.
"""

from __future__ import annotations

import numpy as np

from ..arrays import Array, like, on_gpu, require_same, wide, wide_dtype
from ..errors import ShapeError
from ..kernels import kernel
from .elementwise import cast, require_factor


def changed(weight: Array, delta: Array) -> Array:
    """weight + delta.  weight: any shape. delta: the same shape, wide."""
    _require_shape(weight, delta.shape)
    if not on_gpu(weight):
        return like(wide(weight) + delta, weight)
    import cupy

    out = cupy.empty(weight.shape, weight.dtype)
    if out.size:
        grid = (min((out.size + 255) // 256, 1 << 20),)
        kernel("elementwise.cu", "add_wide", weight.dtype)(
            grid, (256,), weight, cast(delta, wide_dtype(weight.dtype)), out, out.size
        )
    return out


def low_rank_changed(weight: Array, down: Array, up: Array, scale: Array) -> Array:
    """weight[t] + scale[0] * down[t] @ up.  weight: (taps, IN, OUT). down: (taps, IN, R). up: (1,
    R, OUT), both of the dtype of weight. scale: (1,) wide.
    """
    require_same("weight", weight, "down", down)
    require_same("weight", weight, "up", up)
    require_factor(scale, weight)
    taps, inputs, rank = down.shape
    _require_shape(weight, (taps, inputs, up.shape[2]))
    if not on_gpu(weight):
        total = np.matmul(wide(down), wide(up))
        total *= scale
        total += wide(weight)
        return like(total, weight)
    from ..gemm import gemm

    flat = weight.reshape(taps * inputs, weight.shape[2])
    # The weight is what the product's accumulators start from.
    out = gemm(down.reshape(taps * inputs, rank), up[0], scale=scale, add=flat)
    return out.reshape(weight.shape)


def kron_changed(weight: Array, w1: Array, w2: Array, scale: Array) -> Array:
    """weight[t] + scale[0] * w1 kron w2[t], laid out as by `kron_weight`.  weight: (taps, M * N, L
    * K). w1: (L, M). w2: (taps, N, K), either dtype. scale: (1,) wide.
    """
    kept = wide_dtype(weight.dtype)
    w1, w2 = cast(w1, kept), cast(w2, kept)
    require_factor(scale, weight)
    (rows, columns), (taps, n, k) = w1.shape, w2.shape
    _require_shape(weight, (taps, columns * n, rows * k))
    if not on_gpu(weight):
        total = (w1 * scale).T[None, :, None, :, None] * w2[:, None, :, None, :]
        total = total.reshape(weight.shape)
        total += wide(weight)
        return like(total, weight)
    import cupy

    out = cupy.empty(weight.shape, weight.dtype)
    if out.size:
        width = 16 // weight.dtype.itemsize
        aligned = k % width == 0 and weight.data.ptr % 16 == 0
        vec = width if aligned else 1
        grid = ((rows * k // vec + 255) // 256, min(columns * n, 65535), taps)
        kernel("kron.cu", "kron_changed", weight.dtype, VEC=vec)(
            grid, (256,), weight, w1, w2, scale, out, rows, columns, n, k
        )
    return out


def _require_shape(weight: Array, expected) -> None:
    if tuple(weight.shape) != tuple(expected):
        raise ShapeError(f"weight has shape {tuple(weight.shape)}, expected {tuple(expected)}")
