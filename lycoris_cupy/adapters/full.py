"""Full: a change of the whole weight, and of the bias.

    weight' = weight + strength * diff        bias' = bias + strength * diff_b

There is no rank and no alpha. A layer without a bias gets one if the file says so. File keys: diff,
diff_b.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..arrays import Array, wide_dtype
from ..layers import Layer, LayerShape
from ..ops import elementwise
from ..ops.changed import scaled_changed
from ..ops.extended import Pending, pending
from ..svd import Svd, flat_rows, matrix_svd
from .base import Parameters
from .factor import Factor, extents, kernel_of, require_two_axes
from .start import zeros
from .unranked import Unranked


@dataclass(frozen=True)
class Full(Unranked):
    """bias: whether a change of the bias is kept too."""

    bias: bool = False

    algorithm = "full"
    reads_weight = False
    keys = ("diff", "diff_b")
    marks = ("diff", "diff_b")
    drops = "outputs"
    rank_axes = {"diff": (2, 0), "diff_b": (0, 0)}

    def factors(self) -> dict[str, Factor]:
        out = {"diff": Factor("diff", self.shape.inputs, self.shape.outputs, spatial=True)}
        if self.bias:
            out["diff_b"] = Factor("diff_b", plain=(self.shape.outputs,))
        return out

    def init(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {name: zeros(self.flame_shape(factor)) for name, factor in self.factors().items()}

    def delta_weight(self, weight: Array, p: Parameters, scale: Array) -> Array:
        return elementwise.scale(elementwise.cast(p["diff"], wide_dtype(p["diff"].dtype)), scale)

    def changed(self, weight: Array, p: Parameters, scale: Array) -> Array | None:
        return scaled_changed(weight, p["diff"], scale)

    def delta_bias(self, p: Parameters, bias: Array | None = None) -> Array | None:
        return p.get("diff_b")

    def svd(self, p: Mapping[str, np.ndarray], vectors: bool = True) -> Svd | None:
        return matrix_svd(flat_rows(p["diff"]), vectors)

    def apply(
        self, change: Array | None, layer: Layer, x: Array, p: Parameters, scale: Array
    ) -> Pending:
        bias = p["diff_b"] if self.bias else None
        return pending(x, p["diff"], layer.window, add=change, scale=scale, bias=bias)

    @classmethod
    def guess_shape(cls, tensors: Mapping[str, np.ndarray]) -> LayerShape:
        outputs, inputs = extents(tensors, "diff")
        return LayerShape(kernel_of(tensors, "diff"), inputs, outputs)

    @classmethod
    def read(
        cls, shape: LayerShape, tensors: Mapping[str, np.ndarray], alpha: float | None
    ) -> Full:
        require_two_axes(tensors, "diff")
        return cls(shape, bias="diff_b" in tensors)
