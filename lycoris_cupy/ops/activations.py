"""Activations: silu, gelu, relu. Values and slopes are computed wide and rounded once.

(prelu, whose slope is trained, is in elementwise.py.)
"""

from __future__ import annotations

import numpy as np

from ..arrays import Array, like, on_gpu, require_float, wide
from ..errors import LycorisError
from ..kernels import kernel
from ..tape import Primitive, value_of
from .normal import normal_below

GELU_FORMS = ("exact", "tanh")


def silu(x: Array) -> Array:
    """x / (1 + exp(-x)), elementwise; also called swish.  Elfwing et al. 2017, arXiv 1702.03118."""
    require_float(value_of(x), "x")
    return _silu(x)


def gelu(x: Array, *, form: str = "exact") -> Array:
    """x times the share of a standard normal distribution below x, elementwise.

    form: 'exact', or 'tanh' for x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2, which networks
    trained with that form need. Hendrycks & Gimpel 2016, arXiv 1606.08415.
    """
    require_float(value_of(x), "x")
    if form not in GELU_FORMS:
        raise LycorisError(f"gelu: form {form!r} is unknown, expected one of {GELU_FORMS}")
    return _gelu(x) if form == "exact" else _gelu_tanh(x)


def relu(x: Array) -> Array:
    """max(x, 0), elementwise; its slope at 0 is 0, and NaN stays NaN."""
    require_float(value_of(x), "x")
    return _relu(x)


_PIECE = 1 << 15  # elements at a time on the CPU: what is in between then stays in a cache


def _sigmoid(v):
    """1 / (1 + exp(-v)), to its last digits in both tails."""
    out = np.negative(v)
    with np.errstate(over="ignore"):  # 1 / infinity is the 0 that is meant
        np.exp(out, out=out)
    out += 1
    return np.reciprocal(out, out=out)


def _silu_slope(v):
    share = _sigmoid(v)
    return share + v * (share * _sigmoid(-v))


def _gelu_slope(v):
    below, density = normal_below(v)
    return below + v * density


def _tanh_inner(v):
    """(twice the argument of the tanh, its slope); v is held where both are finite: the sigmoid
    is 0 or 1 long before.
    """
    v = np.clip(v, -50, 50)
    square, twice = np.square(v), v.dtype.type(2 * np.sqrt(2 / np.pi))
    cube = v.dtype.type(0.044715)
    return twice * v * (1 + cube * square), twice * (1 + 3 * cube * square)


def _gelu_tanh_slope(v):
    inner, slope = _tanh_inner(v)
    share = _sigmoid(inner)
    return share + np.clip(v, -50, 50) * share * _sigmoid(-inner) * slope


def _launch(op: str, *arrays: Array) -> Array:
    """A kernel of activations.cu over arrays of one shape and dtype; returns a new one."""
    import cupy

    out = cupy.empty(arrays[0].shape, arrays[0].dtype)
    if out.size:
        # A thread takes 16 bytes at a time, a block 4 KiB; more blocks than the device holds.
        grid = (min(out.nbytes // 4096 + 1, 65535),)
        kernel("activations.cu", op, out.dtype)(grid, (256,), *arrays, out, out.size)
    return out


def _in_pieces(function, *arrays: np.ndarray) -> np.ndarray:
    """A function of wide arrays, made of bits of them at a time, in the dtype of the last."""
    flat = [array.reshape(-1) for array in arrays]
    out = np.empty(flat[-1].shape, arrays[-1].dtype)
    for start in range(0, out.size, _PIECE):
        piece = slice(start, start + _PIECE)
        out[piece] = like(function(*(wide(array[piece]) for array in flat)), out)
    return out.reshape(arrays[-1].shape)


def _activation(name: str, value, slope) -> Primitive:
    """A primitive of NumPy functions of a wide array, and the kernels `name` and `name`_d."""

    def vjp(needs, out, x):
        def pull(g):
            if on_gpu(g):
                return (_launch(f"{name}_d", g, x),)
            return (_in_pieces(lambda d, v: d * slope(v), g, x),)

        return pull

    return Primitive(name, lambda x: _in_pieces(value, x), lambda x: _launch(name, x), vjp)


_silu = _activation("silu", lambda v: v * _sigmoid(v), _silu_slope)
_gelu = _activation("gelu", lambda v: v * normal_below(v)[0], _gelu_slope)
_gelu_tanh = _activation("gelu_tanh", lambda v: v * _sigmoid(_tanh_inner(v)[0]), _gelu_tanh_slope)
_relu = _activation("relu", lambda v: np.maximum(v, 0), lambda v: (v > 0).astype(v.dtype))
