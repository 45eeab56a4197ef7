"""What a pending product's x is before: the product with a LoRA's down, or the mix by a LoKr's w1,
not carried out yet.

On Hopper one kernel may make it beside the layer's own product, for few positions (see
`skinny_gpu`) or for many (`extended_low_rank_gpu`, `extended_mixed_gpu`). Hu et al. 2021, arXiv
2106.09685; Yeh et al. 2023, arXiv 2309.14859.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from .. import plan
from ..arrays import Array, on_gpu
from ..tape import Fresh
from . import product_gpu, product_ways, skinny_gpu
from .extended_gpu import Extra
from .extended_low_rank_gpu import low_rank, low_rank_plan
from .extended_mixed_gpu import mixed, mixed_plan
from .few_mixed_gpu import few_mixed_gradients
from .kron import _mix_blocks, _mix_blocks_dw1, mix_blocks, mix_gradients, mixed_shape
from .low_rank_back import low_rank_back
from .product import (
    deferred_dx,
    finished,
    in_space_of,
    out_shape,
    product,
    product_gradients,
    wide_product,
)
from .window import Window


class Terms(NamedTuple):
    """Plain arrays of add + x * w + bias + scale * (x2 * w2 + bias2), where x2 is made of x.
    other: the window of w2. out: where the result goes, or None."""

    x: Array
    w: Array
    window: Window
    w2: Array
    other: Window
    add: Array | None
    bias: Array | None
    bias2: Array | None
    scale: Array | None
    out: Array | None

    @property
    def more(self) -> tuple[Array | None, ...]:
        return self.add, self.bias, self.bias2

    @property
    def inside(self) -> tuple[Extra, dict[str, Any]]:
        """For the kernel of few positions, which makes x2 itself."""
        extra = Extra(self.x, self.w2, self.other, self.scale, self.bias2)
        return extra, {"add": self.add, "bias": self.bias, "out": self.out}


Made = tuple[Array, Array | None]  # the result, and x2 if it was asked for
# The seconds of a way, of bytes moved; what runs it, None where it turns out not to run.
Way = tuple[Callable[[int], float], Callable[[], Made | None]]


@dataclass(frozen=True)
class Down:
    """x * factor, by a window.  factor: down, (taps, IN, R), of the dtype of x or wide."""

    factor: Array
    window: Window

    def __call__(self, x: Array) -> Array:
        return product(x, self.factor, self.window)

    @property
    def kind(self) -> _Down:
        return _Down(self.window)


@dataclass(frozen=True)
class Mixed:
    """mix_blocks(x, factor).  factor: w1, (L, M), of the dtype of x."""

    factor: Array

    def __call__(self, x: Array) -> Array:
        return mix_blocks(x, self.factor)

    @property
    def kind(self) -> _Mixed:
        return _Mixed()


@dataclass(frozen=True)
class _Down:
    """Of plain arrays."""

    window: Window

    def shape(self, x: tuple[int, ...], down: tuple[int, ...]) -> tuple[int, ...]:
        return out_shape(x, down, self.window)

    def make(self, x: Array, down: Array) -> Array:
        if on_gpu(x):
            return product_gpu.forward(x, down, self.window, scale=None, add=None, bias=None)
        return finished(wide_product(x, down, self.window), None, None, None, x)

    def gradients(self, needs: tuple[bool, bool], g: Array, x: Array, down: Array) -> tuple:
        """For x and down, by that of x2; None for one that is not needed."""
        own = (x if needs[1] else None), (down if needs[0] else None)
        return product_gradients(g, *own, None, self.window, in_space_of(x, self.window))

    def together(self, g, x, w, window: Window, down, h, up, other: Window, scale):
        """(two parts of dx, ddown, dup) where one kernel makes more than one of them, and is
        estimated to be faster; else None."""
        made = low_rank_back(g, x, w, window, down, self.window, h, up, other, scale)
        return made and (made[0], None, *made[1:])

    def joined(self, t: Terms, down: Array, keep: bool) -> Made | None:
        """The results of the terms, and x2 if keep, where one kernel makes both here and is
        estimated to be the fastest way; else None."""
        if not self.window.pointwise:
            return None
        ways: dict[str, Way] = {}
        few = skinny_gpu.low_rank_plan(*t[:3], down, t.w2, t.other, *t.more)
        if few is not None:
            extra, more = t.inside
            ways["inside"] = (
                few.seconds,
                lambda: skinny_gpu.skinny_low_rank(t.x, t.w, down, few, extra, keep=keep, **more),
            )
        many = low_rank_plan(*t[:3], down, self.window, t.w2, t.other, *t.more)
        if many is not None:
            ways["low rank"] = (
                lambda moved: many.seconds,
                lambda: low_rank(t.x, t.w, down, t.w2, many, scale=t.scale, bias=t.bias),
            )
        return _fastest(t, ways, lambda: product_ways.seconds(t.x, down, self.window))


@dataclass(frozen=True)
class _Mixed:
    """Of plain arrays."""

    def shape(self, x: tuple[int, ...], w1: tuple[int, ...]) -> tuple[int, ...]:
        return mixed_shape(x, w1)

    def make(self, x: Array, w1: Array) -> Array:
        return _mix_blocks(x, w1, turned=False)

    def gradients(self, needs: tuple[bool, bool], g: Array, x: Array, w1: Array) -> tuple:
        """As for _Down."""
        if all(needs):
            dx, dw1 = mix_gradients(g, x, w1)
            return Fresh(dx), dw1
        if needs[0]:
            return Fresh(_mix_blocks(g, w1, turned=True)), None
        rows, columns = w1.shape
        return None, _mix_blocks_dw1(g, x, rows=rows, columns=columns) if needs[1] else None

    def together(self, g, x, w, window: Window, w1, x2, w2, other: Window, scale):
        """As for _Down."""
        made = few_mixed_gradients(g, x2, w2, x, w1, other, scale)
        if made is None:
            return None
        dx = deferred_dx(g, w, None, window, in_space_of(x, window))
        return dx, Fresh(made[0]), *made[1:]

    def joined(self, t: Terms, w1: Array, keep: bool) -> Made | None:
        """As for _Down."""
        ways: dict[str, Way] = {}
        few = skinny_gpu.mixed_plan(*t[:3], w1, t.w2, t.other, *t.more)
        if few is not None:
            extra, more = t.inside
            ways["inside"] = (
                few.seconds,
                lambda: skinny_gpu.skinny_mixed(t.x, t.w, w1, few, extra, keep=keep, **more),
            )
        many = mixed_plan(*t[:3], w1, t.w2, t.other, *t.more)
        if many is not None:
            terms = {"scale": t.scale, "bias": t.bias, "keep": keep, "out": t.out}
            ways["mixed"] = (
                lambda moved: many.seconds,
                lambda: mixed(t.x, t.w, w1, t.w2, many, **terms),
            )
        results = t.x.size // w1.shape[1] * sum(w1.shape) * t.x.dtype.itemsize
        return _fastest(t, ways, lambda: plan.moving(results))


def _fastest(t: Terms, ways: dict[str, Way], before: Callable[[], float]) -> Made | None:
    """What the best of the ways gives; None where x2 by itself, in so many seconds, and then the
    rest are better."""
    if not ways:
        return None
    seconds = {name: of for name, (of, _) in ways.items()}
    best = product_ways.way_with(t.x, t.w, t.window, t.w2, t.other, seconds, before())
    return ways[best][1]() if best in ways else None
