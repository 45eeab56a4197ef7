"""DoRA written from its definition in f64, through the adapted weight; and what its rounding errors
are measured against.
"""

import numpy as np

from lycoris_cupy import Tape
from lycoris_cupy.ops import product, product_dw, product_dx


def parts(matrix, adapter, factors):
    """(change at alpha / rank, norms, magnitudes over norms), along the axis with the others 1."""
    on = adapter.on
    p = {name: v for name, v in factors.items() if name != "dora_scale"}
    delta = on.delta_weight(matrix, on.canonical(p), np.array([on.scale]))
    over = (0, 1) if adapter.axis == "output" else (0, 2)
    norm = np.sqrt(((matrix + delta) ** 2).sum(axis=over, keepdims=True))
    return delta, norm, factors["dora_scale"].reshape(norm.shape) / (norm + 2.0**-52)


def adapted(matrix, adapter, factors, strength):
    """The weight, (taps, IN, OUT), with this adapter."""
    delta, _, c = parts(matrix, adapter, factors)
    v = matrix + delta
    if adapter.rule == "reference":
        return v * (1 + strength * (c - 1))
    return matrix + strength * (c * v - matrix)


def _absolute(matrix, adapter, factors, strength):
    """(|c|, what multiplies the change, the change, its factors as Vars, the weight), over absolute
    values.
    """
    on, s = adapter.on, abs(strength)
    c = np.abs(parts(matrix, adapter, factors)[2])
    p = on.canonical({n: np.abs(v) for n, v in factors.items() if n != "dora_scale"})
    tape = Tape()
    watched = {n: tape.watch(v) for n, v in p.items()}
    change = on.delta_weight(np.abs(matrix), watched, np.array([abs(on.scale)]))
    own = s * c if adapter.rule == "base" else 1 + s * (c + 1)
    weight = (1 + s * (1 + c)) * np.abs(matrix) + own * change.value
    return c, own, change, watched, weight


def weight_size(matrix, adapter, factors, strength):
    """The adapted weight as a sum of absolute values.

    The norms are those of the signed weight: they are not a sum that rounding can blow up.
    """
    return _absolute(matrix, adapter, factors, strength)[-1]


def sizes(layer, adapter, factors, x, dy, strength):
    """(y, dx, gradient of each factor, weight), as sums of absolute values."""
    plain = np.abs(layer.matrix)
    c, own, change, watched, weight = _absolute(layer.matrix, adapter, factors, strength)
    norm, s = parts(layer.matrix, adapter, factors)[1], abs(strength)
    bias = None if layer.bias is None else np.abs(layer.bias)
    x, dy = np.abs(x), np.abs(dy)
    space = x.shape[1:-1] if layer.window.axes else ()
    size_x = product_dx(dy, weight, layer.window, space)
    g = product_dw(x, dy, layer.window)
    over = (0, 1) if adapter.axis == "output" else (0, 2)
    v = plain + change.value
    q = (g * v).sum(axis=over, keepdims=True)
    # Through the change itself, and through its norm: both add up, whatever their signs.
    flow = g * own + v * (s * c * q / norm**2)
    grads = change.tape.gradients(change, flow, list(watched.values()))
    grads = {n: d.reshape(factors[n].shape) for n, d in zip(watched, grads, strict=True)}
    grads["dora_scale"] = (s * q / norm).reshape(factors["dora_scale"].shape)
    return product(x, weight, layer.window, bias=bias), size_x, grads, weight
