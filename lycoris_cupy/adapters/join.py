"""A layer with all its adapters: x * (W + sum of the changes) + bias, with one product by W.

An adapter that scales W too gives the Share (k - strength) * W of its change, and those sum to one
scale of the layer's own product:

    per output   y = (x * W) * C + changes + bias      C = 1 + sum of (k - strength)
    per input    y = (x * C) * W + changes + bias

so W + sum of strength_i * (W'_i - W) is exact for any number of adapters. Only where both axes meet
on one layer is a second product by W made: W * (C_in + C_out - 1) is no product of two scales.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..arrays import Array
from ..layers import Layer
from ..ops.magnitude import shifted
from ..ops.product import product
from ..ops.scale_columns import scale_columns
from .base import Adapter, Parameters, Share
from .dora import nothing, over_groups


def forward(layer: Layer, x: Array, parts: Iterable[tuple[Adapter, Parameters, Array]]) -> Array:
    """The layer's output with these adapters, each (adapter, its parameters, its scale)."""
    change, shares = None, []
    for adapter, p, scale in parts:
        change, share = adapter.contribute(change, layer, x, p, scale)
        if share is not None:
            shares.append(share)
    inputs = [share for share in shares if share.axis == "input"]
    outputs = [share for share in shares if share.axis == "output"]
    y = None
    if inputs or not outputs:
        scaled = scale_columns(x, over_groups(_total(inputs), layer)) if inputs else x
        y = layer.forward(scaled, change)
    if not outputs:
        return y
    if y is None:
        y = layer.forward(x)
        return scale_columns(y, _total(outputs), bias=layer.bias, add=change)
    more = _total(outputs, nothing(outputs[0].factor))
    return scale_columns(product(x, layer.matrix, layer.window), more, add=y)


def _total(shares: list[Share], total: Array | None = None) -> Array:
    """(total or 1) + sum of (factor - strength)."""
    for share in shares:
        total = shifted(share.factor, share.strength, total)
    return total
