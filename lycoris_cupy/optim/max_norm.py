"""Scale-weight-norm: the change of a layer is kept within a norm, by scaling its factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ..adapters import Adapter
from ..adapters.stacked import Stacked
from ..arrays import Array, to_device, wide_dtype
from ..errors import LycorisError
from ..spectrum import spectrum_of

# Factors whose product the change is; of a rotation, what its norm is taken of.
_PRODUCTS = ("locon", "loha", "lokr")
_ROTATIONS = ("diag-oft", "boft")


class NormReport(NamedTuple):
    """scaled: how many layers were above the bound. mean, largest: of the norms after it."""

    scaled: int
    mean: float
    largest: float


def apply_max_norm(
    adapters: Mapping[str, Adapter],
    masters: Mapping[str, Mapping[str, Array]],
    bound: float,
) -> NormReport:
    """Scale the factors, in place, of every layer whose change has a norm above the bound.

    adapters: layer -> Adapter, as `engine.attachments[name].adapters`. masters: layer -> factor ->
    Flame array, an optimizer's; give them to `engine.set_parameters` afterwards. The norm is
    Frobenius's, of alpha / rank times the change at strength 1, from the factors in f64 on the CPU:
    LoCon, LoHa and LoKr are never multiplied out. The t factors of a product are each multiplied by
    (bound / norm)^(1/t), so that their balance stays. Of Diag-OFT and BOFT the norm is that of the
    blocks, and those are scaled. Magnitudes, biases and all other algorithms are left alone, as
    LyCORIS does. Reads values: call it between steps, not inside a captured one. Raises
    LycorisError for a bound that is not above 0.
    """
    if not 0 < bound < float("inf"):
        raise LycorisError(f"the bound of the norm is {bound}, expected a number above 0")
    norms, scaled = [], 0
    for layer, factors in masters.items():
        adapter = _plain(adapters[layer])
        if adapter.algorithm in _PRODUCTS:
            taken = list(adapter.factors())
            host = {name: to_device(factors[name], "cpu") for name in taken}
            norm = spectrum_of(adapter, host, vectors=False).norm
        elif adapter.algorithm in _ROTATIONS:
            taken = ["blocks"]
            norm = float(np.linalg.norm(to_device(factors["blocks"], "cpu").astype(np.float64)))
        else:
            continue
        if norm > bound:
            ratio = (bound / norm) ** (1 / len(taken))
            for name in taken:
                p = factors[name]
                p[...] = (p.astype(wide_dtype(p.dtype), copy=False) * ratio).astype(p.dtype)
            norm, scaled = bound, scaled + 1
        norms.append(norm)
    if not norms:
        return NormReport(0, 0.0, 0.0)
    return NormReport(scaled, float(np.mean(norms)), max(norms))


def _plain(adapter: Adapter) -> Adapter:
    """Without what stands on it, such as a magnitude or a bias: they are no part of the norm."""
    while isinstance(adapter, Stacked):
        adapter = adapter.on
    return adapter
