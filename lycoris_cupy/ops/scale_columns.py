"""scale_columns: the columns of an activation times a differentiable vector; spread_columns: those
of a weight, each repetition of it times its own part of the vector.

Magnitudes (DoRA) are applied with these: the one to the layer's own product where `extended` does
not scale it in its sum, the other to the last factor of an adapter's.
"""

from __future__ import annotations

from math import prod

import numpy as np

from ..arrays import Array, like, on_gpu, require_float, require_same, wide, wide_dtype
from ..errors import DtypeError, ShapeError
from ..kernels import kernel
from ..tape import Fresh, Primitive, value_of
from .columns import column_sum, rows_of
from .elementwise import cast


def scale_columns(
    y: Array, c: Array, *, bias: Array | None = None, add: Array | None = None
) -> Array:
    """c * (y - bias) + bias + add, summed wide, rounded once.

    y: (..., C), a layer's output with its bias in it, which is not scaled. c: (C,) in the wide
    dtype. bias: (C,), add: like y, both in the dtype of y. Where c is 1 this is y + add, bit for
    bit. Raises ShapeError, DtypeError.
    """
    require_float(value_of(y), "y")
    require_columns(c, y, y.shape[-1:])
    for name, array, expected in (("bias", bias, y.shape[-1:]), ("add", add, y.shape)):
        if array is not None:
            require_same("y", value_of(y), name, value_of(array))
            if tuple(array.shape) != tuple(expected):
                raise ShapeError(
                    f"{name} has shape {tuple(array.shape)}, expected {tuple(expected)}"
                )
    return _scale_columns(y, c, bias, add)


def spread_columns(w: Array, c: Array) -> Array:
    """out[..., l * K + k] = c[l * K + k] * w[..., k]: w repeated along its columns, each scaled.

    w: (..., K). c: (L * K,) in the wide dtype; with L = 1 the columns are only scaled. Returns
    (..., L * K) in the dtype of w, rounded once. Raises ShapeError, DtypeError.
    """
    require_float(value_of(w), "w")
    columns = w.shape[-1]
    if c.ndim != 1 or (c.shape[0] % columns if columns else c.shape[0]):
        raise ShapeError(f"c has shape {tuple(c.shape)}, expected a multiple of {columns} columns")
    require_columns(c, w, c.shape)
    return _spread_columns(w, c)


def require_columns(c: Array, x: Array, shape: tuple[int, ...]) -> None:
    """Raise unless c has this shape and the wide dtype of x."""
    if tuple(c.shape) != tuple(shape):
        raise ShapeError(f"c has shape {tuple(c.shape)}, expected {tuple(shape)}")
    if c.dtype != wide_dtype(x.dtype):
        raise DtypeError(f"c is {c.dtype}, expected {wide_dtype(x.dtype)} beside {x.dtype}")


def _scale_columns_cpu(y, c, bias, add):
    total = wide(y) * c
    if bias is not None:
        total += (1 - c) * wide(bias)
    if add is not None:
        total += wide(add)
    return like(total, y)


def _vector(columns: int, *arrays) -> int:
    """Elements a 16-byte access moves, if every row of every array allows it; else 1."""
    width = 16 // arrays[0].dtype.itemsize
    aligned = all(a is None or a.data.ptr % 16 == 0 for a in arrays)
    return width if columns % width == 0 and aligned else 1


def scale_columns_gpu(y, c, bias, add):
    import cupy

    out = cupy.empty(y.shape, y.dtype)
    if out.size:
        rows, columns = rows_of(y).shape
        vector = _vector(columns, y, add, out)
        # Eight rows at a time, four times: what a column needs is loaded once for 32 rows.
        grid = ((columns + 32 * vector - 1) // (32 * vector), min((rows + 31) // 32, 65535))
        kernel("scale_columns.cu", "scale_columns", y.dtype, VEC=vector)(
            grid, (32, 8), y, c, bias, add, out, rows, columns
        )
    return out


def _gradients_cpu(g, y, c, bias):
    centred = wide(y) if bias is None else wide(y) - wide(bias)
    return like(wide(g) * c, y), rows_of(wide(g) * centred).sum(axis=0)


def _gradients_gpu(g, y, c, bias):
    """(dy, dc) from one pass over g and y; the sum over rows runs in a fixed order."""
    import cupy

    dy = cupy.empty(y.shape, y.dtype)
    rows, columns = rows_of(y).shape
    if not y.size:
        return dy, cupy.zeros((columns,), c.dtype)
    vector = _vector(columns, g, y, dy)
    tiles = (columns + 32 * vector - 1) // (32 * vector)
    # Some eight blocks on each of 132 multiprocessors, each with 64 rows or more.
    parts = max(min(rows // 64, 1056 // tiles), 1)
    partial = cupy.empty((parts, columns), c.dtype)
    kernel("scale_columns.cu", "scale_columns_d", y.dtype, VEC=vector)(
        (tiles, parts), (32, 8), g, y, c, bias, dy, partial, rows, columns
    )
    return dy, column_sum(partial)


def column_gradients(g, y, c, bias=None):
    """(c * g, sum over rows of g * (y - bias)), the second wide."""
    return (_gradients_gpu if on_gpu(g) else _gradients_cpu)(g, y, c, bias)


def _scale_columns_vjp(needs, out, y, c, bias, add):
    y_dtype = y.dtype

    def pull(g):
        dy, dc = column_gradients(g, y, c, bias)
        dbias = column_sum(g) * (1 - c) if needs[2] else None
        dbias = None if dbias is None else cast(dbias, y_dtype)
        return Fresh(dy), dc, dbias, g if needs[3] else None

    return pull


_scale_columns = Primitive(
    "scale_columns", _scale_columns_cpu, scale_columns_gpu, _scale_columns_vjp
)


def _sizes(w, c):
    """(rows, L, K)."""
    columns = w.shape[-1]
    return prod(w.shape[:-1]), c.shape[0] // columns if columns else 0, columns


def _spread_columns_cpu(w, c):
    rows, blocks, columns = _sizes(w, c)
    out = wide(w).reshape(rows, 1, columns) * c.reshape(blocks, columns)
    return like(out, w).reshape(*w.shape[:-1], c.shape[0])


def _spread_columns_gpu(w, c):
    import cupy

    rows, _, columns = _sizes(w, c)
    out = cupy.empty((*w.shape[:-1], c.shape[0]), w.dtype)
    if out.size:
        grid = ((c.shape[0] + 255) // 256, min(rows, 65535))
        kernel("scale_columns.cu", "spread_columns", w.dtype, VEC=1)(
            grid, (256,), w, c, out, rows, columns, c.shape[0]
        )
    return out


def _spread_gradients_cpu(needs, g, w, c):
    rows, blocks, columns = _sizes(w, c)
    g, c = g.reshape(rows, blocks, columns), c.reshape(blocks, columns)
    dw = np.einsum("rlk,lk->rk", g, c).reshape(w.shape) if needs[0] else None
    dc = np.einsum("rlk,rk->lk", g, wide(w).reshape(rows, columns)) if needs[1] else None
    return dw, None if dc is None else dc.reshape(-1)


def _spread_gradients_gpu(needs, g, w, c):
    import cupy

    (rows, _, columns), total = _sizes(w, c), c.shape[0]
    dw, dc = cupy.zeros(w.shape, c.dtype), cupy.zeros(c.shape, c.dtype)
    if not g.size:
        return dw, dc
    if needs[0]:
        grid = ((columns + 255) // 256, min(rows, 65535))
        kernel("scale_columns.cu", "spread_columns_dw", w.dtype, VEC=1)(
            grid, (256,), g, c, dw, rows, columns, total
        )
    if needs[1]:
        parts = 1 if rows <= 256 else min(rows // 64, 64)
        partial = cupy.empty((parts, total), c.dtype)
        kernel("scale_columns.cu", "spread_columns_dc", w.dtype, VEC=1)(
            ((total + 31) // 32, parts), (32, 8), g, w, partial, rows, columns, total
        )
        dc = partial.reshape(total) if parts == 1 else column_sum(partial)
    return dw, dc


def _spread_columns_vjp(needs, out, w, c):
    def pull(g):
        g = cast(g, c.dtype)
        return (_spread_gradients_gpu if on_gpu(g) else _spread_gradients_cpu)(needs, g, w, c)

    return pull


# Gradients of factors stay wide: they end in sums.
_spread_columns = Primitive(
    "spread_columns",
    _spread_columns_cpu,
    _spread_columns_gpu,
    _spread_columns_vjp,
    keeps_wide=True,
)
