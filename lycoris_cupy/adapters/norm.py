"""Norm: a change of the weight and the bias of a layer or group norm.

    weight' = weight + strength * w_norm        bias' = bias + strength * b_norm

A norm without a bias gets one. File keys: w_norm (C,), b_norm (C,).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..arrays import Array, wide_dtype
from ..errors import FileFormatError
from ..layers import Layer, LayerShape
from ..norms import NormShape
from ..ops import elementwise
from ..ops.shapes import reshape
from .base import Parameters
from .factor import Factor
from .start import zeros
from .unranked import Unranked

Pair = tuple[Array | None, Array | None]  # changes of weight and bias, (C,) wide


@dataclass(frozen=True)
class Norm(Unranked):
    """weight, bias: which of the two is changed; a file may hold one alone."""

    weight: bool = True
    bias: bool = True

    algorithm = "norm"
    keys = ("w_norm", "b_norm")
    marks = keys
    drops = "channels"
    rank_axes = {"w_norm": (0, 0), "b_norm": (0, 0)}
    has_output = False

    def __post_init__(self):
        if not (self.weight or self.bias):
            raise FileFormatError("norm: neither weight nor bias is changed")

    @classmethod
    def takes(cls, shape: LayerShape) -> bool:
        return isinstance(shape, NormShape)

    def factors(self) -> dict[str, Factor]:
        wanted = {"w_norm": self.weight, "b_norm": self.bias}
        plain = (self.shape.outputs,)
        return {key: Factor(key, plain=plain) for key, there in wanted.items() if there}

    def init(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {name: zeros(self.flame_shape(factor)) for name, factor in self.factors().items()}

    def delta_weight(self, weight: Array, p: Parameters, scale: Array) -> Array:
        if not self.weight:
            return elementwise.scale(elementwise.cast(weight, scale.dtype), scale * 0)
        return reshape(_scaled(p["w_norm"], scale), weight.shape)

    def delta_bias(self, p: Parameters, bias: Array | None = None) -> Array | None:
        return p.get("b_norm")

    def apply(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, change: Pair | None, layer: Layer, x: Array, p: Parameters, scale: Array
    ) -> Pair:
        """The changes of weight and bias with these added: what `forward` of a norm layer takes."""
        before = change or (None, None)
        parts = (p.get("w_norm"), p.get("b_norm"))
        weight, bias = (_sum(a, b, scale) for a, b in zip(before, parts, strict=True))
        return weight, bias

    @classmethod
    def guess_shape(cls, tensors: Mapping[str, np.ndarray]) -> LayerShape:
        shape = next(tensors[key].shape for key in cls.keys if key in tensors)
        return NormShape.of_channels((*shape, 1)[0])

    @classmethod
    def read(
        cls, shape: LayerShape, tensors: Mapping[str, np.ndarray], alpha: float | None
    ) -> Norm:
        return cls(shape, weight="w_norm" in tensors, bias="b_norm" in tensors)


def _scaled(part: Array, scale: Array) -> Array:
    return elementwise.scale(elementwise.cast(part, wide_dtype(part.dtype)), scale)


def _sum(before: Array | None, part: Array | None, scale: Array) -> Array | None:
    if part is None:
        return before
    part = _scaled(part, scale)
    return part if before is None else elementwise.add(before, part)
