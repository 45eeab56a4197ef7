"""Changed weights: W + dW in the dtype of W, summed wide and rounded once, in one pass over W.

For inference and for merging: nothing here is differentiated, and the change is not kept.
"""

from __future__ import annotations

import numpy as np

from ..arrays import Array, like, on_gpu, require_same, wide, wide_dtype
from ..errors import ShapeError
from ..kernels import kernel
from .elementwise import cast, require_factor
from .factored_gpu import factored_changed
from .hadamard import hadamard_weight
from .low_rank import low_rank_weight

_KRON_ROWS = 4  # of kron_changed, as in kron.cu


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


def scaled_changed(weight: Array, delta: Array, scale: Array) -> Array:
    """weight + scale[0] * delta.  weight, delta: of one shape and dtype. scale: (1,) wide."""
    require_same("weight", weight, "delta", delta)
    require_factor(scale, weight)
    _require_shape(weight, delta.shape)
    if not on_gpu(weight):
        return like(wide(weight) + wide(delta) * scale, weight)
    import cupy

    out = cupy.empty(weight.shape, weight.dtype)
    if out.size:
        grid = (min((out.size + 2047) // 2048, 65535),)  # 16 bytes a thread of a bf16
        kernel("elementwise.cu", "add_scaled", weight.dtype)(
            grid, (256,), weight, delta, scale, out, out.size
        )
    return out


def low_rank_changed(weight: Array, down: Array, up: Array, scale: Array) -> Array:
    """weight[t] + scale[0] * down[t] @ up.  weight: (taps, IN, OUT). down: (taps, IN, R), of the
    dtype of weight or wide. up: (1, R, OUT), of the dtype of weight. scale: (1,) wide.
    """
    require_same("weight", weight, "up", up)
    if down.dtype != wide_dtype(weight.dtype):
        require_same("weight", weight, "down", down)
    require_factor(scale, weight)
    taps, inputs, rank = down.shape
    _require_shape(weight, (taps, inputs, up.shape[2]))
    if not on_gpu(weight):
        total = np.matmul(wide(down), wide(up))
        total *= scale
        total += wide(weight)
        return like(total, weight)
    out = factored_changed(weight, scale, (down, up))
    if out is not None:
        return out
    if down.dtype != weight.dtype:
        return changed(weight, low_rank_weight(down, up, scale))
    from ..gemm import gemm

    flat = weight.reshape(taps * inputs, weight.shape[2])
    # The weight is what the product's accumulators start from.
    out = gemm(down.reshape(taps * inputs, rank), up[0], scale=scale, add=flat)
    return out.reshape(weight.shape)


def hadamard_changed(
    weight: Array, down1: Array, up1: Array, down2: Array, up2: Array, scale: Array
) -> Array:
    """weight[t] + scale[0] * (down1[t] @ up1) * (down2[t] @ up2).  Shapes as for `hadamard_weight`;
    the downs of the dtype of weight, or both wide.
    """
    _require_shape(weight, (*down1.shape[:2], up1.shape[2]))
    pairs = (down1, up1), (down2, up2)
    out = factored_changed(weight, scale, *pairs) if on_gpu(weight) else None
    return changed(weight, hadamard_weight(down1, up1, down2, up2, scale)) if out is None else out


def kron_changed(weight: Array, w1: Array, w2: Array, scale: Array) -> Array:
    """weight[t] + scale[0] * w1 kron w2[t], laid out as by `kron_weight`.  weight: (taps, M * N, L
    * K). w1: (L, M). w2: (taps, N, K), either dtype. scale: (1,) wide.
    """
    require_factor(scale, weight)
    kept = wide_dtype(weight.dtype)
    (rows, columns), (taps, n, k) = w1.shape, w2.shape
    _require_shape(weight, (taps, columns * n, rows * k))
    if not on_gpu(weight):
        w1, w2 = wide(w1), wide(w2)
        total = (w1 * scale).T[None, :, None, :, None] * w2[:, None, :, None, :]
        total = total.reshape(weight.shape)
        total += wide(weight)
        return like(total, weight)
    import cupy

    out = cupy.empty(weight.shape, weight.dtype)
    if out.size:
        width = 16 // weight.dtype.itemsize
        whole = all(a.data.ptr % 16 == 0 for a in (weight, w2))
        vec = width if k % width == 0 and whole else 1
        chunks = rows * k // vec
        across = -(-chunks // 256)
        # Of a narrow weight no thread of a block is without columns.
        block = -(-chunks // across // 32) * 32
        grid = (-(-chunks // block), min(n * -(-columns // _KRON_ROWS), 65535), taps)
        factors = [(a, None) if a.dtype != kept else (None, a) for a in (w1, w2)]
        kernel("kron.cu", "kron_changed", weight.dtype, VEC=vec)(
            grid, (block,), weight, *factors[0], *factors[1], scale, out, rows, columns, n, k
        )
    return out


def _require_shape(weight: Array, expected) -> None:
    if tuple(weight.shape) != tuple(expected):
        raise ShapeError(f"weight has shape {tuple(weight.shape)}, expected {tuple(expected)}")
