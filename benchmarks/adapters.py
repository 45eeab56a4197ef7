"""The adapters that are measured, as every table names them, and their factors."""

from __future__ import annotations

import numpy as np

from lycoris_cupy import Adapter, Full, LayerShape, LoCon, LoHa, LoKr
from lycoris_cupy.arrays import module_of

from .reference import changes

# A change half as large as what it changes, so that errors of both count.
SHARE = 0.5
Group = tuple[Adapter, ...]


def adapters(layer: LayerShape) -> dict[str, Group]:
    """Name -> the adapters that sit on the layer together. Those that the layer cannot have, or
    that are another row's very form on it, are left out.
    """
    lora = LoCon(layer, 16, 16.0)
    kron = LoKr.create(layer, 10**6, factor=8)
    out: dict[str, Group] = {
        "LoRA r16": (lora,),
        "LoRA r64": (LoCon(layer, 64, 64.0),),
        "LoHa r16": (LoHa(layer, 16, 16.0),),
        "LoKr factor 8": (kron,),
    }
    factored = LoKr.create(layer, 16, 16.0, factor=8)
    if factored.w2_rank is not None:
        out["LoKr factor 8 r16"] = (factored,)
    if layer.taps > 1:
        out["LoCon Tucker r16"] = (LoCon(layer, 16, 16.0, tucker=True),)
        out["LoHa Tucker r16"] = (LoHa(layer, 16, 16.0, tucker=True),)
        out["LoCon r16, an up a tap"] = (LoCon(layer, 16, 16.0, per_tap=True),)
        tucker = LoKr.create(layer, 16, 16.0, factor=8, tucker=True)
        if tucker.tucker:
            out["LoKr Tucker factor 8 r16"] = (tucker,)
    out["Full"] = (Full(layer),)
    out["LoRA r16 + LoKr factor 8"] = (lora, kron)
    return out


def builders(layer: LayerShape) -> dict[str, Group]:
    """The adapters whose change of the weight is built in one pass."""
    made = adapters(layer)
    made["LoKr factor 8 r16, w1 factored"] = (
        LoKr.create(layer, 3, 3.0, factor=8, decompose_both=True),
    )
    skipped = ("LoRA r64", "LoCon r16, an up a tap", "LoRA r16 + LoKr factor 8")
    return {name: group for name, group in made.items() if name not in skipped}


def factors(adapter: Adapter, x, out_size: float, share: float, seed: int) -> dict[str, np.ndarray]:
    """Random f32 factors in Flame layout that change the output by `share` of out_size.

    x: (samples, taps, IN) f64 patches of the input, see `reference`. Every factor is of one size;
    the last one carries what is left, so that no reader's scale has to.
    """
    rng = np.random.default_rng(seed)
    made = {n: rng.standard_normal(v.shape, np.float32) for n, v in adapter.init(rng).items()}
    made = {n: v / np.float32(np.sqrt(np.prod(v.shape[:-1], dtype=float))) for n, v in made.items()}
    change = changes(adapter, {n: module_of(x).asarray(v) for n, v in made.items()}, x)
    last = list(made)[-1]
    made[last] = made[last] * np.float32(share * out_size / float((change**2).mean()) ** 0.5)
    return made
