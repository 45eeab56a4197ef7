"""LoHa: the elementwise product of two low-rank weights.  Hyeon-Woo et al. 2022, arXiv 2108.06098.

    delta[t] = scale * (w1_down[t] @ w1_up) * (w2_down[t] @ w2_up)
    Tucker     w_down[t] is down @ core[t]

It is applied through its exact factors of rank R^2 while those are cheaper than the weight itself.
File keys: hada_w1_a, hada_w2_a (output side), hada_w1_b, hada_w2_b (input side), hada_t1, hada_t2
(Tucker), alpha.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from ..arrays import Array
from ..errors import FileFormatError, ShapeError
from ..layers import Layer, LayerShape
from ..ops.changed import hadamard_changed
from ..ops.elementwise import cast
from ..ops.extended import Change, Pending, ready
from ..ops.hadamard import face_split, hadamard_weight
from ..ops.hadamard_product import PendingHadamard, waits
from ..ops.low_rank import fold_core
from ..ops.shapes import reshape
from ..ops.squares import low_rank_square
from ..svd import Svd, flat_rows, product_svd
from .base import Adapter, Parameters
from .factor import Factor, extents, kernel_of, require_two_axes
from .start import normal, zeros
from .thin import apply_low_rank, low_rank_cost


@dataclass(frozen=True)
class LoHa(Adapter):
    """rank: of each of the two products. tucker: each has a core t1, t2 over the taps."""

    tucker: bool = False

    algorithm = "loha"
    reads_weight = False
    keys = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
    marks = keys
    decomposable = True
    drops = "outputs"
    rank_axes = {"w1_up": (2, 0)}

    def __post_init__(self):
        if self.tucker and self.shape.taps == 1:
            raise ShapeError(f"a Tucker core needs a spatial kernel; the layer is {self.shape}")

    def factors(self) -> dict[str, Factor]:
        shape, out = self.shape, {}
        for k in "12":
            out[f"w{k}_down"] = Factor(
                f"hada_w{k}_b", shape.inputs, self.rank, spatial=not self.tucker, flat=True
            )
            if self.tucker:
                out[f"t{k}"] = Factor(f"hada_t{k}", self.rank, self.rank, spatial=True)
            out[f"w{k}_up"] = Factor(
                f"hada_w{k}_a", self.rank, shape.outputs, flat=True, turned=self.tucker
            )
        return out

    def init(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        deviation = {"w1_down": 1.0, "w2_down": 1.0, "w1_up": 0.1, "t1": 0.1, "t2": 0.1}
        forms = {name: self.flame_shape(factor) for name, factor in self.factors().items()}
        return {
            n: normal(rng, form, deviation[n]) if n in deviation else zeros(form)
            for n, form in forms.items()
        }

    def _downs(self, p: Parameters) -> list[Array]:
        if not self.tucker:
            return [p["w1_down"], p["w2_down"]]
        flat = (self.shape.inputs, self.rank)
        return [fold_core(reshape(p[f"w{k}_down"], flat), p[f"t{k}"]) for k in "12"]

    def delta_weight(self, weight: Array, p: Parameters, scale: Array) -> Array:
        first, second = self._downs(p)
        return hadamard_weight(first, p["w1_up"], second, p["w2_up"], scale)

    def changed(self, weight: Array, p: Parameters, scale: Array) -> Array | None:
        factors = (p[name] for name in ("w1_down", "w1_up", "w2_down", "w2_up"))
        return hadamard_changed(weight, *factors, scale, p.get("t1"), p.get("t2"))

    def _pair(self, p: Parameters, dtype) -> tuple[Array, Array]:
        """The exact factors of rank R^2: (taps, IN, R^2) and (1, R^2, OUT)."""
        first, second = (cast(down, dtype) for down in self._downs(p))
        return face_split(first, second, -1), face_split(p["w1_up"], p["w2_up"], -2)

    def square(self, weight: Array, p: Parameters, square: Array, scale: Array, axis: str) -> Array:
        # Asked for where rank R^2 is cheaper than the weight: then its products with W, 2 IN OUT
        # R^2 a step on tensor cores, cost less than writing and reading a wide W-sized change.
        down, up = self._pair(p, p["w1_up"].dtype)
        return low_rank_square(down, up, weight, square, scale, axis=axis)

    def svd(self, p: Mapping[str, np.ndarray], vectors: bool = True) -> Svd | None:
        first, second = self._downs(p)
        up = face_split(p["w1_up"], p["w2_up"], -2)
        return product_svd(flat_rows(face_split(first, second, -1)), flat_rows(up), vectors)

    def costs(self) -> dict[str, int]:
        return {**super().costs(), "low rank": low_rank_cost(self.shape, self.rank**2)}

    def apply(
        self,
        change: Array | None,
        layer: Layer,
        x: Array,
        p: Parameters,
        scale: Array,
        columns: Array | None = None,
    ) -> Change:
        if self.route == "delta":
            return super().apply(change, layer, x, p, scale, columns)

        def factored() -> Pending:
            return apply_low_rank(change, layer, x, *self._pair(p, x.dtype), scale, columns)

        if self.tucker or columns is not None or not waits(x, self.rank, layer.window):
            return factored()
        change = ready(change)
        factors = tuple(p[name] for name in ("w1_down", "w1_up", "w2_down", "w2_up"))
        return PendingHadamard(x, factors, change, scale, factored)

    @classmethod
    def guess_shape(cls, tensors: Mapping[str, np.ndarray]) -> LayerShape:
        outputs = extents(tensors, "hada_w1_a")["hada_t1" in tensors]  # Tucker turns it
        inputs = extents(tensors, "hada_w1_b")[1]
        return LayerShape(kernel_of(tensors, "hada_t1"), inputs, outputs)

    @classmethod
    def read(
        cls, shape: LayerShape, tensors: Mapping[str, np.ndarray], alpha: float | None
    ) -> LoHa:
        require_two_axes(tensors, "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        if ("hada_t1" in tensors) != ("hada_t2" in tensors):
            raise FileFormatError(
                "hada_t1 and hada_t2 come together, but only one of them is there"
            )
        adapter = cls(shape, tensors["hada_w1_b"].shape[0], alpha)
        return replace(adapter, tucker="hada_t1" in tensors)
