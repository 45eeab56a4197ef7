"""Layers: a frozen weight in Flame layout, a bias, and for a convolution its window. They know
nothing of adapters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .arrays import Array, require_float, require_same, to_device
from .errors import ShapeError
from .ops.extended import Change, extended
from .ops.product import product
from .ops.waiting import Waiting
from .ops.window import Window


@dataclass(frozen=True)
class LayerShape:
    """What an adapter has to know of a layer: its window, its inputs per group and its outputs over
    all groups.
    """

    window: Window
    inputs: int
    outputs: int

    @classmethod
    def of_file(cls, shape: tuple[int, ...]) -> LayerShape:
        """From the shape of a weight in torch's order: (O, I), or (O, I / groups, *kernel) whose
        groups are unknown.
        """
        if not 2 <= len(shape) <= 5:
            raise ShapeError(
                f"a weight of shape {tuple(shape)} is neither linear (O, I) nor a convolution (O, "
                "I, *kernel)"
            )
        return cls(Window.of(shape[2:]), shape[1], shape[0])

    @property
    def taps(self) -> int:
        return self.window.taps

    @property
    def channels(self) -> int:
        """Input channels over all groups."""
        return self.inputs * self.window.groups

    def flame(self, rows: int, columns: int, spatial: bool) -> tuple[int, ...]:
        """The Flame shape of a factor (rows, columns): with the kernel's extents if spatial, ones
        otherwise.
        """
        return (*(self.window.kernel if spatial else (1,) * self.window.axes), rows, columns)

    @property
    def file_shape(self) -> tuple[int, ...]:
        return (self.outputs, self.inputs, *self.window.kernel)

    def __str__(self) -> str:
        kind = "Linear" if not self.window.axes else f"Conv{self.window.axes}d"
        walk = f", {self.window}" if self.window.axes else ""
        return f"{kind}({self.channels} -> {self.outputs}{walk})"


@dataclass(frozen=True, eq=False)
class Layer:
    """weight: (IN, OUT), or (*kernel, IN / groups, OUT). bias: (OUT,) or None, same dtype. Made by
    Linear and ConvNd.
    """

    weight: Array
    bias: Array | None
    window: Window

    def __post_init__(self):
        require_float(self.weight, "weight")
        if (
            self.weight.ndim != self.window.axes + 2
            or tuple(self.weight.shape[: self.window.axes]) != self.window.kernel
        ):
            raise ShapeError(
                f"weight has shape {tuple(self.weight.shape)}, expected (*{self.window.kernel}, "
                "IN, OUT)"
            )
        if self.weight.shape[-1] % self.window.groups:
            raise ShapeError(
                f"{self.weight.shape[-1]} outputs are not a multiple of the {self.window.groups} "
                "groups"
            )
        if self.bias is not None:
            require_float(self.bias, "bias")
            require_same("weight", self.weight, "bias", self.bias)
            if tuple(self.bias.shape) != (self.weight.shape[-1],):
                raise ShapeError(
                    f"bias has shape {tuple(self.bias.shape)}, expected ({self.weight.shape[-1]},)"
                )

    @property
    def shape(self) -> LayerShape:
        return LayerShape(self.window, self.weight.shape[-2], self.weight.shape[-1])

    @property
    def matrix(self) -> Array:
        """The weight as every algorithm sees it: (taps, IN / groups, OUT)."""
        return self.weight.reshape(self.window.taps, *self.weight.shape[-2:])

    def forward(
        self,
        x: Array,
        change: Change | None = None,
        c: Array | None = None,
        spend: bool = False,
    ) -> Array:
        """c * (x * weight) + bias + change, one rounding. change: what adapters add, (..., OUT). c:
        (OUT,) wide, or None for 1; only beside a pending change without a scale of its own. spend:
        the change is read nowhere else, and may be where the output is written.
        """
        more = {"bias": self.bias, "spend": spend}
        if isinstance(change, Waiting):
            return extended(x, self.matrix, self.window, change, c=c, **more)
        return product(x, self.matrix, self.window, add=change, **more)

    def to(self, device: str, dtype=None) -> Layer:
        """The layer on 'cpu' or 'cuda:<index>', in another dtype if one is given."""

        def move(array):
            if array is None:
                return None
            array = to_device(array, device)
            return array if dtype is None or array.dtype == dtype else array.astype(dtype)

        return self._with(move(self.weight), move(self.bias))

    def replaced(self, weight: Array, bias: Array | None) -> Layer:
        """The same layer with another weight (taps, IN, OUT) and bias."""
        return self._with(weight.reshape(self.weight.shape), bias)

    def _with(self, weight: Array, bias: Array | None) -> Layer:
        return Layer(weight, bias, self.window)


class Linear(Layer):
    """y = x @ weight + bias.  weight: (IN, OUT). bias: (OUT,) or None."""

    def __init__(self, weight: Array, bias: Array | None = None):
        _require_axes(weight, 0)
        super().__init__(weight, bias, Window())

    @classmethod
    def from_torch(cls, weight: Array, bias: Array | None = None) -> Linear:
        """From a weight in torch's order, (OUT, IN), on the CPU."""
        _require_axes(weight, 0)
        return cls(np.ascontiguousarray(np.asarray(weight).T), bias)


class _Conv(Layer):
    axes: ClassVar[int]

    def __init__(
        self,
        weight: Array,
        bias: Array | None = None,
        *,
        stride=1,
        padding=0,
        dilation=1,
        groups: int = 1,
    ):
        _require_axes(weight, self.axes)
        super().__init__(
            weight, bias, Window.of(weight.shape[: self.axes], stride, padding, dilation, groups)
        )

    @classmethod
    def from_torch(
        cls,
        weight: Array,
        bias: Array | None = None,
        *,
        stride=1,
        padding=0,
        dilation=1,
        groups: int = 1,
    ):
        """From a weight in torch's order, (OC, IC / groups, *kernel), on the CPU."""
        _require_axes(weight, cls.axes)
        flame = np.ascontiguousarray(np.moveaxis(np.asarray(weight), (0, 1), (-1, -2)))
        return cls(flame, bias, stride=stride, padding=padding, dilation=dilation, groups=groups)


class Conv1d(_Conv):
    """Convolution of (N, L, C).  weight: (K, IC / groups, OC). bias: (OC,) or None."""

    axes = 1


class Conv2d(_Conv):
    """Convolution of (N, H, W, C).  weight: (KH, KW, IC / groups, OC). bias: (OC,) or None."""

    axes = 2


class Conv3d(_Conv):
    """Convolution of (N, D, H, W, C).  weight: (KD, KH, KW, IC / groups, OC). bias: (OC,)."""

    axes = 3


def _require_axes(weight: Array, axes: int) -> None:
    if weight.ndim != axes + 2:
        raise ShapeError(f"weight has shape {tuple(weight.shape)}, expected {axes + 2} axes")
