"""Attachment: the adapters of one file, their factors on a device, and their strength."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np

from .adapters import Adapter, Dropout, Dropped
from .arrays import Array, device_context, to_device, wide_dtype
from .errors import LycorisError, MatchError, ShapeError
from .io.report import LoadReport
from .layers import Layer
from .ops.elementwise import cast, scale


class Attachment:
    """adapters: layer -> Adapter. parameters: layer -> factor -> Flame array. scales: layer ->
    strength * alpha / rank, (1,). kept: layer -> constants of its weight that the adapter reads.

    The arrays are made once and written in place ever after, so that whoever holds them (a captured
    graph) sees changes.
    """

    def __init__(
        self,
        found: Mapping[str, tuple[Adapter, Mapping[str, np.ndarray]]],
        device: str,
        dtype,
        strength: float,
        report: LoadReport | None = None,
        layers: Mapping[str, Layer] | None = None,
    ):
        self.report, self.device = report, device
        self._dropout, self._drops = Dropout(), {}
        # By name: what is added, saved and attached again has its layers in the file's order.
        self._places = {layer: place for place, layer in enumerate(sorted(found))}
        self.adapters = {layer: adapter for layer, (adapter, _) in found.items()}
        self.parameters = {
            layer: {
                name: to_device(np.asarray(value).astype(_kept_in(adapter, name, dtype)), device)
                for name, value in values.items()
            }
            for layer, (adapter, values) in found.items()
        }
        self.kept = {
            layer: adapter.kept(layers[layer].matrix) if layers else {}
            for layer, adapter in self.adapters.items()
        }
        ones = np.zeros(1, wide_dtype(dtype))
        self.scales = {layer: to_device(ones.copy(), device) for layer in found}
        self.strength = strength

    @property
    def strength(self) -> float:
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        value = float(value)
        if not math.isfinite(value):
            raise LycorisError(f"strength is {value}, expected a finite number")
        self._strength = value
        with device_context(self.device):
            for layer, adapter in self.adapters.items():
                self.scales[layer].fill(value * adapter.scale)

    @property
    def dropout(self) -> Dropout:
        """What training drops; a forward that is given a step number does."""
        return self._dropout

    @dropout.setter
    def dropout(self, knobs: Dropout) -> None:
        self._drops = knobs.over(self.adapters)
        self._dropout = knobs

    def canonical(self) -> dict[str, dict[str, Array]]:
        """The factors as algorithms see them, (taps, rows, columns): views."""
        return {
            layer: adapter.canonical(self.parameters[layer])
            for layer, adapter in self.adapters.items()
        }

    def part(
        self, name: str, p: Mapping[str, Any], conditions: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any], Array]:
        """What `adapters.join.forward` takes: p are a layer's factors as `canonical` gives them,
        conditions what forward was given.
        """
        adapter: Any = self.adapters[name]
        read = {key: conditions[key] for key in adapter.conditions if key in conditions}
        if "step" in conditions and (drops := self._drops.get(name)):
            adapter = Dropped(adapter, drops, self._places[name], conditions["step"])
        return adapter, {**p, **self.kept[name], **read}, self.scales[name]

    def flame(self, views: Mapping[str, Mapping[str, Any]], made: Callable) -> dict:
        """layer -> factor -> made(view) in Flame layout, for views laid out as by `canonical`."""
        return {
            layer: {
                name: made(v).reshape(self.parameters[layer][name].shape) for name, v in p.items()
            }
            for layer, p in views.items()
        }

    def delta(self, name: str, layer: Layer) -> tuple[Array, Array | None]:
        """The change of a layer's weight (taps, IN, OUT) and bias at the present strength, wide."""
        adapter = self.adapters[name]
        p, factor = adapter.canonical(self.parameters[name]), self.scales[name]
        bias = adapter.delta_bias(p, layer.bias)
        weight = adapter.delta_weight(layer.matrix, p, factor)
        return weight, None if bias is None else scale(cast(bias, factor.dtype), factor)

    def changed(self, name: str, layer: Layer) -> Array | None:
        """A layer's weight (taps, IN, OUT) with this adapter at the present strength, rounded once,
        where that takes one pass over the weight and the bias is not changed; else None.
        """
        adapter = self.adapters[name]
        p = adapter.canonical(self.parameters[name])
        if adapter.delta_bias(p, layer.bias) is not None:
            return None
        return adapter.changed(layer.matrix, p, self.scales[name])

    def set(self, values: Mapping[str, Mapping[str, Array]]) -> None:
        """Copy values into the factors in place, rounded once. Raises before anything changes."""
        for layer, factors in values.items():
            for name, value in factors.items():
                if name not in self.parameters.get(layer, {}):
                    raise MatchError(f"there is no factor {name!r} on layer {layer!r}")
                expected = self.parameters[layer][name].shape
                if value.shape != expected:
                    raise ShapeError(
                        f"{layer}.{name} has shape {tuple(value.shape)}, expected {tuple(expected)}"
                    )
        for layer, factors in values.items():
            for name, value in factors.items():
                kept = self.parameters[layer][name]
                kept[...] = cast(to_device(value, self.device), kept.dtype)

    def on_host(self) -> dict[str, tuple[Adapter, dict[str, np.ndarray]]]:
        """What `write_adapter` takes."""
        return {
            layer: (
                adapter,
                {name: to_device(value, "cpu") for name, value in self.parameters[layer].items()},
            )
            for layer, adapter in self.adapters.items()
        }


def _kept_in(adapter: Adapter, name: str, dtype):
    """The dtype of a factor in an engine of this dtype."""
    return wide_dtype(dtype) if adapter.factors()[name].wide else dtype


class Attachments(dict[str, Attachment]):
    """engine.attachments: adapter name -> Attachment, in the order they were attached. A name that
    there is not is a MatchError.
    """

    def require_new(self, name: str) -> None:
        if name in self:
            raise LycorisError(
                f"an adapter named {name!r} is attached already: detach it, or give another name"
            )

    def __missing__(self, name: str) -> Attachment:
        raise MatchError(
            f"no adapter named {name!r} is attached (attached: {', '.join(self) or 'none'})"
        )

    def __delitem__(self, name: str) -> None:
        if name not in self:
            self.__missing__(name)
        super().__delitem__(name)


class Strengths(MutableMapping):
    """engine.strength: adapter name -> float. Setting one writes the device arrays that the routes
    read.
    """

    def __init__(self, attachments: Attachments):
        self._attachments = attachments

    def __getitem__(self, name: str) -> float:
        return self._attachments[name].strength

    def __setitem__(self, name: str, value: float) -> None:
        self._attachments[name].strength = value

    def __delitem__(self, name: str) -> None:
        raise LycorisError(
            f"a strength cannot be deleted: use engine.detach({name!r}), or set it to 0"
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._attachments)

    def __len__(self) -> int:
        return len(self._attachments)

    def __repr__(self) -> str:
        return repr(dict(self))
