"""Squared norms of a weight changed by a Kronecker product, per output or input, in closed form.

The weight is read once forward and once backward; neither the product nor the sum is built.
"""

from __future__ import annotations

import numpy as np

from ..arrays import Array, on_gpu, require_axes, wide, wide_dtype
from ..errors import ShapeError
from ..kernels import kernel
from ..tape import Primitive
from .columns import column_sum
from .elementwise import add, cast, multiply, require_factor
from .shapes import transpose
from .squares import require_weight


def kron_square(
    w1: Array, w2: Array, weight: Array, square: Array, scale: Array, *, axis: str
) -> Array:
    """|weight + scale[0] * kron_weight(w1, w2)|^2 per output l * K + k or input m * N + n:

        output   square + 2 s sum_m w1[l, m] z[m, l, k] + s^2 |w1[l, :]|^2 |w2[:, :, k]|^2
                 z[m, l, k] = sum_tn weight[t, (m, n), (l, k)] w2[t, n, k]
        input    the same with (l, k) and (m, n) in each other's place

    w1: (L, M). w2: (taps, N, K). weight: (taps, M * N, L * K), a constant. square:
    changed_square(weight). scale: (1,) wide, a constant. Returns (OUT,) or (IN,), wide. Raises
    ShapeError, DtypeError.
    """
    require_weight(weight, axis)
    require_axes(w1, 2, "w1", "(L, M)")
    require_axes(w2, 3, "w2", "(taps, N, K)")
    kept = wide_dtype(weight.dtype)
    require_factor(scale, weight)
    (rows, blocks), (taps, width, columns) = w1.shape, w2.shape
    if (taps, blocks * width, rows * columns) != tuple(weight.shape):
        raise ShapeError(
            f"weight has shape {tuple(weight.shape)}, expected "
            f"{(taps, blocks * width, rows * columns)} of w1 {tuple(w1.shape)} and w2 "
            f"{tuple(w2.shape)}"
        )
    length = weight.shape[2 if axis == "output" else 1]
    if tuple(square.shape) != (length,):
        raise ShapeError(f"square has shape {tuple(square.shape)}, expected {(length,)}")
    w1, w2 = cast(w1, kept), cast(w2, kept)
    cross = _kron_cross(w2, weight, rows=rows, blocks=blocks, axis=axis)
    # |w2|^2 of each k (output) or n (input): the axis to keep is brought to the end.
    kept_last = w2 if axis == "output" else transpose(w2, (0, 2, 1))
    inner = column_sum(multiply(kept_last, kept_last))
    return add(_kron_norm(w1, inner, cross, scale, axis=axis), square)


def _five(weight, rows, blocks):
    """The weight as (taps, M, N, L, K)."""
    taps, inputs, outputs = weight.shape
    return weight.reshape(taps, blocks, inputs // blocks, rows, outputs // rows)


def _kron_cross_cpu(w2, weight, *, rows, blocks, axis):
    form = "tmnlk,tnk->mlk" if axis == "output" else "tmnlk,tnk->lmn"
    z = np.einsum(form, _five(wide(weight), rows, blocks), w2)
    return z.reshape(z.shape[0], -1)


def _kron_cross_gpu(w2, weight, *, rows, blocks, axis):
    import cupy

    (taps, n, k), kept = w2.shape, w2.dtype
    loops, length = (blocks, rows * k) if axis == "output" else (rows, blocks * n)
    if not weight.size:
        return cupy.zeros((loops, length), kept)
    if axis == "input":
        out = cupy.empty((loops, length), kept)
        kernel("kron_square.cu", "kron_cross_in", weight.dtype)(
            ((length + 7) // 8, rows), (32, 8), w2, weight, out, rows, blocks, taps, n, k
        )
        return out
    # Shares of the taps * N rows in a fixed order, so that a thin w1 still fills the machine.
    tiles = (length + 255) // 256
    parts = max(min(taps * n // 32, 1056 // (tiles * blocks)), 1)
    partial = cupy.empty((parts, loops, length), kept)
    kernel("kron_square.cu", "kron_cross_out", weight.dtype)(
        (tiles, blocks, parts), (256,), w2, weight, partial, rows, blocks, taps, n, k
    )
    return column_sum(partial.reshape(parts, -1)).reshape(loops, length)


def _kron_cross_vjp(needs, out, w2, weight, *, rows, blocks, axis):
    shape = w2.shape

    def pull(g):
        run = _kron_cross_d_gpu if on_gpu(g) else _kron_cross_d_cpu
        return run(g, weight, shape, rows, blocks, axis), None

    return pull


def _kron_cross_d_cpu(g, weight, shape, rows, blocks, axis):
    _, n, k = shape
    if axis == "output":
        form, g = "tmnlk,mlk->tnk", g.reshape(blocks, rows, k)
    else:
        form, g = "tmnlk,lmn->tnk", g.reshape(rows, blocks, n)
    return np.einsum(form, _five(wide(weight), rows, blocks), g)


def _kron_cross_d_gpu(g, weight, shape, rows, blocks, axis):
    import cupy

    taps, n, k = shape
    if not weight.size:
        return cupy.zeros(shape, g.dtype)
    tiles = (taps * n * k + 255) // 256
    parts = max(min(rows, 1056 // tiles), 1)
    partial = cupy.empty((parts, taps * n * k), g.dtype)
    kernel("kron_square.cu", "kron_cross_d", weight.dtype)(
        (tiles, parts),
        (256,),
        *(g, weight, partial, rows, blocks, taps, n, k, int(axis == "input")),
    )
    return column_sum(partial).reshape(shape)


_kron_cross = Primitive("kron_cross", _kron_cross_cpu, _kron_cross_gpu, _kron_cross_vjp)


def _turned(w1, axis):
    """w1 with the axis that the result runs along in front: (L, M), or (M, L) for inputs."""
    return w1 if axis == "output" else w1.T


def _kron_norm_cpu(w1, inner, cross, scale, *, axis):
    w = _turned(w1, axis)
    z = cross.reshape(w.shape[1], w.shape[0], -1)
    out = 2 * scale * np.einsum("oe,eoi->oi", w, z)
    out += scale * scale * (w * w).sum(axis=1)[:, None] * inner
    return out.reshape(-1)


def _norm_sizes(w1, inner, axis):
    """(outer, loops, inner, step of outer and step of loops in w1)."""
    rows, blocks = w1.shape
    if axis == "output":
        return rows, blocks, inner.shape[0], blocks, 1
    return blocks, rows, inner.shape[0], 1, blocks


def _kron_norm_gpu(w1, inner, cross, scale, *, axis):
    import cupy

    out = cupy.empty((cross.shape[1],), cross.dtype)
    if out.size:
        sizes = _norm_sizes(w1, inner, axis)
        grid = ((out.size + 127) // 128,)
        kernel("kron_square.cu", "kron_norm", out.dtype)(
            grid, (128,), w1, inner, cross, scale, out, *sizes
        )
    return out


def _kron_norm_vjp(needs, out, w1, inner, cross, scale, *, axis):
    def pull(g):
        run = _kron_norm_d_gpu if on_gpu(g) else _kron_norm_d_cpu
        return (*run(g, w1, inner, cross, scale, axis), None)

    return pull


def _kron_norm_d_cpu(g, w1, inner, cross, scale, axis):
    w, s = _turned(w1, axis), scale
    q = 2 * s * g.reshape(w.shape[0], -1)
    z = cross.reshape(w.shape[1], w.shape[0], -1)
    dw = np.einsum("oi,eoi->oe", q, z) + s * w * (q @ inner)[:, None]
    dinner = s / 2 * ((w * w).sum(axis=1) @ q)
    dcross = np.einsum("oi,oe->eoi", q, w).reshape(cross.shape)
    return np.ascontiguousarray(_turned(dw, axis)), dinner, dcross


def _kron_norm_d_gpu(g, w1, inner, cross, scale, axis):
    import cupy

    dw1, terms = cupy.zeros(w1.shape, g.dtype), cupy.empty(g.shape, g.dtype)
    dcross = cupy.empty(cross.shape, g.dtype)
    sizes = _norm_sizes(w1, inner, axis)
    outer, loops, width = sizes[:3]
    if cross.size:
        kernel("kron_square.cu", "kron_norm_dw1", g.dtype)(
            (outer, loops), (128,), g, w1, inner, cross, scale, dw1, *sizes
        )
        kernel("kron_square.cu", "kron_norm_d", g.dtype)(
            ((g.size + 127) // 128,), (128,), g, w1, scale, terms, dcross, *sizes
        )
    return dw1, column_sum(terms.reshape(outer, width)), dcross


_kron_norm = Primitive("kron_norm", _kron_norm_cpu, _kron_norm_gpu, _kron_norm_vjp)
