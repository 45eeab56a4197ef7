"""Changed weights: W + dW in the dtype of W, summed wide and rounded once, in one pass over W.

For inference and for merging: nothing here is differentiated, and the change is not kept.
"""

from __future__ import annotations

import numpy as np

from ..arrays import Array, bf16, f32, like, on_gpu, require_same, wide, wide_dtype
from ..errors import ShapeError
from ..kernels import kernel
from .aligned import aligned
from .elementwise import cast, require_factor
from .hadamard import hadamard_weight
from .low_rank import low_rank_weight


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
    if down.dtype != weight.dtype:
        out = _factored(weight, scale, (down, up))
        return changed(weight, low_rank_weight(down, up, scale)) if out is None else out
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
    out = _factored(weight, scale, (down1, up1), (down2, up2)) if on_gpu(weight) else None
    return changed(weight, hadamard_weight(down1, up1, down2, up2, scale)) if out is None else out


def _factored(weight: Array, scale: Array, *pairs: tuple[Array, Array]) -> Array | None:
    """weight + scale * the elementwise product of each down @ up, by cuda_src/changed.cu; None for
    what it does not take: other dtypes, more than 64 ranks, rows that are no multiple of 16 bytes.
    """
    import cupy

    downs, ups = zip(*pairs, strict=True)
    (taps, inputs, rank), kept = downs[0].shape, downs[0].dtype
    width = next((r for r in (16, 32, 64) if rank <= r), None)
    alike = all(d.shape == downs[0].shape and d.dtype == kept for d in downs)
    if width is None or not alike or not aligned(weight) or any(u.dtype != bf16 for u in ups):
        return None
    wide_down, hadamard = kept == f32, len(pairs) - 1
    out, (rows, columns) = cupy.empty(weight.shape, bf16), (taps * inputs, weight.shape[2])
    parts = (1 + wide_down) * (1 + hadamard)
    op = "factored_changed_wide" if wide_down else "factored_changed"
    launch = kernel("changed.cu", op, bf16, RANKS=width, HADAMARD=hadamard)
    arrays = [a for pair in (pairs * 2)[:2] for a in pair]
    launch(
        ((columns + 255) // 256, (rows + 127) // 128), (256,),
        weight, *map(cupy.ascontiguousarray, arrays), scale, out, rows, columns, rank,
        shared=parts * 128 * (width * 2 + 16),
    )  # fmt: skip
    return out


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
