"""How far from f64 the plain composition of an adapter is: the base product rounded, every product
of the adapter's prologue rounded, the last one added to the base in f32, rounded again.

Emulated in f64 at sampled positions, so it needs no library and is the same on every machine. It is
the yardstick of a route's error: a route that extends the base product rounds once less.
"""

from __future__ import annotations

import numpy as np

from lycoris_cupy import Adapter, LoHa, LoKr, bf16, to_device
from lycoris_cupy.arrays import module_of

from . import reference

Step = tuple[str, object]  # subscripts and array of what the running product is multiplied by


def composed(base, chains):
    """bf16 roundings of base + change_1, + change_2, ...; f64.  chains: the changes."""
    total = _rounded(base)
    for change in chains:
        total = _rounded(total + change)
    return total


def change(adapter: Adapter, p, patches, mirrored: bool = False):
    """What an adapter's products add to the output at the sampled positions, (samples, OUT) f64,
    each but the last one rounded.

    patches: of x.  mirrored: what they add to the input gradient, (samples, IN), from dy's patches.
    """
    steps = _steps(adapter, p)
    split = isinstance(adapter, LoKr)
    rows, columns, blocks, width = adapter.split if split else (1, adapter.shape.outputs, 1, 0)
    inputs, outputs = ("mn", "lk") if split else ("i", "o")
    if mirrored:
        steps, inputs, outputs = steps[::-1], outputs, inputs
        last_axes = (rows, columns) if split else (adapter.shape.outputs,)
    else:
        last_axes = (blocks, width) if split else (adapter.shape.inputs,)
    xp, at = module_of(patches), f"zt{inputs}"
    value = patches.reshape(*patches.shape[:2], *last_axes)
    for i, (own, factor) in enumerate(steps):
        later = set("z" + outputs).union(*(s for s, _ in steps[i + 1 :]))
        out = "".join(dict.fromkeys(c for c in at + own if c in later))
        if i == len(steps) - 1:
            out = f"z{outputs}"
        value = xp.einsum(f"{at},{own}->{out}", value, factor, optimize=True)
        value, at = (value if i == len(steps) - 1 else _rounded(value)), out
    return value.reshape(len(patches), -1) * adapter.scale


def _steps(adapter: Adapter, p) -> list[Step]:
    """The products of the forward, in the order of least work."""
    names, _ = reference.subscripts(adapter)
    values = reference.canonical(adapter, p)
    xp = module_of(next(iter(values.values())))
    if isinstance(adapter, LoHa):  # exact factors of rank R^2
        downs = [values["w1_down"], values["w2_down"]]
        if adapter.tucker:
            downs = [
                _rounded(xp.einsum("ip,tpr->tir", down, values[core]))
                for down, core in zip(downs, ("t1", "t2"), strict=True)
            ]
        down = _rounded(xp.einsum("tia,tib->tiab", *downs))
        up = _rounded(xp.einsum("ao,bo->abo", values["w1_up"], values["w2_up"]))
        return [("tiab", down), ("abo", up)]
    if isinstance(adapter, LoKr):
        if adapter.w1_rank is None:
            mix = ("lm", values["w1"])
        else:
            mix = ("lm", _rounded(values["w1_a"] @ values["w1_b"]))
        rest = [(names[n], values[n]) for n in values if n.startswith(("w2", "t2"))]
        # The mix runs where the blocks are narrowest: before a full w2, else before w2_up.
        return [*rest[:-1], mix, rest[-1]]
    return [(names[n], values[n]) for n in values]


def _rounded(a):
    """To bf16 and back. On the CPU: these are samples."""
    host = to_device(a, "cpu").astype(bf16).astype(np.float64)
    return module_of(a).asarray(host)
