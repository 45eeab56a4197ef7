"""skew_blocks: skew matrices from what stands above their diagonals; the series of PEFT that stands
for their Cayley transform.
"""

from __future__ import annotations

from math import isqrt

import numpy as np

from ..arrays import Array, on_gpu, require_axes, require_float, wide, wide_dtype
from ..errors import ShapeError
from ..kernels import kernel
from ..tape import Primitive, value_of
from .elementwise import add, cast
from .low_rank import low_rank_weight


def skew_blocks(v: Array) -> Array:
    """U - U^T, U strictly above the diagonal and given row by row.

    v: (batch, B (B - 1) / 2). Returns (batch, B, B), wide. Raises ShapeError, DtypeError.
    """
    require_axes(v, 2, "v", "(batch, B (B - 1) / 2)")
    require_float(value_of(v), "v")
    size = block_size_of(v.shape[1])
    return _skew_blocks(v, size=size)


def block_size_of(entries: int) -> int:
    """B of a block with B (B - 1) / 2 entries above its diagonal. Raises ShapeError."""
    size = (1 + isqrt(1 + 8 * entries)) // 2
    if size * (size - 1) // 2 != entries or entries < 1:
        raise ShapeError(f"{entries} entries are not those above a diagonal: 1, 3, 6, 10, ...")
    return size


def cayley_series(q: Array, terms: int = 5) -> Array:
    """2 Q + 2 Q^2 + ... + 2 Q^(terms - 2) + Q^(terms - 1): `terms` of (I + Q) (I - Q)^-1, less the
    identity, as PEFT counts them: 3 are what 4 are, and 2 are I + 2 Q.

    q: (batch, B, B), skew, wide. The sum is no rotation, but close to one for small Q. Raises
    ShapeError for fewer than 2 terms.
    """
    if terms < 2:
        raise ShapeError(f"a series of {terms} terms turns nothing: expected 2 or more")
    half = power = q
    for _ in range(2, max(terms, 4) - 1 if terms > 2 else 2):
        power = low_rank_weight(power, q)
        half = add(half, power)
    twice = add(half, half)
    return twice if terms == 2 else add(twice, low_rank_weight(power, q))


def _skew_cpu(v, *, size):
    rows, columns = np.triu_indices(size, 1)
    q = np.zeros((v.shape[0], size, size), wide_dtype(v.dtype))
    q[:, rows, columns] = wide(v)
    return q - q.swapaxes(1, 2)


def _skew_gpu(v, *, size):
    import cupy

    q = cupy.empty((v.shape[0], size, size), wide_dtype(v.dtype))
    if q.size:
        grid = ((q.size + 255) // 256,)
        kernel("cayley.cu", "skew_blocks", v.dtype)(grid, (256,), v, q, v.shape[0], size)
    return q


def _pull_cpu(g, size):
    rows, columns = np.triu_indices(size, 1)
    return (g - g.swapaxes(1, 2))[:, rows, columns]


def _pull_gpu(g, size):
    import cupy

    dv = cupy.empty((g.shape[0], size * (size - 1) // 2), g.dtype)
    if dv.size:
        grid = ((g.size + 255) // 256,)
        kernel("cayley.cu", "skew_blocks_d", g.dtype)(grid, (256,), g, dv, g.shape[0], size)
    return dv


def _skew_vjp(needs, out, v, *, size):
    def pull(g):
        g = cast(g, out.dtype)
        return ((_pull_gpu if on_gpu(g) else _pull_cpu)(g, size),)

    return pull


_skew_blocks = Primitive("skew_blocks", _skew_cpu, _skew_gpu, _skew_vjp)
