"""From squared norms of an adapted weight to the factors that give it trained magnitudes.

DoRA; Liu et al. 2024, arXiv 2402.09353. Everything here is as long as a side of a layer, and wide.
"""

from __future__ import annotations

import numpy as np

from ..arrays import Array, on_gpu, require_axes, require_float, require_same, wide_dtype
from ..errors import DtypeError, ShapeError
from ..kernels import kernel
from ..tape import Primitive, value_of
from .elementwise import require_factor


def magnitude(m: Array, square: Array, strength: Array) -> Array:
    """strength[0] * m / (sqrt(square) + eps), eps that of the dtype: LyCORIS adds it to the norm.

    m, square: (N,) wide. strength: (1,), a constant of the tape. A sum of squares that rounding
    made negative counts as 0, where the norm has no derivative and passes none on, as in torch.
    Raises ShapeError, DtypeError.
    """
    _require_vectors(m, square, "square")
    require_factor(strength, m)
    return _magnitude(m, square, strength)


def shifted(k: Array, strength: Array, total: Array | None = None) -> Array:
    """(total or 1) + k - strength[0]: what the base product is multiplied by when an adapter puts
    strength * (W' - W) = k * (W + change) - strength * W beside it. Exactly total at strength 0.
    """
    if total is not None:
        _require_vectors(k, total, "total")
    require_factor(strength, k)
    return _shifted(k, strength, total)


def _require_vectors(a: Array, b: Array, name: str) -> None:
    require_float(value_of(a), "m")
    if a.dtype != wide_dtype(a.dtype):
        raise DtypeError(f"m is {a.dtype}, expected the wide dtype {wide_dtype(a.dtype)}")
    require_axes(a, 1, "m", "(N,)")
    require_same("m", value_of(a), name, value_of(b))
    if tuple(a.shape) != tuple(b.shape):
        raise ShapeError(f"{name} has shape {tuple(b.shape)}, expected {tuple(a.shape)}")


def _eps(dtype) -> float:
    return float(np.finfo(dtype).eps)


def _launch(op: str, x, *args) -> None:
    if x.size:
        grid = ((x.size + 255) // 256,)
        kernel("magnitude.cu", op, x.dtype)(grid, (256,), *args, x.size)


def _magnitude_cpu(m, square, strength):
    return strength * m / (np.sqrt(np.maximum(square, 0)) + _eps(m.dtype))


def _magnitude_gpu(m, square, strength):
    import cupy

    out = cupy.empty(m.shape, m.dtype)
    _launch("magnitude", m, m, square, strength, out, _eps(m.dtype))
    return out


def _gradients_cpu(g, m, square, strength):
    norm = np.sqrt(np.maximum(square, 0))
    dm = strength * g / (norm + _eps(m.dtype))
    slope = np.divide(m, 2 * norm * (norm + _eps(m.dtype)), out=np.zeros_like(m), where=norm > 0)
    return dm, -dm * slope


def _gradients_gpu(g, m, square, strength):
    import cupy

    dm, dsquare = cupy.empty(m.shape, m.dtype), cupy.empty(m.shape, m.dtype)
    _launch("magnitude_d", m, g, m, square, strength, dm, dsquare, _eps(m.dtype))
    return dm, dsquare


def _magnitude_vjp(needs, out, m, square, strength):
    def pull(g):
        return (*(_gradients_gpu if on_gpu(g) else _gradients_cpu)(g, m, square, strength), None)

    return pull


_magnitude = Primitive("magnitude", _magnitude_cpu, _magnitude_gpu, _magnitude_vjp)


def _shifted_cpu(k, strength, total):
    return (1 if total is None else total) + (k - strength)


def _shifted_gpu(k, strength, total):
    import cupy

    out = cupy.empty(k.shape, k.dtype)
    _launch("shifted", k, k, strength, total, out)
    return out


_shifted = Primitive(
    "shifted",
    _shifted_cpu,
    _shifted_gpu,
    vjp=lambda needs, out, k, strength, total: lambda g: (g, None, g if needs[2] else None),
)
