"""What a layer with adapters gives in f64: outputs and input gradients at some positions, and every
gradient of the factors.

Written from the formulas, apart from the package: an algorithm's change of the weight is one
product of its factors, linear in each, so one line of subscripts gives the change and all its
gradients. On NumPy or CuPy arrays.
"""

from __future__ import annotations

import numpy as np

from lycoris_cupy import Adapter, Full, LoCon, LoHa, LoKr
from lycoris_cupy.arrays import module_of

from .ulp import f64

# taps t; inputs i = (m, n); outputs o = (l, k); ranks the rest.
_LOHA_TUCKER = {"w1_down": "ip", "t1": "tpr", "w1_up": "ro", "w2_down": "iq", "t2": "tqs"}


def subscripts(adapter: Adapter) -> tuple[dict[str, str], str]:
    """Factor -> its subscripts, and those of the change."""
    if isinstance(adapter, Full):
        return {"diff": "tio"}, "tio"
    if isinstance(adapter, LoCon):
        if adapter.tucker:
            return {"down": "iq", "mid": "tqr", "up": "ro"}, "tio"
        return {"down": "tir", "up": "tro" if adapter.per_tap else "ro"}, "tio"
    if isinstance(adapter, LoHa):
        if adapter.tucker:
            return {**_LOHA_TUCKER, "w2_up": "so"}, "tio"
        return {"w1_down": "tir", "w1_up": "ro", "w2_down": "tis", "w2_up": "so"}, "tio"
    if isinstance(adapter, LoKr):
        out = {"w1": "lm"} if adapter.w1_rank is None else {"w1_a": "la", "w1_b": "am"}
        if adapter.w2_rank is None:
            out["w2"] = "tnk"
        elif adapter.tucker:
            out.update(w2_down="nq", t2="tqr", w2_up="rk")
        else:
            out.update(w2_down="tnr", w2_up="rk")
        return out, "tmnlk"
    raise TypeError(f"no reference formula for {type(adapter).__name__}")


def canonical(adapter: Adapter, p) -> dict:
    """Factors in f64 with one axis a subscript."""
    shapes = {name: form.canonical(adapter.shape) for name, form in adapter.factors().items()}
    names, _ = subscripts(adapter)
    return {n: f64(p[n]).reshape(shapes[n][len(shapes[n]) - len(s) :]) for n, s in names.items()}


def _out_shape(adapter: Adapter) -> tuple[int, ...]:
    shape = adapter.shape
    if isinstance(adapter, LoKr):
        rows, columns, blocks, width = adapter.split
        return (shape.taps, blocks, width, rows, columns)
    return (shape.taps, shape.inputs, shape.outputs)


def delta(adapter: Adapter, p):
    """The change of the weight, (taps, IN, OUT) f64, its scale included."""
    names, out = subscripts(adapter)
    xp, values = module_of(next(iter(p.values()))), canonical(adapter, p)
    made = xp.einsum(f"{','.join(names.values())}->{out}", *values.values(), optimize=True)
    shape = adapter.shape
    return made.reshape(shape.taps, shape.inputs, shape.outputs) * adapter.scale


def gradients(adapter: Adapter, p, dw) -> dict:
    """Factor -> the gradient of <dw, delta>, f64, in Flame layout.  dw: (taps, IN, OUT) f64."""
    names, out = subscripts(adapter)
    xp, values = module_of(dw), canonical(adapter, p)
    dw = dw.reshape(_out_shape(adapter)) * adapter.scale
    made = {}
    for name, own in names.items():
        others = {n: s for n, s in names.items() if n != name}
        spec = f"{','.join([out, *others.values()])}->{own}"
        found = xp.einsum(spec, dw, *(values[n] for n in others), optimize=True)
        made[name] = found.reshape(p[name].shape)
    return made


def changes(adapter: Adapter, p, x):
    """The change of the output at the sampled positions, (samples, OUT) f64.  x: their patches."""
    xp = module_of(x)
    return xp.tensordot(x, delta(adapter, p), axes=((1, 2), (0, 1)))


def patches(a, at, window, mirrored: bool = False):
    """(samples, taps, C) f64: what a walks over at the flat positions `at`; zero outside.

    a: channels last. mirrored: what the gradient of the input at `at` walks over, tap by tap.
    Stride 1, undilated, extents kept.
    """
    xp = module_of(a)
    if not window.axes:
        return f64(rows_at(a, at))[:, None]
    n, *space = a.shape[:-1]
    places = xp.stack(xp.unravel_index(at, (n, *space)))  # (1 + axes, samples)
    out = []
    for tap in np.ndindex(*window.kernel):
        offset = [k - p for k, p in zip(tap, window.padding, strict=True)]
        moved = places.copy()
        inside = xp.ones(len(at), bool)
        for axis, (shift, extent) in enumerate(zip(offset, space, strict=True), 1):
            moved[axis] += -shift if mirrored else shift
            inside &= (moved[axis] >= 0) & (moved[axis] < extent)
            moved[axis] = moved[axis].clip(0, extent - 1)
        flat = xp.ravel_multi_index(tuple(moved), (n, *space))
        out.append(f64(rows_at(a, flat)) * inside[:, None])
    return xp.stack(out, 1)


def rows_at(a, at):
    """(samples, C): the last axis of a, bf16, at flat positions."""
    # As integers: no library has to know how to gather bf16.
    return a.reshape(-1, a.shape[-1]).view(np.uint16)[at].view(a.dtype)


def weight_gradient(x, dy, window):
    """x^T dy for every tap, (taps, IN, OUT) f64."""
    xp = module_of(x)
    flat = f64(dy.reshape(-1, dy.shape[-1]))
    if not window.axes:
        return (f64(x.reshape(-1, x.shape[-1])).T @ flat)[None]
    padded = xp.pad(f64(x), [(0, 0), *((p, p) for p in window.padding), (0, 0)], mode="constant")
    out = []
    for tap in np.ndindex(*window.kernel):
        part = (slice(k, k + n) for k, n in zip(tap, x.shape[1:-1], strict=True))
        out.append(padded[(slice(None), *part)].reshape(-1, x.shape[-1]).T @ flat)
    return xp.stack(out)
