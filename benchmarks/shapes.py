"""The layers that are measured: linear layers of diffusion transformers, convolutions of U-Nets,
and a small one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lycoris_cupy import Conv2d, LayerShape, Linear
from lycoris_cupy.ops import Window


@dataclass(frozen=True)
class Shape:
    """name; the weight's shape in Flame layout; the input's shape, channels last; the window's
    options.
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
    def flops(self) -> int:
        """Of the bare forward."""
        layer = self.layer
        positions = 1
        space = layer.window.out_space(self.x[1:-1]) if layer.window.axes else self.x[1:-1]
        for n in (self.x[0], *space):
            positions *= n
        return 2 * positions * layer.taps * layer.inputs * layer.outputs


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
    Shape("linear 256 x 384 -> 768", (384, 768), (256, 384)),
    _conv("conv 1x24x24 64 k3", 1, 24, 64, 3),
    _conv("conv 1x32x32 96 k1", 1, 32, 96, 1),
]
