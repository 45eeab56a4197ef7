"""matmul: one dense product of plain arrays on either device, the building block that gradient
rules share.

Not a primitive: it records nothing. CPU: NumPy's BLAS in the wide dtype. GPU: cuBLASLt.
"""

from __future__ import annotations

import numpy as np

from ..arrays import Array, on_gpu, wide, wide_dtype


def matmul(
    a: Array, b: Array, *, transpose_a=False, transpose_b=False, scale: Array | None = None
) -> Array:
    """scale * op(a) @ op(b), summed and returned in the wide dtype. Two axes, or three with equal
    or single batches.
    """
    if on_gpu(a):
        from ..gemm import gemm

        return gemm(
            a,
            b,
            transpose_a=transpose_a,
            transpose_b=transpose_b,
            scale=scale,
            dtype=wide_dtype(a.dtype),
        )
    a, b = wide(a), wide(b)
    out = np.matmul(
        a.swapaxes(-1, -2) if transpose_a else a, b.swapaxes(-1, -2) if transpose_b else b
    )
    if scale is not None:
        out *= scale.astype(out.dtype)  # in place: out may be as large as a layer's weight
    return out
