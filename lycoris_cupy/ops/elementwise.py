"""Elementwise operations: cast, add, multiply, scale, prelu.

Sums are wide, results are rounded once to the dtype of the first argument. Shapes must be equal:
only a slope of shape (C,) is spread, over the last axis.
"""

from __future__ import annotations

import numpy as np

from ..arrays import Array, dtype_of, like, on_gpu, require_float, require_same, wide, wide_dtype
from ..errors import ShapeError
from ..kernels import kernel
from ..tape import Primitive, value_of
from .columns import column_sum


def cast(x: Array, dtype) -> Array:
    """x in another of the dtypes bf16, f32, f64, rounded to nearest even; x itself when it has that
    dtype already.
    """
    dtype = dtype_of(dtype)
    require_float(value_of(x), "x")
    return x if x.dtype == dtype else _cast(x, dtype=dtype)


def add(a: Array, b: Array) -> Array:
    """a + b, same shape and dtype. Residual connections."""
    _require_pair(a, b)
    return _add(a, b)


def multiply(a: Array, b: Array) -> Array:
    """a * b elementwise, same shape and dtype."""
    _require_pair(a, b)
    return _multiply(a, b)


def scale(x: Array, factor: Array) -> Array:
    """factor[0] * x. factor: (1,) in the wide dtype, on the device of x; it is a constant of the
    tape.
    """
    require_factor(factor, x)
    return _scale(x, factor)


def prelu(x: Array, slope: Array) -> Array:
    """max(x, 0) + slope * min(x, 0).  x: (..., C). slope: (C,) of the dtype of x.  He et al. 2015,
    arXiv 1502.01852.
    """
    if slope.shape != x.shape[-1:]:
        raise ShapeError(f"slope has shape {tuple(slope.shape)}, expected {tuple(x.shape[-1:])}")
    require_same("x", value_of(x), "slope", value_of(slope))
    return _prelu(x, slope)


def require_factor(factor: Array, x: Array) -> None:
    """Raise unless factor is a one-element array of the wide dtype of x."""
    if value_of(factor).shape != (1,) or factor.dtype != wide_dtype(x.dtype):
        raise ShapeError(
            f"factor has shape {tuple(factor.shape)} and dtype {factor.dtype}, expected (1,) and "
            f"{wide_dtype(x.dtype)}"
        )


def _require_pair(a, b) -> None:
    require_float(value_of(a), "a")
    require_same("a", value_of(a), "b", value_of(b))
    if a.shape != b.shape:
        raise ShapeError(f"b has shape {tuple(b.shape)}, expected that of a, {tuple(a.shape)}")


def _launch(op: str, dtype, size: int, *args) -> None:
    if size:
        # 2048 elements a block: 16 bytes a thread of a bf16.
        kernel("elementwise.cu", op, dtype)((min((size + 2047) // 2048, 65535),), (256,), *args)


def _out(x, dtype=None):
    import cupy

    return cupy.empty(x.shape, dtype or x.dtype)


def _cast_gpu(x, *, dtype):
    out, kept = _out(x, dtype), wide_dtype(x.dtype)
    if dtype == kept:  # bf16 -> f32
        _launch("widen", x.dtype, x.size, x, out, x.size)
    elif x.dtype == wide_dtype(dtype):  # f32 -> bf16
        _launch("narrow", dtype, x.size, x, out, x.size)
    else:  # to or from f64: for checking only
        out = x.astype(dtype)
    return out


_cast = Primitive(
    "cast",
    cpu=lambda x, *, dtype: x.astype(dtype),
    gpu=_cast_gpu,
    vjp=lambda needs, out, x, *, dtype: lambda g: (g,),
    keeps_wide=True,
)


def _binary(op: str):
    def gpu(a, b):
        out = _out(a)
        _launch(op, a.dtype, a.size, a, b, out, a.size)
        return out

    return gpu


_add = Primitive(
    "add",
    cpu=lambda a, b: like(wide(a) + wide(b), a),
    gpu=_binary("add"),
    vjp=lambda needs, out, a, b: lambda g: (g, g),
)


def _multiply_vjp(needs, out, a, b):
    a, b = (a if needs[1] else None), (b if needs[0] else None)
    return lambda g: (_multiply(g, b) if needs[0] else None, _multiply(g, a) if needs[1] else None)


_multiply = Primitive(
    "multiply",
    cpu=lambda a, b: like(wide(a) * wide(b), a),
    gpu=_binary("multiply"),
    vjp=_multiply_vjp,
)


def _scale_gpu(x, factor):
    out = _out(x)
    _launch("scale", x.dtype, x.size, x, factor, out, x.size)
    return out


_scale = Primitive(
    "scale",
    cpu=lambda x, factor: like(wide(x) * factor, x),
    gpu=_scale_gpu,
    vjp=lambda needs, out, x, factor: lambda g: (_scale(g, factor), None),
)


def _prelu_gpu(x, slope):
    out = _out(x)
    _launch("prelu", x.dtype, x.size, x, slope, out, x.size, x.shape[-1])
    return out


def _prelu_dx_gpu(x, slope, g):
    dx = _out(x)
    _launch("prelu_dx", x.dtype, x.size, x, slope, g, dx, x.size, x.shape[-1])
    return dx


def _prelu_terms_gpu(x, g):
    terms = _out(x, wide_dtype(x.dtype))
    _launch("prelu_terms", x.dtype, x.size, x, g, terms, x.size)
    return terms


def _prelu_cpu(x, slope):
    v = wide(x)
    return like(np.maximum(v, 0) + np.minimum(v, 0) * wide(slope), x)


def _prelu_dx_cpu(x, slope, g):
    return like(np.where(wide(x) < 0, wide(g) * wide(slope), wide(g)), x)


def _prelu_terms_cpu(x, g):
    return wide(g) * np.minimum(wide(x), 0)


def _prelu_vjp(needs, out, x, slope):
    # Each half by itself: the slopes of a network are mostly frozen, and the terms are wide.
    on = on_gpu(x)
    dx, terms = (_prelu_dx_gpu, _prelu_terms_gpu) if on else (_prelu_dx_cpu, _prelu_terms_cpu)
    return lambda g: (
        dx(x, slope, g) if needs[0] else None,
        column_sum(terms(x, g)) if needs[1] else None,
    )


_prelu = Primitive("prelu", _prelu_cpu, _prelu_gpu, _prelu_vjp)
