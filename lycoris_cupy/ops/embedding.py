"""embedding: rows of a table by whole numbers. Its gradient adds the rows of equal numbers in the
order of their positions, so that it is the same every time.
"""

from __future__ import annotations

import numpy as np

from ..arrays import Array, on_gpu, require_axes, require_float, wide, wide_dtype
from ..errors import DeviceError, DtypeError, ShapeError
from ..kernels import kernel
from ..tape import Primitive, Var, value_of
from .columns import rows_of

_TILE = 1024  # as in embedding.cu: keys that one block sorts
_CHUNK = 32  # sorted positions that one block adds up


def embedding(table: Array, indices: Array) -> Array:
    """table[indices].  table: (rows, C). indices: whole numbers of any shape, a constant of the
    tape. Returns (*indices.shape, C).

    An index must lie in 0 to rows - 1: on the CPU any other is a ShapeError; on a GPU, where no
    value is read back, its row is NaN. The table's gradient is dense and wide. Raises DtypeError.
    """
    require_float(value_of(table), "table")
    require_axes(table, 2, "table", "(rows, C)")
    return _embedding(table, require_indices(indices, "indices", value_of(table)))


def require_indices(indices: Array, name: str, beside: Array) -> Array:
    """indices as a contiguous int32 array; raises unless they are whole numbers beside `beside`."""
    if isinstance(indices, Var) or np.dtype(indices.dtype).kind not in "iu":
        found = "watched by a tape" if isinstance(indices, Var) else f"of {indices.dtype}"
        raise DtypeError(f"{name} are {found}, expected a plain array of whole numbers")
    if on_gpu(indices) != on_gpu(beside):
        raise DeviceError(
            f"{name} and the floats beside them lie on different devices: move one with "
            "lycoris_cupy.to_device"
        )
    if on_gpu(indices):
        import cupy

        if indices.dtype.itemsize > 4 or indices.dtype == np.uint32:  # or it would wrap around
            indices = indices.clip(max(np.iinfo(indices.dtype).min, -(2**31)), 2**31 - 1)
        return cupy.ascontiguousarray(indices.astype(np.int32, copy=False))
    return np.ascontiguousarray(indices)


def _embedding_cpu(table, indices):
    if indices.size and not 0 <= indices.min() <= indices.max() < table.shape[0]:
        raise ShapeError(
            f"indices reach from {indices.min()} to {indices.max()}, expected 0 to "
            f"{table.shape[0] - 1}, the rows of the table"
        )
    return table[indices]


def _embedding_gpu(table, indices):
    import cupy

    out = cupy.empty((*indices.shape, table.shape[1]), table.dtype)
    if out.size:
        grid = (min(indices.size, 2**31 - 1),)
        kernel("embedding.cu", "embedding", table.dtype)(
            grid, (128,), table, indices, out, table.shape[0], table.shape[1]
        )
    return out


def _dtable_cpu(g, indices, shape):
    out = np.zeros(shape, wide_dtype(g.dtype))
    if g.size:
        flat = indices.reshape(-1)
        order = np.argsort(flat, kind="stable")
        rows, starts = np.unique(flat[order], return_index=True)
        out[rows] = np.add.reduceat(wide(rows_of(g))[order], starts, axis=0)
    return out


def _dtable_gpu(g, indices, shape):
    import cupy

    kept, (rows, columns), count = wide_dtype(g.dtype), shape, indices.size
    out = cupy.zeros(shape, kept)
    if not g.size or not rows:
        return out
    keys, order = (cupy.empty((count,), np.int64) for _ in range(2))
    tiles = (count + _TILE - 1) // _TILE
    kernel("embedding.cu", "sort_tiles", g.dtype)((tiles,), (_TILE,), indices, keys, count, rows)
    kernel("embedding.cu", "merge_tiles", g.dtype)((tiles,), (_TILE,), keys, order, count)
    chunks = (count + _CHUNK - 1) // _CHUNK
    partial = cupy.empty((chunks, 2, columns), kept)
    grid, numbers = (chunks, (columns + 255) // 256), (count, rows, columns)
    kernel("embedding.cu", "embedding_d", g.dtype)(grid, (256,), g, order, partial, out, *numbers)
    kernel("embedding.cu", "embedding_joined", g.dtype)(grid, (256,), order, partial, out, *numbers)
    return out


def _embedding_vjp(needs, out, table, indices):
    shape = table.shape

    def pull(g):
        return (_dtable_gpu if on_gpu(g) else _dtable_cpu)(g, indices, shape), None

    return pull


_embedding = Primitive("embedding", _embedding_cpu, _embedding_gpu, _embedding_vjp)
