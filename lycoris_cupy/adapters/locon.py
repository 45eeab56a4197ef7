"""LoRA and LoCon: a down product, a Tucker core if there is one, and an up product.  Hu et al.
2021, arXiv 2106.09685.

    plain    delta[t] = scale * down[t] @ up
    taps     delta[t] = scale * down[t] @ up[t]       an up for each tap
    Tucker   delta[t] = scale * down @ mid[t] @ up

File keys: lora_down.weight, lora_up.weight, lora_mid.weight (Tucker), alpha.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from ..arrays import Array
from ..errors import FileFormatError, ShapeError
from ..layers import Layer, LayerShape
from ..ops.changed import low_rank_changed
from ..ops.extended import pending
from ..ops.low_rank import fold_core, low_rank_weight, tucker_weight
from ..ops.product import product
from ..ops.shapes import reshape, tap_diagonal
from ..ops.squares import low_rank_square
from ..svd import Svd, flat_rows, product_svd
from .base import Adapter, Parameters
from .factor import Factor, extents, kernel_of, require_two_axes
from .start import uniform, zeros
from .thin import apply_low_rank, by_columns, low_rank_cost


@dataclass(frozen=True)
class LoCon(Adapter):
    """rank: columns of down. mid_rank: rows of mid's input side when `tucker` (by default the
    rank). per_tap: `up` for each tap.
    """

    tucker: bool = False
    per_tap: bool = False
    mid_rank: int | None = None

    algorithm = "locon"
    reads_weight = False
    keys = ("lora_down.weight", "lora_up.weight", "lora_mid.weight")
    marks = ("lora_down.weight", "lora_up.weight", "lora_mid.weight")
    decomposable = True
    drops = "ranks"
    rank_axes = {"up": (1, 0)}

    def __post_init__(self):
        if self.tucker and (self.per_tap or self.shape.taps == 1):
            raise ShapeError(
                "a Tucker core needs a spatial kernel and one up for all taps; the layer is "
                f"{self.shape}"
            )

    @property
    def down_rank(self) -> int:
        return self.rank if self.mid_rank is None else self.mid_rank

    def factors(self) -> dict[str, Factor]:
        shape = self.shape
        down = Factor(
            "lora_down.weight",
            shape.inputs,
            self.down_rank if self.tucker else self.rank,
            spatial=not self.tucker,
        )
        up = Factor("lora_up.weight", self.rank, shape.outputs, spatial=self.per_tap)
        if not self.tucker:
            return {"down": down, "up": up}
        return {
            "down": down,
            "mid": Factor("lora_mid.weight", self.down_rank, self.rank, spatial=True),
            "up": up,
        }

    def init(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        forms = {name: self.flame_shape(factor) for name, factor in self.factors().items()}
        taps = 1 if self.tucker else self.shape.taps
        out = {"down": uniform(rng, forms["down"], self.shape.inputs * taps)}
        if self.tucker:
            out["mid"] = uniform(rng, forms["mid"], self.down_rank * self.shape.taps)
        return {**out, "up": zeros(forms["up"])}

    def delta_weight(self, weight: Array, p: Parameters, scale: Array) -> Array:
        if self.tucker:
            down, up = reshape(p["down"], p["down"].shape[1:]), reshape(p["up"], p["up"].shape[1:])
            return tucker_weight(down, p["mid"], up, scale)
        return low_rank_weight(p["down"], p["up"], scale)

    def changed(self, weight: Array, p: Parameters, scale: Array) -> Array | None:
        if self.per_tap:
            return None
        return low_rank_changed(weight, p["down"], p["up"], scale, p.get("mid"))

    def square(self, weight: Array, p: Parameters, square: Array, scale: Array, axis: str) -> Array:
        down = p["down"]
        if self.tucker:  # down and core together are the down factor of a plain pair
            down = fold_core(reshape(down, down.shape[1:]), p["mid"])
        return low_rank_square(down, p["up"], weight, square, scale, axis=axis)

    def svd(self, p: Mapping[str, np.ndarray], vectors: bool = True) -> Svd | None:
        down, up = p["down"], p["up"]
        if self.tucker:
            down = down @ p["mid"]
        elif self.per_tap:
            down = tap_diagonal(down)
        return product_svd(flat_rows(down), flat_rows(up), vectors)

    def costs(self) -> dict[str, int]:
        shape, costs = self.shape, super().costs()
        if self.tucker:
            groups, q = shape.window.groups, self.down_rank
            inner = shape.channels * q + groups * shape.taps * q * self.rank
            return {**costs, "low rank": inner + self.rank * shape.outputs}
        # An up for each tap is one up of rank taps * R behind a down that keeps the taps apart.
        rank = self.rank * (shape.taps if self.per_tap else 1)
        return {**costs, "low rank": low_rank_cost(shape, rank)}

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
            return super().apply(change, layer, x, p, scale, columns)
        if self.per_tap:
            up = reshape(p["up"], (1, self.shape.taps * self.rank, self.shape.outputs))
            return apply_low_rank(change, layer, x, tap_diagonal(p["down"]), up, scale, columns)
        if not self.tucker:
            return apply_low_rank(change, layer, x, p["down"], p["up"], scale, columns)
        window = layer.window
        groups = window.groups
        inner = product(x, p["down"], window.pointwise_like(groups, shared=True))
        inner = product(inner, p["mid"], window.grouped(groups, shared=True))
        up = by_columns(p["up"], columns)
        return pending(inner, up, window.pointwise_like(groups), add=change, scale=scale)

    @classmethod
    def guess_shape(cls, tensors: Mapping[str, np.ndarray]) -> LayerShape:
        window = kernel_of(tensors, "lora_mid.weight", "lora_down.weight")
        inputs, outputs = (
            extents(tensors, "lora_down.weight")[1],
            extents(tensors, "lora_up.weight")[0],
        )
        return LayerShape(window, inputs, outputs)

    @classmethod
    def read(
        cls, shape: LayerShape, tensors: Mapping[str, np.ndarray], alpha: float | None
    ) -> LoCon:
        require_two_axes(tensors, "lora_down.weight", "lora_up.weight")
        up, mid = tensors["lora_up.weight"], tensors.get("lora_mid.weight")
        adapter = cls(shape, up.shape[1], alpha)
        if mid is not None:
            require_two_axes(tensors, "lora_mid.weight")
            if shape.taps == 1:
                raise FileFormatError(
                    f"lora_mid.weight needs a spatial kernel, the layer is {shape}"
                )
            return replace(adapter, tucker=True, mid_rank=mid.shape[1])
        # Files of other programs keep one up for all taps; (O, r, *kernel) is this project's own
        # form.
        return replace(
            adapter, per_tap=shape.taps > 1 and tuple(up.shape[2:]) == shape.window.kernel
        )
