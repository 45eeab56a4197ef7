"""GLoRA: the base weight's inputs mixed by one low-rank product, and another one added.  Chavan et
al. 2023, arXiv 2306.07967, in the form of LyCORIS.

    delta[t] = scale * (a2 @ a1 @ weight[t] + b2[t] @ b1)

The layer's own product is not repeated: a1 @ weight has only rank rows, so that the first part is
a low-rank pair too, (x @ a2) * (a1 @ weight). On a grouped layer all groups share the factors, as
for LoCon; the reference has no such form. File keys: a1.weight (I, r, *1), a2.weight (r, I, *1),
b1.weight (O, r, *1), b2.weight (r, I, *kernel), alpha.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..arrays import Array
from ..layers import Layer, LayerShape
from ..ops import elementwise
from ..ops.elementwise import add, cast
from ..ops.extended import ready
from ..ops.low_rank import fold_core, low_rank_weight
from ..ops.product import product
from ..ops.shapes import reshape
from .base import Adapter, DropElements, Parameters
from .factor import Factor, extents, kernel_of, require_two_axes
from .start import uniform, zeros
from .thin import apply_low_rank, low_rank_cost


@dataclass(frozen=True)
class GLoRA(Adapter):
    """rank: of each of the two products."""

    algorithm = "glora"
    keys = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")
    marks = keys
    drops = "ranks"
    rank_axes = {"a1": (1, 0), "b1": (1, 1)}

    def factors(self) -> dict[str, Factor]:
        inputs, outputs = self.shape.inputs, self.shape.outputs
        return {
            "a1": Factor("a1.weight", self.rank, inputs),
            "a2": Factor("a2.weight", inputs, self.rank),
            "b1": Factor("b1.weight", self.rank, outputs),
            "b2": Factor("b2.weight", inputs, self.rank, spatial=True),
        }

    def init(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        forms = {name: self.flame_shape(factor) for name, factor in self.factors().items()}
        return {
            name: uniform(rng, form, self.rank) if name in ("a1", "b1") else zeros(form)
            for name, form in forms.items()
        }

    def _mixed(self, weight: Array, p: Parameters) -> Array:
        """a1 @ weight, (taps, R, OUT), wide."""
        a1 = cast(p["a1"], weight.dtype)
        return fold_core(reshape(a1, a1.shape[1:]), weight)

    def delta_weight(self, weight: Array, p: Parameters, scale: Array) -> Array:
        mixed = self._mixed(weight, p)
        a2 = cast(reshape(p["a2"], p["a2"].shape[1:]), mixed.dtype)
        first = elementwise.scale(fold_core(a2, mixed), scale)
        return add(first, low_rank_weight(p["b2"], p["b1"], scale))

    def costs(self) -> dict[str, int]:
        shape = self.shape
        mixed = self.rank * (shape.channels + shape.taps * shape.outputs)
        return {**super().costs(), "low rank": mixed + low_rank_cost(shape, self.rank)}

    def apply(
        self,
        change: Array | None,
        layer: Layer,
        x: Array,
        p: Parameters,
        scale: Array,
        columns: Array | None = None,
    ) -> Array:
        if self.route == "delta":
            return super().apply(change, layer, x, p, scale)
        window = layer.window
        inner = product(x, p["a2"], window.pointwise_like(window.groups, shared=True))
        mixed = cast(self._mixed(layer.matrix, p), x.dtype)
        change = product(inner, mixed, window, add=change, scale=scale)
        return apply_low_rank(change, layer, x, p["b2"], p["b1"], scale)

    def apply_dropped(
        self,
        change: Array | None,
        layer: Layer,
        x: Array,
        p: Parameters,
        scale: Array,
        drop: DropElements,
    ) -> Array:
        # (drop(x @ a2 @ a1) * W + drop(x * b2 @ b1)): both are dropped from where they are added.
        window = layer.window
        point = window.pointwise_like(window.groups, shared=True)
        seen = product(product(x, p["a2"], point), p["a1"], point)
        change = product(drop(seen, None, 0), layer.matrix, window, add=change, scale=scale)
        second = ready(apply_low_rank(None, layer, x, p["b2"], p["b1"], scale))
        assert second is not None
        return drop(second, change, 1)

    @classmethod
    def guess_shape(cls, tensors: Mapping[str, np.ndarray]) -> LayerShape:
        inputs, outputs = extents(tensors, "a1.weight")[0], extents(tensors, "b1.weight")[0]
        return LayerShape(kernel_of(tensors, "b2.weight"), inputs, outputs)

    @classmethod
    def read(
        cls, shape: LayerShape, tensors: Mapping[str, np.ndarray], alpha: float | None
    ) -> GLoRA:
        require_two_axes(tensors, *cls.keys)
        return cls(shape, tensors["b1.weight"].shape[1], alpha)
