"""The Hadamard product of two low-rank weights (LoHa), and its exact factors of rank R1 * R2.

Hyeon-Woo et al. 2022, "FedPara", arXiv 2108.06098.
"""

from __future__ import annotations

from math import prod

import numpy as np

from ..arrays import (
    Array,
    like,
    on_gpu,
    require_axes,
    require_float,
    require_same,
    wide,
    wide_dtype,
)
from ..errors import ShapeError
from ..kernels import kernel
from ..tape import Primitive, value_of
from .dense import matmul
from .elementwise import cast, require_factor
from .low_rank import low_rank_gradients, same_dtype


def hadamard_weight(
    down1: Array, up1: Array, down2: Array, up2: Array, scale: Array | None = None
) -> Array:
    """out[t] = scale[0] * (down1[t] @ up1) * (down2[t] @ up2), elementwise: the update of a LoHa.

    down1, down2: (taps, IN, R). up1, up2: (1, R, OUT). scale: (1,) wide, a constant, or None for 1.
    Returns (taps, IN, OUT), wide. Raises ShapeError, DtypeError.
    """
    for name, factor in (("down1", down1), ("up1", up1), ("down2", down2), ("up2", up2)):
        require_axes(factor, 3, name, "(taps, IN, R) or (1, R, OUT)")
    down1, up1, down2, up2 = same_dtype(down1, up1, down2, up2)
    taps, inputs, _ = down1.shape
    for name, factor, expected in (
        ("up1", up1, (1, down1.shape[2], up1.shape[2])),
        ("down2", down2, (taps, inputs, down2.shape[2])),
        ("up2", up2, (1, down2.shape[2], up1.shape[2])),
    ):
        if tuple(factor.shape) != expected:
            raise ShapeError(f"{name} has shape {tuple(factor.shape)}, expected {expected}")
    if scale is not None:
        require_factor(scale, down1)
    return _hadamard_weight(down1, up1, down2, up2, scale)


def face_split(a: Array, b: Array, axis: int = -1) -> Array:
    """out[..., p * Q + q, ...] = a[..., p, ...] * b[..., q, ...] along one axis (-1 or -2), the
    other axes alike.

    (down1 @ up1) * (down2 @ up2) = face_split(down1, down2, -1) @ face_split(up1, up2, -2),
    exactly, with rank R1 * R2: the way to apply a LoHa without building it. Returns the dtype of a.
    Slyusar 1999 (face-splitting product).
    """
    require_float(value_of(a), "a")
    require_same("a", value_of(a), "b", value_of(b))
    if axis not in (-1, -2):
        raise ShapeError(f"axis {axis} must be -1 or -2")
    kept = list(a.shape)
    kept[axis] = b.shape[axis] if b.ndim == a.ndim else -1
    if tuple(kept) != tuple(b.shape):
        raise ShapeError(
            f"b has shape {tuple(b.shape)}, expected that of a, {tuple(a.shape)}, but for axis "
            f"{axis}"
        )
    return _face_split(a, b, axis=axis)


def _hadamard_cpu(down1, up1, down2, up2, scale):
    out = matmul(down1, up1, scale=scale)
    out *= matmul(down2, up2)
    return out


def _hadamard_gpu(down1, up1, down2, up2, scale):
    import cupy

    (taps, inputs, r1), r2, outputs = down1.shape, down2.shape[2], up1.shape[2]
    out = cupy.empty((taps, inputs, outputs), wide_dtype(down1.dtype))
    if out.size:
        grid = ((outputs + 63) // 64, (inputs + 63) // 64, taps)
        sizes = (inputs, r1, r2, outputs)
        kernel("hadamard.cu", "hadamard_weight", down1.dtype)(
            grid, (256,), down1, up1, down2, up2, scale, out, *sizes
        )
    return out


def _terms(g, down1, up1, down2, up2, scale):
    """scale * g * (down2 @ up2) and scale * g * (down1 @ up1): the cotangents of the two low-rank
    products.
    """
    if not on_gpu(g):
        g = wide(g) if scale is None else wide(g) * scale
        return g * matmul(down2, up2), g * matmul(down1, up1)
    import cupy

    (taps, inputs, r1), r2, outputs = down1.shape, down2.shape[2], up1.shape[2]
    first, second = cupy.empty(g.shape, g.dtype), cupy.empty(g.shape, g.dtype)
    if g.size:
        grid = ((outputs + 63) // 64, (inputs + 63) // 64, taps)
        arrays = (g, down1, up1, down2, up2, scale, first, second)
        kernel("hadamard.cu", "hadamard_terms", down1.dtype)(
            grid, (256,), *arrays, inputs, r1, r2, outputs
        )
    return first, second


def hadamard_matrix(down1, up1, down2, up2, scale):
    """`hadamard_weight` of plain arrays of one dtype."""
    run = _hadamard_gpu if on_gpu(down1) else _hadamard_cpu
    return run(down1, up1, down2, up2, scale)


def hadamard_gradients(needs, g, down1, up1, down2, up2, scale):
    """Wide, of the four factors, for a cotangent g of their `hadamard_weight`; None for one that is
    not needed."""
    first, second = _terms(cast(g, wide_dtype(down1.dtype)), down1, up1, down2, up2, scale)
    one = low_rank_gradients(needs[:2], first, down1, up1, None)
    return (*one, *low_rank_gradients(needs[2:4], second, down2, up2, None))


def _hadamard_vjp(needs, out, down1, up1, down2, up2, scale):
    return lambda g: (*hadamard_gradients(needs, g, down1, up1, down2, up2, scale), None)


_hadamard_weight = Primitive("hadamard_weight", _hadamard_cpu, _hadamard_gpu, _hadamard_vjp)


def _split_sizes(a, b, axis):
    """(outer, P, Q, inner): the axes before, of and after the split one."""
    inner = a.shape[-1] if axis == -2 else 1
    return prod(a.shape[:axis]), a.shape[axis], b.shape[axis], inner


def _split_shape(a, b, axis):
    shape = list(a.shape)
    shape[axis] = a.shape[axis] * b.shape[axis]
    return tuple(shape)


def _face_split_cpu(a, b, *, axis):
    outer, p, q, inner = _split_sizes(a, b, axis)
    out = wide(a).reshape(outer, p, 1, inner) * wide(b).reshape(outer, 1, q, inner)
    return like(out, a).reshape(_split_shape(a, b, axis))


def _face_split_gpu(a, b, *, axis):
    import cupy

    outer, p, q, inner = _split_sizes(a, b, axis)
    out = cupy.empty(_split_shape(a, b, axis), a.dtype)
    if out.size:
        grid = (min((out.size + 255) // 256, 1 << 20),)
        kernel("hadamard.cu", "face_split", a.dtype)(grid, (256,), a, b, out, outer, p, q, inner)
    return out


def _face_split_vjp(needs, out, a, b, *, axis):
    def pull(g):
        sizes = _split_sizes(a, b, axis)
        g = cast(g, wide_dtype(a.dtype))
        da, db = (_face_split_d_gpu if on_gpu(a) else _face_split_d_cpu)(g, a, b, *sizes)
        return da.reshape(a.shape), db.reshape(b.shape)

    return pull


def _face_split_d_cpu(g, a, b, outer, p, q, inner):
    g, a, b = (
        g.reshape(outer, p, q, inner),
        wide(a).reshape(outer, p, inner),
        wide(b).reshape(outer, q, inner),
    )
    return np.einsum("opqi,oqi->opi", g, b), np.einsum("opqi,opi->oqi", g, a)


def _face_split_d_gpu(g, a, b, outer, p, q, inner):
    import cupy

    if not g.size:
        return cupy.zeros(a.shape, g.dtype), cupy.zeros(b.shape, g.dtype)
    da, db = cupy.empty(a.shape, g.dtype), cupy.empty(b.shape, g.dtype)
    grid = (min((outer * max(p, q) * inner + 255) // 256, 1 << 20), 2)
    kernel("hadamard.cu", "face_split_d", a.dtype)(
        grid, (256,), g, a, b, da, db, outer, p, q, inner
    )
    return da, db


# The factors' gradients stay wide: they are sums already, and end in sums.
_face_split = Primitive(
    "face_split", _face_split_cpu, _face_split_gpu, _face_split_vjp, keeps_wide=True
)
