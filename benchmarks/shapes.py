"""The layers that are measured: linear layers of diffusion transformers, convolutions of U-Nets,
and a small one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import numpy as np

from lycoris_cupy import Conv2d, LayerShape, Linear, bf16
from lycoris_cupy.ops import Window


@dataclass(frozen=True)
class Shape:
    """name; the weight's shape in Flame layout; the input's shape, channels last; the window's
    options. Convolutions have stride 1 and keep the extents of the picture.
    """

    name: str
    weight: tuple[int, ...]
    x: tuple[int, ...]
    options: dict = field(default_factory=dict)

    @property
    def layer(self) -> LayerShape:
        window = Window.of(self.weight[:-2], **self.options)
        return LayerShape(window, *self.weight[-2:])

    def build(self, weight, bias):
        return (Linear if len(self.weight) == 2 else Conv2d)(weight, bias, **self.options)

    @property
    def positions(self) -> int:
        """Output positions (tokens, pixels); as many as input positions."""
        return prod(self.x[:-1])

    @property
    def kind(self) -> str:
        """'linear', 'conv k1' or 'conv k3'."""
        return "linear" if len(self.weight) == 2 else f"conv k{self.weight[0]}"

    @property
    def flops(self) -> int:
        """Of the bare forward."""
        layer = self.layer
        return 2 * self.positions * layer.taps * layer.inputs * layer.outputs

    def data(self, seed: int = 0) -> dict[str, np.ndarray]:
        """weight, bias, x, dy: bf16, normal, the weight such that y is about 1."""
        rng = np.random.default_rng(seed)

        def normal(shape, scale=1.0):
            return (rng.standard_normal(shape, np.float32) * np.float32(scale)).astype(bf16)

        return {
            "weight": normal(self.weight, prod(self.weight[:-1]) ** -0.5),
            "bias": normal(self.weight[-1:]),
            "x": normal(self.x),
            "dy": normal((*self.x[:-1], self.weight[-1])),
        }


def _conv(name, n, side, channels, kernel):
    return Shape(
        name,
        (kernel, kernel, channels, channels),
        (n, side, side, channels),
        {"padding": kernel // 2},
    )


SHAPES = [
    Shape("linear 4608 x 3072 -> 3072", (3072, 3072), (4608, 3072)),
    Shape("linear 4608 x 3072 -> 12288", (3072, 12288), (4608, 3072)),
    Shape("linear 8192 x 4096 -> 14336", (4096, 14336), (8192, 4096)),
    _conv("conv 4x128x128 320 k3", 4, 128, 320, 3),
    _conv("conv 4x64x64 640 k3", 4, 64, 640, 3),
    _conv("conv 4x32x32 1280 k3", 4, 32, 1280, 3),
    _conv("conv 4x64x64 640 k1", 4, 64, 640, 1),
    Shape("linear 64 x 3072 -> 3072", (3072, 3072), (64, 3072)),
]

# The same kinds of layers at a size that NumPy on a laptop finishes in milliseconds.
CPU_SHAPES = [
    Shape("linear 128 x 384 -> 768", (384, 768), (128, 384)),
    _conv("conv 1x10x10 320 k3", 1, 10, 320, 3),
    _conv("conv 1x16x16 96 k1", 1, 16, 96, 1),
]

# Weights of 32 MiB and more, whose change is built; the input only says how they are walked.
WEIGHTS = [
    Shape("linear 3072 -> 12288", (3072, 12288), (1, 3072)),
    Shape("linear 4096 -> 14336", (4096, 14336), (1, 4096)),
    Shape("conv 2560 -> 1280 k3", (3, 3, 2560, 1280), (1, 8, 8, 2560), {"padding": 1}),
]
CPU_WEIGHTS = [
    Shape("linear 384 -> 768", (384, 768), (1, 384)),
    Shape("conv 160 -> 80 k3", (3, 3, 160, 80), (1, 8, 8, 160), {"padding": 1}),
]
