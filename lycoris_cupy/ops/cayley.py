"""cayley: small skew blocks to rotations; rotation_columns: those as columns that turn channels.

The Cayley transform is a rotation less the identity here, so that small angles keep their digits in
bf16 and no angle is exactly no change.
"""

from __future__ import annotations

import numpy as np

from ..arrays import Array, on_gpu, require_axes, require_float, wide, wide_dtype
from ..errors import DtypeError, ShapeError
from ..kernels import kernel
from ..tape import Primitive, value_of
from .columns import column_sum
from .elementwise import cast, require_factor

_SMALL = 1e-8  # what the reference adds to the norm
_SHARED = 48 * 1024


def cayley(a: Array, *, limit: float | None = None, factor: float = 1.0) -> Array:
    """(I + Q) (I - Q)^-1 - I, Q = factor * (a - a^T) of each block: a rotation less the identity.

    a: (batch, B, B). limit: with one, Q is multiplied by min(1, limit / (|Q| + 1e-8)), |Q| the
    Frobenius norm over all blocks. Returns (batch, B, B), wide; transposed it is that of -Q. The
    sum under the inverse is never singular. Cayley 1846; Qiu et al. 2023, arXiv 2306.07280.
    Raises ShapeError, DtypeError.
    """
    require_axes(a, 3, "a", "(batch, B, B)")
    require_float(value_of(a), "a")
    if a.shape[1] != a.shape[2]:
        raise ShapeError(f"a has shape {tuple(a.shape)}, expected square blocks (batch, B, B)")
    if limit is not None and not limit >= 0:
        raise ShapeError(f"limit is {limit}, expected at least 0")
    return _cayley(a, limit=None if limit is None else float(limit), factor=float(factor))


def rotation_columns(
    e: Array, rescale: Array | None = None, scale: Array | None = None, *, turned: bool = False
) -> Array:
    """out[0, n, k * B + m] = c * s * e[k, n, m] + (n == m) * (c - 1), c = rescale[k * B + m].

    What `turn_blocks` has to multiply the channels of block k by to get the change that I + s e and
    a rescaling make of them. e: (batch, B, B), wide; e[k, m, n] when turned. rescale:
    (batch * B,) wide, or None for 1. scale: (1,) wide, a constant, or None for 1. Returns
    (1, B, batch * B), wide. Raises ShapeError, DtypeError.
    """
    require_axes(e, 3, "e", "(batch, B, B)")
    require_float(value_of(e), "e")
    columns = e.shape[0] * e.shape[1]
    if rescale is not None:
        if tuple(rescale.shape) != (columns,):
            raise ShapeError(f"rescale has shape {tuple(rescale.shape)}, expected ({columns},)")
        if rescale.dtype != e.dtype:
            raise DtypeError(f"rescale is {rescale.dtype}, expected {e.dtype} like e")
    if scale is not None:
        require_factor(scale, e)
    return _rotation_columns(e, rescale, scale, turned=bool(turned))


def _skew(a, factor):
    a = wide(a)
    return a.dtype.type(factor) * (a - a.swapaxes(1, 2))


def _share(q, limit):
    """(min(1, limit / (|Q| + 1e-8)), |Q|)."""
    size = np.sqrt(np.square(q).sum())
    return np.minimum(1, q.dtype.type(limit) / (size + q.dtype.type(_SMALL))), size


def _cayley_cpu(a, *, limit, factor):
    q = _skew(a, factor)
    if limit is not None:
        q = q * _share(q, limit)[0]
    if not q.size:
        return q
    return 2 * np.linalg.solve(np.eye(q.shape[1], dtype=q.dtype) - q, q)


def _norm_gpu(a, limit, factor):
    import cupy

    if limit is None:
        return None
    norm = cupy.empty(2, wide_dtype(a.dtype))
    kernel("cayley.cu", "skew_norm", a.dtype)((1,), (1024,), a, norm, factor, limit, *a.shape[:2])
    return norm


def _cayley_gpu(a, *, limit, factor):
    import cupy

    batch, size, _ = a.shape
    e = cupy.empty(a.shape, wide_dtype(a.dtype))
    if e.size:
        needed = (2 + size) * size * e.dtype.itemsize
        scratch = cupy.empty(a.shape, e.dtype) if needed > _SHARED else None
        shared = needed if scratch is None else 2 * size * e.dtype.itemsize
        kernel("cayley.cu", "cayley", a.dtype)(
            (batch,), (256,), a, _norm_gpu(a, limit, factor), e, scratch, factor, size,
            shared=shared,
        )  # fmt: skip
    return e


def _pull_cpu(g, a, e, limit, factor):
    inverse = np.eye(e.shape[1], dtype=e.dtype) + e / 2
    turned = inverse.swapaxes(1, 2)
    h = 2 * turned @ g @ turned
    da = e.dtype.type(factor) * (h - h.swapaxes(1, 2))
    if limit is None:
        return da
    q = _skew(a, factor)
    share, size = _share(q, limit)
    if share >= 1:
        return da
    along = (da * q).sum() / (size * (size + q.dtype.type(_SMALL))) if size else 0
    return share * (da - along * q)


def _pull_gpu(g, a, e, limit, factor):
    import cupy

    batch, size, _ = e.shape
    da = cupy.empty(e.shape, e.dtype)
    if da.size:
        scratch = cupy.empty((2, *e.shape), e.dtype)
        kernel("cayley.cu", "cayley_d", a.dtype)(
            (batch,), (256,), g, e, scratch, da, factor, batch, size
        )
        if limit is not None:
            norm = _norm_gpu(a, limit, factor)
            kernel("cayley.cu", "skew_norm_d", a.dtype)(
                (1,), (1024,), a, norm, da, factor, batch, size
            )
    return da


def _cayley_vjp(needs, out, a, *, limit, factor):
    def pull(g):
        return ((_pull_gpu if on_gpu(a) else _pull_cpu)(cast(g, out.dtype), a, out, limit, factor),)

    return pull


_cayley = Primitive("cayley", _cayley_cpu, _cayley_gpu, _cayley_vjp)


def _columns_cpu(e, rescale, scale, *, turned):
    batch, size, _ = e.shape
    e = e.swapaxes(1, 2) if turned else e
    out = np.array(e.transpose(1, 0, 2), order="C")  # (n, k, m)
    if scale is not None:
        out *= scale
    if rescale is not None:
        c = rescale.reshape(batch, size)
        out *= c
        out += np.eye(size, dtype=e.dtype)[:, None] * (c - 1)
    return out.reshape(1, size, batch * size)


def _columns_gpu(e, rescale, scale, *, turned):
    import cupy

    batch, size, _ = e.shape
    out = cupy.empty((1, size, batch * size), e.dtype)
    if out.size:
        kernel("cayley.cu", "rotation_columns", e.dtype)(
            ((out.size + 255) // 256,), (256,), e, rescale, scale, out, batch, size, int(turned)
        )
    return out


def _columns_pull_cpu(g, e, rescale, scale, turned, wants_rescale):
    batch, size, _ = e.shape
    g = g.reshape(size, batch, size)
    s = 1 if scale is None else scale
    de = g * s if rescale is None else g * rescale.reshape(batch, size) * s
    de = de.transpose(1, 0, 2)
    entries = (e.swapaxes(1, 2) if turned else e).transpose(1, 0, 2) * s
    terms = g * (entries + np.eye(size, dtype=e.dtype)[:, None])
    drescale = terms.reshape(size, batch * size).sum(axis=0) if wants_rescale else None
    return np.array(de.swapaxes(1, 2) if turned else de, order="C"), drescale


def _columns_pull_gpu(g, e, rescale, scale, turned, wants_rescale):
    import cupy

    batch, size, _ = e.shape
    de = cupy.empty(e.shape, e.dtype)
    terms = cupy.empty((size, batch * size), e.dtype) if wants_rescale else None
    if de.size:
        kernel("cayley.cu", "rotation_columns_d", e.dtype)(
            ((de.size + 255) // 256,), (256,), g, e, rescale, scale, de, terms,
            batch, size, int(turned),
        )  # fmt: skip
    return de, None if terms is None else column_sum(terms)


def _columns_vjp(needs, out, e, rescale, scale, *, turned):
    def pull(g):
        run = _columns_pull_gpu if on_gpu(e) else _columns_pull_cpu
        de, drescale = run(g, e, rescale, scale, turned, needs[1])
        return de if needs[0] else None, drescale, None

    return pull


_rotation_columns = Primitive("rotation_columns", _columns_cpu, _columns_gpu, _columns_vjp)
