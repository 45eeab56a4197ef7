"""Two small products in one launch, for what a changed weight is built from; nothing here is
differentiated.
"""

from __future__ import annotations

import numpy as np

from ..arrays import Array, on_gpu, require_axes, require_float, require_same, wide_dtype
from ..errors import ShapeError
from ..kernels import kernel
from .dense import matmul

_SIZES = np.dtype(
    [(name, np.int32) for name in ("taps", "a_taps", "b_taps", "rows", "ranks", "columns")]
)
_TILE = 64  # as in low_rank.cuh


def two_products(a1: Array, b1: Array, a2: Array, b2: Array) -> tuple[Array, Array]:
    """(a1[t] @ b1[t], a2[t] @ b2[t]), wide.  a: (taps or 1, M, K).  b: (taps or 1, K, N), all of
    one dtype; sizes and taps of the two are their own. Returns (taps, M, N) of each. Raises
    ShapeError, DtypeError.
    """
    for name, a, b in (("1", a1, b1), ("2", a2, b2)):
        require_axes(a, 3, f"a{name}", "(taps or 1, M, K)")
        require_axes(b, 3, f"b{name}", "(taps or 1, K, N)")
        require_float(a, f"a{name}")
        require_same("a1", a1, f"a{name}", a)
        require_same("a1", a1, f"b{name}", b)
        taps = max(a.shape[0], b.shape[0])
        if b.shape[1] != a.shape[2] or not {a.shape[0], b.shape[0]} <= {1, taps}:
            raise ShapeError(
                f"b{name} has shape {tuple(b.shape)}, expected ({a.shape[0]} or 1, {a.shape[2]}, N)"
            )
    if not on_gpu(a1):
        return matmul(a1, b1), matmul(a2, b2)
    import cupy

    sizes = [_sizes(a1, b1), _sizes(a2, b2)]
    outs = [
        cupy.empty((int(s["taps"]), int(s["rows"]), int(s["columns"])), wide_dtype(a1.dtype))
        for s in sizes
    ]
    tiles = [out.shape[0] * -(-out.shape[1] // _TILE) * -(-out.shape[2] // _TILE) for out in outs]
    if sum(tiles):
        kernel("two_products.cu", "two_products", a1.dtype)(
            (sum(tiles),), (256,), a1, b1, a2, b2, *outs, *sizes, tiles[0]
        )
    return outs[0], outs[1]


def _sizes(a: Array, b: Array) -> np.ndarray:
    taps = max(a.shape[0], b.shape[0])
    return np.array((taps, a.shape[0], b.shape[0], *a.shape[1:], b.shape[2]), _SIZES)
