"""Norm layers: LayerNorm over the last axis, GroupNorm over space and the channels of a group.

They are layers of an engine like any other, for the adapters that change their weight and bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .arrays import Array, module_of, require_float, require_same, wide_dtype
from .errors import ShapeError
from .layers import Layer, LayerShape
from .ops.elementwise import add, cast
from .ops.norm import group_norm, layer_norm
from .ops.window import Window


@dataclass(frozen=True)
class NormShape(LayerShape):
    """What an adapter has to know of a norm: its channels, which stand as outputs of one input."""

    kind: str = "norm"

    @classmethod
    def of_channels(cls, channels: int, kind: str = "norm") -> NormShape:
        """kind: what people call the layer; a checkpoint does not say it."""
        return cls(Window(), 1, channels, kind)

    @property
    def channels(self) -> int:
        return self.outputs

    @property
    def file_shape(self) -> tuple[int, ...]:
        return (self.outputs,)

    def __str__(self) -> str:
        return f"{self.kind}({self.outputs})"


class _Norm(Layer):
    """weight: (C,). bias: (C,) or None."""

    eps: float

    def __init__(self, weight: Array, bias: Array | None, eps: float):
        super().__init__(weight, bias, Window())
        object.__setattr__(self, "eps", float(eps))

    def __post_init__(self):
        require_float(self.weight, "weight")
        if self.weight.ndim != 1:
            raise ShapeError(
                f"weight has shape {tuple(self.weight.shape)}, expected (C,): a norm over several "
                "axes has no adapter"
            )
        if self.bias is not None:
            require_same("weight", self.weight, "bias", self.bias)
            if tuple(self.bias.shape) != tuple(self.weight.shape):
                raise ShapeError(
                    f"bias has shape {tuple(self.bias.shape)}, expected {tuple(self.weight.shape)}"
                )

    @property
    def shape(self) -> NormShape:
        return NormShape.of_channels(self.weight.shape[0], type(self).__name__)

    @property
    def matrix(self) -> Array:
        """The weight as every algorithm sees it: (1, 1, C)."""
        return self.weight.reshape(1, 1, -1)

    def forward(
        self, x: Array, change: Sequence[Array | None] | None = None, spend: bool = False
    ) -> Array:
        """The norm with weight and bias changed by `change`, (C,) wide each or None; one rounding.

        One pass whatever adapters there are: they change a vector, not the output. spend: as for
        every layer; there is nothing here to write an output into.
        """
        kept = wide_dtype(self.weight.dtype)
        weight = cast(self.weight, kept)
        bias = module_of(weight).zeros_like(weight) if self.bias is None else cast(self.bias, kept)
        for change_of_weight, change_of_bias in [change] if change is not None else []:
            weight = weight if change_of_weight is None else add(weight, change_of_weight)
            bias = bias if change_of_bias is None else add(bias, change_of_bias)
        return self._normalized(x, weight, bias)

    def _normalized(self, x: Array, weight: Array, bias: Array) -> Array:
        raise NotImplementedError


class LayerNorm(_Norm):
    """y = (x - mean) / sqrt(variance + eps) * weight + bias over the last axis.  weight: (C,)."""

    def __init__(self, weight: Array, bias: Array | None = None, *, eps: float = 1e-5):
        super().__init__(weight, bias, eps)

    def _normalized(self, x: Array, weight: Array, bias: Array) -> Array:
        return layer_norm(x, weight, bias, eps=self.eps)

    def _with(self, weight: Array, bias: Array | None) -> LayerNorm:
        return LayerNorm(weight, bias, eps=self.eps)


class GroupNorm(_Norm):
    """y = (x - mean) / sqrt(variance + eps) * weight + bias over the space and the C / groups
    channels of each group of each sample.  x: (N, *space, C). weight: (C,).
    """

    groups: int

    def __init__(self, weight: Array, bias: Array | None = None, *, groups: int, eps: float = 1e-5):
        super().__init__(weight, bias, eps)
        if groups < 1 or self.weight.shape[0] % groups:
            raise ShapeError(
                f"{self.weight.shape[0]} channels are not a multiple of the {groups} groups"
            )
        object.__setattr__(self, "groups", int(groups))

    def _normalized(self, x: Array, weight: Array, bias: Array) -> Array:
        return group_norm(x, weight, bias, groups=self.groups, eps=self.eps)

    def _with(self, weight: Array, bias: Array | None) -> GroupNorm:
        return GroupNorm(weight, bias, groups=self.groups, eps=self.eps)
