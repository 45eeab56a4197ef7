"""How layers are joined: a plain function `topology(call, *inputs)`, and the `call` it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .adapters.join import forward
from .attachment import Attachment
from .errors import LycorisError, MatchError
from .layers import Layer

Topology = Callable[..., Any]


def in_order(names: Sequence[str]) -> Topology:
    """The layers of these names, one after the other."""

    def topology(call, x):
        for name in names:
            x = call(name, x)
        return x

    return topology


def chain(steps: Sequence[Layer | Callable]) -> tuple[dict[str, Layer], Topology]:
    """The layers of a chain, named by their place in it, and the chain."""
    layers = {str(i): step for i, step in enumerate(steps) if isinstance(step, Layer)}

    def topology(call, x):
        for i, step in enumerate(steps):
            x = call(str(i), x) if str(i) in layers else step(x)
        return x

    return layers, topology


def caller(
    layers: Mapping[str, Layer],
    attachments: Mapping[str, Attachment],
    views: Mapping[str, Mapping],
    conditions: Mapping[str, Any],
) -> Callable[[str, Any], Any]:
    """call(name, x): a layer with what is attached to it. views: attachment -> layer -> factors, as
    `Attachment.canonical` lays them out, watched or not. An error names the layer.
    """

    def call(name: str, x):
        if name not in layers:
            raise MatchError(
                f"the topology calls layer {name!r}, the engine has {', '.join(layers)}"
            )
        layer = layers[name]
        try:
            parts = [
                attached.part(name, views[attached_name][name], conditions)
                for attached_name, attached in attachments.items()
                if name in attached.adapters
            ]
            return forward(layer, x, parts)
        except LycorisError as error:
            raise type(error)(f"layer {name!r}, {layer.shape}: {error}") from error

    return call
