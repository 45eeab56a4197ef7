"""What runs and what it costs, in words."""

from __future__ import annotations

from collections.abc import Mapping

from .adapters import Adapter
from .attachment import Attachment
from .layers import Layer


def explain(layers: Mapping[str, Layer], attachments: Mapping[str, Attachment]) -> str:
    """A line a layer, and one for each adapter on it: its route, and what that costs."""
    lines = []
    for name, layer in layers.items():
        own = layer.shape.taps * layer.shape.inputs * layer.shape.outputs
        lines.append(f"{name}: {layer.shape}, {own:,} multiply-adds an output position")
        for attached_name, attached in attachments.items():
            if name in attached.adapters:
                lines.append(f"  {attached_name}: {describe(attached.adapters[name], own)}")
    return "\n".join(lines)


def describe(adapter: Adapter, own: int) -> str:
    """The algorithm, its rank and scale, the cheapest route, which is taken, and the others."""
    shares = {route: f"{cost / max(own, 1):.1%}" for route, cost in adapter.costs().items()}
    taken = shares.pop(adapter.route)
    rest = "".join(f"; {route} would be {share}" for route, share in shares.items())
    what = f"{adapter.title} rank {adapter.rank}, scale {adapter.reported_scale:g}"
    return f"{what}, route {adapter.route}: {taken} of the layer's multiply-adds{rest}"
