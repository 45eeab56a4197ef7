"""Biased: an adapter of any factors, and beside it a change of the layer's bias.

    weight' = weight + strength * scale * change        bias' = bias + strength * diff_b
    scaled                                              bias' = bias + strength * scale * up_bias

ComfyUI's and other extracted files keep `diff_b` beside their factors; PEFT's `lora_bias` puts a
bias on the up side, which alpha / rank scales too. File keys: those of the adapter, and diff_b or
lora_up.bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..arrays import Array, wide_dtype
from ..layers import Layer
from ..ops import elementwise
from ..ops.columns import expand_rows
from ..ops.elementwise import add, cast
from ..ops.extended import ready
from ..svd import Svd
from .base import Adapter, Parameters, Share, Turn
from .factor import Factor
from .stacked import Stacked
from .start import zeros

BIAS = "bias"
KEYS = {"diff_b": False, "lora_up.bias": True}  # file key -> whether alpha / rank scales it


@dataclass(frozen=True)
class Biased(Stacked):
    """on: the adapter of the weight. scaled: whether its scale is the bias's. Made by `over`."""

    scaled: bool = False

    keys = tuple(KEYS)

    @classmethod
    def over(cls, on: Adapter, scaled: bool = False) -> Biased:
        """A change of the bias beside an adapter that leaves the bias alone."""
        return cls(on.shape, on.rank, on.alpha, on=on, scaled=scaled)

    @property
    def title(self) -> str:
        return f"{self.on.title} with a bias"

    def factors(self) -> dict[str, Factor]:
        key = next(key for key, scaled in KEYS.items() if scaled == self.scaled)
        return {**self.on.factors(), BIAS: Factor(key, plain=(self.shape.outputs,))}

    def init(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {**self.on.init(rng), BIAS: zeros((self.shape.outputs,))}

    def start(self, rng: np.random.Generator, weight: Array) -> dict[str, np.ndarray]:
        return {**self.on.start(rng, weight), BIAS: zeros((self.shape.outputs,))}

    def delta_weight(self, weight: Array, p: Parameters, scale: Array) -> Array:
        return self.on.delta_weight(weight, without_bias(p), scale * self.on.scale)

    def delta_bias(self, p: Parameters, bias: Array | None = None) -> Array | None:
        own = cast(p[BIAS], wide_dtype(p[BIAS].dtype))
        return own * self.on.reported_scale if self.scaled else own

    def svd(self, p: Mapping[str, np.ndarray], vectors: bool = True) -> Svd | None:
        found = self.on.svd(without_bias(p), vectors)
        return None if found is None else found.scaled(self.on.scale)

    def apply(
        self,
        change: Array | None,
        layer: Layer,
        x: Array,
        p: Parameters,
        scale: Array,
        columns: Array | None = None,
    ) -> Array:
        own = self.on.apply(change, layer, x, without_bias(p), scale * self.on.scale, columns)
        return self._with_bias(ready(own), p, scale)

    def contribute(
        self, change: Array | None, layer: Layer, x: Array, p: Parameters, scale: Array
    ) -> tuple[Array | None, Share | Turn | None]:
        inner = without_bias(p)
        own, more = self.on.contribute(change, layer, x, inner, scale * self.on.scale)
        assert own is not None  # what it stands on has factors
        return self._with_bias(ready(own), p, scale), more

    def _with_bias(self, change: Array, p: Parameters, scale: Array) -> Array:
        factor = scale * self.on.reported_scale if self.scaled else scale
        bias = elementwise.scale(cast(p[BIAS], factor.dtype), factor)
        return add(change, expand_rows(cast(bias, change.dtype), tuple(change.shape)))

    def load(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        factor = self.factors()[BIAS]
        own = {key: tensor for key, tensor in tensors.items() if key != factor.key}
        return {**self.on.load(own), BIAS: factor.read(tensors[factor.key], self.shape)}

    def save(self, p: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        factor = self.factors()[BIAS]
        return {**self.on.save(without_bias(p)), factor.key: factor.write(p[BIAS], self.shape)}


def without_bias(p: Mapping) -> dict:
    """The factors of the adapter that a Biased stands on."""
    return {name: value for name, value in p.items() if name != BIAS}
