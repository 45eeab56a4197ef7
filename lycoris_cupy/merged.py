"""Layers whose weights hold their adapters: f32 sums over all of them, one rounding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .arrays import Array, wide_dtype
from .attachment import Attachment
from .layers import Layer
from .ops.changed import changed
from .ops.elementwise import add, cast


def merged_layers(
    layers: Mapping[str, Layer], attachments: Iterable[Attachment]
) -> dict[str, Layer]:
    """The same layers with the adapters at their present strengths; those without one as they are.

    One adapter alone is added in one pass over the weight where its algorithm has such a pass.
    """
    attachments = list(attachments)
    out = dict(layers)
    for name, layer in layers.items():
        on_it = [attached for attached in attachments if name in attached.adapters]
        at_once = on_it[0].changed(name, layer) if len(on_it) == 1 else None
        if at_once is not None:
            out[name] = layer.replaced(at_once, layer.bias)
        elif on_it:
            out[name] = _with_all(name, layer, on_it)
    return out


def _with_all(name: str, layer: Layer, attachments: list[Attachment]) -> Layer:
    weight: Array | None = None
    bias: Array | None = None
    for attached in attachments:
        dw, db = attached.delta(name, layer)
        weight = dw if weight is None else add(weight, dw)
        if db is not None:
            bias = db if bias is None else add(bias, db)
    assert weight is not None  # there is at least one adapter
    new = changed(layer.matrix, weight)
    if bias is None:
        return layer.replaced(new, layer.bias)
    if layer.bias is not None:
        bias = add(cast(layer.bias, wide_dtype(layer.weight.dtype)), bias)
    return layer.replaced(new, cast(bias, layer.weight.dtype))
