"""column_sum and expand_rows: adding the rows of (..., C), and repeating (C,) over rows. Each is
the other's gradient.
"""

from __future__ import annotations

from math import prod

import numpy as np

from ..arrays import Array, module_of, require_float, wide, wide_dtype
from ..errors import ShapeError
from ..kernels import kernel
from ..tape import Primitive, value_of
from .extended_gpu import takes

# One launch of column_sum.cu, where reading takes less than a launch: of so many bytes, and rows.
_ONCE, _LEAST = 1 << 23, 256
_CLUSTER = 8  # blocks that share eight columns


def column_sum(x: Array, scale: Array | None = None) -> Array:
    """scale[0] * the sum of x (..., C) over all axes but the last, (C,) in the wide dtype. The
    gradient of a bias. scale: (1,) wide, a constant of the tape, or None for 1.
    """
    require_float(value_of(x), "x")
    return _column_sum(x, scale)


def expand_rows(x: Array, shape: tuple[int, ...]) -> Array:
    """x (C,) repeated to shape (..., C)."""
    if tuple(x.shape) != tuple(shape[-1:]):
        raise ShapeError(f"x has shape {tuple(x.shape)}, expected {tuple(shape[-1:])}")
    return _expand_rows(x, shape=tuple(shape))


def rows_of(x: Array) -> Array:
    """x (..., C) as the matrix (rows, C), also when C is 0. A view."""
    return x.reshape(prod(x.shape[:-1]), x.shape[-1])


def bits(x: Array) -> Array:
    """x seen as unsigned integers of its item size, which is all that moving values needs."""
    return x.view({2: np.uint16, 4: np.uint32, 8: np.uint64}[x.dtype.itemsize])


def moved(x: Array, move) -> Array:
    """The contiguous array that `move`, a function of views, makes of the bits of x."""
    return module_of(x).ascontiguousarray(move(bits(x))).view(x.dtype)


def _column_sum_gpu(x, scale):
    import cupy

    rows, columns = rows_of(x).shape
    if x.size == 0:
        return cupy.zeros((columns,), wide_dtype(x.dtype))
    if x.nbytes <= _ONCE and rows >= _LEAST and takes(x):
        out = cupy.empty((columns,), wide_dtype(x.dtype))
        grid = (_CLUSTER * (columns // 8),)
        kernel("column_sum.cu", "column_sum_once", x.dtype)(
            grid, (256,), x, scale, out, rows, columns
        )
        return out
    # Two passes in a fixed order, so that the sum is the same every time: each part adds its rows,
    # then parts are added.
    parts = 1 if rows <= 1024 else min(rows // 256, 512)
    partial = cupy.empty((parts, columns), wide_dtype(x.dtype))
    grid = ((columns + 31) // 32, parts)
    own = scale if parts == 1 else None
    kernel("elementwise.cu", "column_sum", x.dtype)(grid, (32, 32), x, own, partial, rows, columns)
    if parts == 1:
        return partial.reshape(columns)
    out = cupy.empty((1, columns), partial.dtype)
    kernel("elementwise.cu", "column_sum", partial.dtype)(
        (grid[0], 1), (32, 32), partial, scale, out, parts, columns
    )
    return out.reshape(columns)


def _column_sum_cpu(x, scale):
    total = rows_of(wide(x)).sum(axis=0)
    return total if scale is None else total * scale


def _column_sum_vjp(needs, out, x, scale):
    shape = x.shape

    return lambda g: (_expand_rows(g if scale is None else g * scale, shape=shape), None)


_column_sum = Primitive("column_sum", cpu=_column_sum_cpu, gpu=_column_sum_gpu, vjp=_column_sum_vjp)


def _run_expand_rows(x, *, shape):
    return moved(x, lambda b: module_of(b).broadcast_to(b, shape))


_expand_rows = Primitive(
    "expand_rows",
    cpu=_run_expand_rows,
    gpu=_run_expand_rows,
    vjp=lambda needs, out, x, *, shape: lambda g: (_column_sum(g, None),),
)
