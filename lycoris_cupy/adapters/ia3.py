"""(IA)^3: each output, or each input, of a layer multiplied by a learned factor.  Liu et al. 2022,
arXiv 2205.05638.

    on outputs   weight'[t, i, o] = weight[t, i, o] * (1 + strength * w[o])
    on inputs    weight'[t, i, o] = weight[t, i, o] * (1 + strength * w[q(o) * IN + i])

q(o) is the group of output o. The bias is not multiplied, as in LyCORIS's own forward; PEFT's
multiplies it (`scales_bias`). File keys: weight (C,), or (1, C, *1) for convolutions; on_input, 0
or 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..arrays import Array, wide_dtype
from ..errors import FileFormatError, LycorisError
from ..layers import Layer, LayerShape
from ..ops import elementwise
from ..ops.elementwise import cast
from ..ops.product import product
from ..ops.scale_columns import scale_columns, spread_columns
from ..ops.shapes import reshape, transpose
from ..ops.window import Window
from .base import Parameters, Share, Turn
from .dora import nothing
from .factor import Factor, require
from .start import zeros
from .unranked import Unranked


@dataclass(frozen=True)
class IA3(Unranked):
    """on_input: which side is multiplied. scales_bias: whether the bias is multiplied with the
    outputs.
    """

    on_input: bool = False
    scales_bias: bool = False

    algorithm = "ia3"
    keys = ("weight", "on_input")
    marks = ("on_input",)
    flags = ("on_input",)

    def __post_init__(self):
        if self.on_input and self.scales_bias:
            raise LycorisError("ia3: scales_bias is of outputs, but on_input multiplies inputs")

    def factors(self) -> dict[str, Factor]:
        size = self.shape.channels if self.on_input else self.shape.outputs
        axes = self.shape.window.axes
        stored = (1, size, *(1,) * axes) if axes else (size,)
        return {"weight": Factor("weight", plain=(size,), stored=stored)}

    def init(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {name: zeros(self.flame_shape(factor)) for name, factor in self.factors().items()}

    def delta_weight(self, weight: Array, p: Parameters, scale: Array) -> Array:
        kept = wide_dtype(weight.dtype)
        w, weight = elementwise.scale(cast(p["weight"], kept), scale), cast(weight, kept)
        if not self.on_input:
            return spread_columns(weight, w)
        # The inputs of every group become columns, (taps, OUT / groups, groups * IN).
        taps, inputs, outputs = weight.shape
        groups = self.shape.window.groups
        split = reshape(weight, (taps, inputs, groups, outputs // groups))
        turned = reshape(transpose(split, (0, 3, 2, 1)), (taps, -1, groups * inputs))
        turned = reshape(spread_columns(turned, w), (taps, outputs // groups, groups, inputs))
        return reshape(transpose(turned, (0, 3, 2, 1)), weight.shape)

    def delta_bias(self, p: Parameters, bias: Array | None = None) -> Array | None:
        if not self.scales_bias or bias is None:
            return None
        kept = wide_dtype(bias.dtype)
        return elementwise.multiply(cast(p["weight"], kept), cast(bias, kept))

    def costs(self) -> dict[str, int]:
        shape = self.shape
        return {**super().costs(), "vector": shape.channels if self.on_input else shape.outputs}

    def apply(
        self,
        change: Array | None,
        layer: Layer,
        x: Array,
        p: Parameters,
        scale: Array,
        columns: Array | None = None,
    ) -> Array:
        w = cast(p["weight"], wide_dtype(x.dtype))
        if self.on_input:
            scaled = scale_columns(x, w)
            return product(scaled, layer.matrix, layer.window, add=change, scale=scale)
        bias = layer.bias if self.scales_bias else None
        y = product(x, layer.matrix, layer.window, bias=bias)
        return scale_columns(y, elementwise.scale(w, scale), add=change)

    def contribute(
        self, change: Array | None, layer: Layer, x: Array, p: Parameters, scale: Array
    ) -> tuple[Array | None, Share | Turn | None]:
        # A bias that is multiplied too, or a factor for each channel of each group, is no Share.
        if (self.scales_bias and layer.bias is not None) or (
            self.on_input and self.shape.window.groups > 1
        ):
            return self.apply(change, layer, x, p, scale), None
        w = elementwise.scale(cast(p["weight"], wide_dtype(x.dtype)), scale)
        return change, Share("input" if self.on_input else "output", w, nothing(scale))

    @classmethod
    def guess_shape(cls, tensors: Mapping[str, np.ndarray]) -> LayerShape:
        shape = tensors["weight"].shape if "weight" in tensors else (1,)
        size = shape[1] if len(shape) > 1 else (*shape, 1)[0]
        window = Window.of((1,) * min(max(len(shape) - 2, 0), 3))
        on_input = _on_input(tensors)
        return LayerShape(window, size if on_input else 0, 0 if on_input else size)

    @classmethod
    def read(cls, shape: LayerShape, tensors: Mapping[str, np.ndarray], alpha: float | None) -> IA3:
        require(tensors, "weight", "on_input")
        return cls(shape, on_input=_on_input(tensors))

    def save(self, p: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {**super().save(p), "on_input": np.array(int(self.on_input), np.int64)}


def _on_input(tensors: Mapping[str, np.ndarray]) -> bool:
    """The flag of a file, 0 if it is not there."""
    value = float(tensors["on_input"].reshape(-1)[0]) if "on_input" in tensors else 0.0
    if value not in (0.0, 1.0):
        raise FileFormatError(f"on_input is {value:g}, expected 0 or 1")
    return bool(value)
