"""A layer with all its adapters: x * (W + sum of the changes) + bias, with one product by W.

An adapter that scales W too gives the Share (k - strength) * W of its change, and those sum to one
scale of the layer's own product:

    per output   y = (x * W) * C + changes + bias      C = 1 + sum of (k - strength)
    per input    y = (x * C) * W + changes + bias

so W + sum of strength_i * (W'_i - W) is exact for any number of adapters. One that mixes outputs
gives a Turn, which adds what it makes of x * W, before any scale. Only where a scale of the inputs
meets one of these on one layer is a second product by W made: W * (C_in + C_out - 1) is no product
of two scales.

What adapters give is read here alone, so that each sum may be written over the one before it.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..arrays import Array
from ..layers import Layer
from ..ops.elementwise import add
from ..ops.extended import Pending, ready
from ..ops.magnitude import shifted
from ..ops.product import product
from ..ops.scale_columns import scale_columns
from .base import Adapter, Parameters, Share
from .dora import nothing, over_groups


def forward(layer: Layer, x: Array, parts: Iterable[tuple[Adapter, Parameters, Array]]) -> Array:
    """The layer's output with these adapters, each (adapter, its parameters, its scale)."""
    change, shares, turns = None, [], []
    for adapter, p, scale in parts:
        change, more = adapter.contribute(ready(change, spend=True), layer, x, p, scale)
        if more is not None:
            (shares if isinstance(more, Share) else turns).append(more)
    inputs = [share for share in shares if share.axis == "input"]
    outputs = [share for share in shares if share.axis == "output"]
    if not outputs and not turns:
        scaled = scale_columns(x, over_groups(_total(inputs), layer)) if inputs else x
        return layer.forward(scaled, change, spend=True)
    if not inputs and not turns and isinstance(change, Pending) and change.unscaled:
        return layer.forward(x, change, _total(outputs), spend=True)
    y, change = layer.forward(x), ready(change, spend=True)
    if inputs:
        rest = over_groups(_total(inputs, nothing(inputs[0].factor)), layer)
        scaled = scale_columns(x, rest)
        change = product(scaled, layer.matrix, layer.window, add=change, spend=True)
    if outputs:
        total = scale_columns(y, _total(outputs), bias=layer.bias, add=change)
    else:
        total = y if change is None else add(y, change)
    for turn in turns:
        total = turn(y, total)
    return total


def _total(shares: list[Share], total: Array | None = None) -> Array:
    """(total or 1) + sum of (factor - strength)."""
    for share in shares:
        total = shifted(share.factor, share.strength, total)
    return total
