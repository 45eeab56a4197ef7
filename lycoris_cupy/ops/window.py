"""Window: how a product walks over space. A linear layer is the window with no axes, a convolution
one with one to three.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from ..errors import ShapeError


@dataclass(frozen=True)
class Window:
    """Kernel extents, stride, padding and dilation of each spatial axis, and the channel groups.

    shared: every group uses the same weight (taps, in, out), instead of its own columns of (taps,
    in, groups * out).
    """

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    shared: bool = False

    @classmethod
    def of(cls, kernel, stride=1, padding=0, dilation=1, groups: int = 1) -> Window:
        """A window with every setting spread over the kernel's axes; padding may also be 'same'
        (stride 1) or 'valid'.
        """
        kernel = tuple(int(k) for k in kernel)
        axes = len(kernel)
        if axes > 3:
            raise ShapeError(f"kernel {kernel} has {axes} axes, expected 0 (linear) to 3")
        stride, dilation = (
            _spread("stride", stride, axes, 1),
            _spread("dilation", dilation, axes, 1),
        )
        if padding == "valid":
            padding = 0
        elif padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            if any(s != 1 for s in stride) or any(t % 2 for t in total):
                raise ShapeError(
                    "padding 'same' needs stride 1 and an even dilation * (kernel - 1) on each "
                    f"axis; kernel {kernel}, "
                    f"stride {stride}, dilation {dilation}: pad the input yourself and give a "
                    "number"
                )
            padding = [t // 2 for t in total]
        padding = _spread("padding", padding, axes, 0)
        if min(kernel, default=1) < 1 or groups < 1:
            raise ShapeError(f"kernel {kernel} and groups {groups} must be at least 1")
        return cls(kernel, stride, padding, dilation, int(groups))

    @property
    def axes(self) -> int:
        return len(self.kernel)

    @property
    def taps(self) -> int:
        return prod(self.kernel)

    @property
    def pointwise(self) -> bool:
        """True when each output position reads one input position, its own: a plain matrix product
        does it.
        """
        return (
            all(k == 1 for k in self.kernel)
            and all(s == 1 for s in self.stride)
            and not any(self.padding)
        )

    def out_space(self, space: tuple[int, ...]) -> tuple[int, ...]:
        """The spatial extents of the output for an input with these."""
        out = tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(
                space, self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )
        if any(o < 1 for o in out):
            raise ShapeError(f"input of extents {space} is smaller than the window {self}")
        return out

    def pointwise_like(self, groups: int = 1, shared: bool = False) -> Window:
        """A window of the same axes that looks at one position."""
        one, none = (1,) * self.axes, (0,) * self.axes
        return Window(one, one, none, one, groups, shared)

    def grouped(self, groups: int, shared: bool = False) -> Window:
        """The same walk over space with other groups."""
        return replace(self, groups=groups, shared=shared)

    def __str__(self) -> str:
        if not self.kernel:
            return "linear" if self.groups == 1 else f"linear, {self.groups} groups"
        text = "x".join(map(str, self.kernel))
        for name, value, usual in (
            ("stride", self.stride, 1),
            ("padding", self.padding, 0),
            ("dilation", self.dilation, 1),
        ):
            if any(v != usual for v in value):
                text += f" {name} {'x'.join(map(str, value))}"
        return text + (f" groups {self.groups}" if self.groups > 1 else "")


def _spread(name: str, value, axes: int, least: int) -> tuple[int, ...]:
    values = (value,) * axes if isinstance(value, int) else tuple(int(v) for v in value)
    if len(values) != axes:
        raise ShapeError(f"{name} {values} has {len(values)} entries, the kernel has {axes} axes")
    if any(v < least for v in values):
        raise ShapeError(f"{name} {values} must be at least {least} on each axis")
    return values
