"""AddedLayer: what a layer got, in numbers."""

from __future__ import annotations

import math
from typing import NamedTuple

from ..adapters import Adapter
from ..adapters.stacked import Stacked
from ..layers import Layer


class AddedLayer(NamedTuple):
    """rank, alpha: None where the algorithm has none. base_parameters: of the layer itself. note:
    why a rank and an alpha that were given have no effect, or that there is a Tucker core.
    """

    layer: str
    shape: str
    algorithm: str
    rank: int | None
    alpha: float | None
    scale: float
    parameters: int
    base_parameters: int
    note: str = ""


def added_layer(name: str, adapter: Adapter, layer: Layer) -> AddedLayer:
    """Of a new adapter on a layer."""
    ranked = adapter.has_rank
    alpha = adapter.alpha or float(adapter.rank)
    return AddedLayer(
        name,
        str(adapter.shape),
        adapter.title,
        adapter.rank if ranked else None,
        alpha if ranked else None,
        adapter.reported_scale,
        sum(math.prod(f.canonical(adapter.shape)) for f in adapter.factors().values()),
        layer_size(layer),
        _note(adapter),
    )


def _note(adapter: Adapter) -> str:
    if adapter.ignores_alpha:
        return adapter.scale_reason
    under = adapter.on if isinstance(adapter, Stacked) else adapter
    return "Tucker core" if getattr(under, "tucker", False) else ""


def layer_size(layer: Layer) -> int:
    """Its parameters."""
    return layer.weight.size + (0 if layer.bias is None else layer.bias.size)
