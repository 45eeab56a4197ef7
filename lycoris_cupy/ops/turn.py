"""turn_blocks: blocks of columns of an activation or a weight, each multiplied by its own matrix.

The matrices stay wide, and what is added to is read and written once: beside a layer's product this
costs one more pass over its output.
"""

from __future__ import annotations

import numpy as np

from ..arrays import (
    Array,
    f64,
    like,
    on_gpu,
    require_axes,
    require_float,
    require_same,
    wide,
    wide_dtype,
)
from ..errors import DtypeError, LycorisError, ShapeError
from ..kernels import kernel
from ..tape import Primitive, Var, value_of
from .columns import column_sum, rows_of
from .elementwise import require_factor

_LANES = 256  # as in turn.cu


def turn_blocks(
    y: Array,
    matrices: Array,
    *,
    bias: Array | None = None,
    add: Array | None = None,
    scale: Array | None = None,
) -> Array:
    """out[..., k B + m] = add + scale[0] * sum over n of (y - bias)[..., k B + n] * matrices[0, n,
    k B + m].

    y: (..., C). matrices: (1, B, C), wide, as `rotation_columns` makes them. bias: (C,) of the
    dtype of y, and scale: (1,) wide, constants of the tape. add: like y. Summed wide, rounded once
    to the dtype of y. Raises ShapeError, DtypeError.
    """
    require_float(value_of(y), "y")
    require_axes(matrices, 3, "matrices", "(1, B, C)")
    size, columns = matrices.shape[1:]
    if matrices.shape[0] != 1 or columns != y.shape[-1] or size < 1 or columns % size:
        raise ShapeError(
            f"matrices have shape {tuple(matrices.shape)}, expected (1, B, {y.shape[-1]}) with B a "
            "divisor of its columns"
        )
    if matrices.dtype != wide_dtype(y.dtype):
        raise DtypeError(f"matrices are {matrices.dtype}, expected {wide_dtype(y.dtype)}")
    if isinstance(bias, Var) or isinstance(scale, Var):
        raise LycorisError("turn_blocks: bias and scale are constants of the tape")
    if scale is not None:
        require_factor(scale, y)
    for name, array, expected in (("bias", bias, y.shape[-1:]), ("add", add, y.shape)):
        if array is not None:
            require_same("y", value_of(y), name, value_of(array))
            if tuple(array.shape) != tuple(expected):
                raise ShapeError(f"{name} has shape {tuple(array.shape)}, expected {expected}")
    return _turn_blocks(y, matrices, bias, add, scale)


def _apart(x, size):
    """x (..., C) as (rows, blocks, B)."""
    x = rows_of(x)
    return x.reshape(x.shape[0], x.shape[1] // size, size)


def _centred(y, bias, size):
    return _apart(wide(y) if bias is None else wide(y) - wide(bias), size).transpose(1, 0, 2)


def _blocks(matrices):
    """(1, B, C) as (blocks, B, B)."""
    _, size, columns = matrices.shape
    return matrices.reshape(size, columns // size, size).transpose(1, 0, 2)


def _joined(turned, y):
    """(blocks, rows, B) as y."""
    return turned.transpose(1, 0, 2).reshape(y.shape)


def _turn_cpu(y, matrices, bias, add, scale):
    total = _joined(_centred(y, bias, matrices.shape[1]) @ _blocks(matrices), y)
    total = total if scale is None else total * scale
    return like(total if add is None else total + wide(add), y)


def _sizes(dtype):
    """Rows at a time, and rows of each matrix at a time in the gradient: as registers allow."""
    return {"ROWS": 4, "NEAR": 8} if dtype == f64 else {"ROWS": 16, "NEAR": 16}


def _tile(size):
    """Columns of a thread block: whole blocks where they are narrow."""
    return _LANES // size * size if size <= _LANES else _LANES


def _tiles(columns, size):
    tile = _tile(size)
    if tile < size:
        return columns // size * ((size + tile - 1) // tile)
    return (columns + tile - 1) // tile


def _launch_turn(y, matrices, bias, add, scale, turned):
    import cupy

    out = cupy.empty(y.shape, y.dtype)
    if out.size:
        (rows, columns), size = rows_of(y).shape, matrices.shape[1]
        sizes = _sizes(y.dtype)
        grid = (_tiles(columns, size), min((rows + sizes["ROWS"] - 1) // sizes["ROWS"], 65535))
        kernel("turn.cu", "turn_blocks", y.dtype, **sizes)(
            grid, (_LANES,), y, matrices, bias, add, scale, out, rows, columns, size, _tile(size),
            turned,
        )  # fmt: skip
    return out


def _turn_gpu(y, matrices, bias, add, scale):
    return _launch_turn(y, matrices, bias, add, scale, 0)


def _dmatrices_gpu(g, y, bias, scale, matrices):
    import cupy

    if not y.size:
        return cupy.zeros(matrices.shape, matrices.dtype)
    (rows, columns), size = rows_of(y).shape, matrices.shape[1]
    sizes = _sizes(y.dtype)
    tiles, near = _tiles(columns, size), (size + sizes["NEAR"] - 1) // sizes["NEAR"]
    # Some eight blocks on each of 132 multiprocessors, each with 64 rows or more.
    parts = max(min(rows // 64, 1056 // (tiles * near)), 1)
    partial = cupy.empty((parts, size * columns), matrices.dtype)
    kernel("turn.cu", "turn_blocks_d", y.dtype, **sizes)(
        (tiles, parts, near), (_LANES,), g, y, bias, scale, partial, rows, columns, size,
        _tile(size),
    )  # fmt: skip
    return column_sum(partial).reshape(matrices.shape)


def _pull_cpu(needs, g, y, matrices, bias, scale):
    size = matrices.shape[1]
    flow = _centred(g, None, size)
    flow = flow if scale is None else flow * scale
    dy = dmatrices = None
    if needs[0]:
        dy = like(_joined(flow @ _blocks(matrices).swapaxes(1, 2), y), y)
    if needs[1]:
        full = _centred(y, bias, size).swapaxes(1, 2) @ flow  # (blocks, n, m)
        dmatrices = np.array(full.transpose(1, 0, 2), order="C").reshape(matrices.shape)
    return dy, dmatrices


def _pull_gpu(needs, g, y, matrices, bias, scale):
    dy = _launch_turn(g, matrices, None, None, scale, 1) if needs[0] else None
    return dy, _dmatrices_gpu(g, y, bias, scale, matrices) if needs[1] else None


def _turn_vjp(needs, out, y, matrices, bias, add, scale):
    def pull(g):
        run = _pull_gpu if on_gpu(g) else _pull_cpu
        return (*run(needs, g, y, matrices, bias, scale), None, g if needs[3] else None, None)

    return pull


_turn_blocks = Primitive("turn_blocks", _turn_cpu, _turn_gpu, _turn_vjp)
