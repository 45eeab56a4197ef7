"""New adapters by a recipe: the way from a recipe to what an engine holds."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..adapters import Dropout
from ..attachment import Attachment
from ..layers import Layer
from .matching import match
from .recipe import Recipe
from .report import AddReport, report_of


def new_attachment(
    name: str,
    recipe: Recipe,
    layers: Mapping[str, Layer],
    device: str,
    dtype,
    seed: int,
    strength: float,
) -> tuple[Attachment, AddReport]:
    """Adapters that change nothing yet, with first factors drawn from `seed` in the order of the
    layers, and the report of what was matched.
    """
    matching = match(recipe, {layer: one.shape for layer, one in layers.items()})
    rng = np.random.default_rng(seed)
    made = {
        layer: (adapter, adapter.start(rng, layers[layer].matrix))
        for layer, adapter in matching.adapters.items()
    }
    attached = Attachment(made, device, dtype, strength, layers=layers)
    attached.dropout = Dropout(**recipe.dropout, seed=seed)
    return attached, report_of(name, recipe, matching, layers, attached, dtype)
