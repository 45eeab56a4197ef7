"""softmax over the last axis."""

from __future__ import annotations

from math import prod

import numpy as np

from ..arrays import Array, like, on_gpu, require_float, wide
from ..errors import ShapeError
from ..kernels import kernel
from ..tape import Primitive, value_of


def softmax(x: Array) -> Array:
    """exp(x) / sum of exp(x) over the last axis.  x: (..., C).

    Computed wide from x less its largest, rounded once to the dtype of x. A row that is minus
    infinity everywhere is 0. Raises ShapeError, DtypeError.
    """
    require_float(value_of(x), "x")
    if x.ndim < 1:
        raise ShapeError("x has no axes, expected (..., C)")
    return _softmax(x)


def softmax_rows(scores: np.ndarray) -> np.ndarray:
    """The softmax of a wide array over its last axis, in place. CPU."""
    if scores.size:
        largest = scores.max(axis=-1, keepdims=True)
        scores -= np.where(np.isneginf(largest), 0, largest)
        np.exp(scores, out=scores)
        total = scores.sum(axis=-1, keepdims=True)
        scores /= np.where(total == 0, 1, total)
    return scores


def team(rows: int, columns: int) -> tuple[tuple[int], tuple[int, int]]:
    """(grid, block) of the kernels of softmax.cu: a warp a row, or a block where rows are long."""
    block = (32, 8) if columns <= 1024 else (256, 1)
    return ((rows + block[1] - 1) // block[1],), block


def _softmax_gpu(x):
    import cupy

    out = cupy.empty(x.shape, x.dtype)
    if out.size:
        rows, columns = prod(x.shape[:-1]), x.shape[-1]
        kernel("softmax.cu", "softmax", x.dtype)(*team(rows, columns), x, out, rows, columns)
    return out


def softmax_d(g, y, scale: float = 1.0):
    """scale * y * (g - sum of g * y), in the dtype of y. g: of that dtype, or wide. GPU."""
    import cupy

    dx = cupy.empty(y.shape, y.dtype)
    if dx.size:
        rows, columns = prod(y.shape[:-1]), y.shape[-1]
        given = (g, None) if g.dtype == y.dtype else (None, g)
        kernel("softmax.cu", "softmax_d", y.dtype)(
            *team(rows, columns), *given, y, dx, scale, rows, columns
        )
    return dx


def _softmax_vjp(needs, out, x):
    def pull(g):
        if on_gpu(g):
            return (softmax_d(g, out),)
        y, d = wide(out), wide(g)
        return (like(y * (d - (d * y).sum(axis=-1, keepdims=True)), out),)

    return pull


_softmax = Primitive(
    "softmax", lambda x: like(softmax_rows(np.array(wide(x))), x), _softmax_gpu, _softmax_vjp
)
