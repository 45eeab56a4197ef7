"""What runs and what it costs, in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .adapters import Adapter
from .attachment import Attachment
from .layers import Layer
from .plan import recording


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


def products(run: Callable[[], Any], device: str) -> str:
    """The products of run(): the way that the planner chose for each, and by what estimates."""
    with recording() as choices:
        run()
    if device == "cpu":
        return "products: by NumPy and its BLAS"
    return "\n".join(["products, in order:", *(f"  {choice}" for choice in choices)])


def describe(adapter: Adapter, own: int) -> str:
    """The algorithm, its rank and scale, the cheapest route, which is taken, and the others."""
    shares = {route: f"{cost / max(own, 1):.1%}" for route, cost in adapter.costs().items()}
    taken = shares.pop(adapter.route)
    rest = "".join(f"; {route} would be {share}" for route, share in shares.items())
    what = f"{adapter.title} rank {adapter.rank}, scale {adapter.reported_scale:g}"
    return f"{what}, route {adapter.route}: {taken} of the layer's multiply-adds{rest}"
