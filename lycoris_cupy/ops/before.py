"""What a pending product's x is before: the product with a LoRA's down, the mix by a LoKr's w1, or
one after the other, not carried out yet.

On Hopper one kernel may make it beside the layer's own product, for few positions (see `skinny_gpu`
and `skinny_mixed_down_gpu`) or for many (`extended_low_rank_gpu`, `extended_mixed_gpu`). Both
results are then there; what they are recorded as is the same as if each had been computed by
itself. Hu et al. 2021, arXiv 2106.09685; Yeh et al. 2023, arXiv 2309.14859.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from .. import plan
from ..arrays import Array, on_gpu
from ..tape import value_of
from . import product_ways, skinny_gpu
from .extended_gpu import Extra
from .extended_low_rank_gpu import low_rank, low_rank_plan
from .extended_mixed_gpu import mixed, mixed_plan
from .kron import mix_blocks
from .mixed import mixed_product
from .mixed import seconds as mixed_seconds
from .product import product
from .skinny_mixed_down_gpu import mixed_down_plan, skinny_mixed_down
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


# The result, and x2 if it was asked for, of MixedDown with what it is mixed from.
Made = tuple[Array, Array | tuple[Array, Array] | None]
# The seconds of a way, of bytes moved; what runs it, None where it turns out not to run.
Way = tuple[Callable[[int], float], Callable[[], Made | None]]


@dataclass(frozen=True)
class Down:
    """x * w, by this window. w: of the dtype of x, or wide."""

    w: Array
    window: Window

    def __call__(self, x: Array, made: Array | None = None) -> Array:
        return product(x, self.w, self.window, made=made)

    def joined(self, t: Terms, keep: bool) -> Made | None:
        """The results of the terms, and x2 if keep, where one kernel makes both here and is
        estimated to be the fastest way; else None."""
        down = value_of(self.w)
        if not on_gpu(t.x) or not self.window.pointwise or down.dtype != t.x.dtype:
            return None
        ways: dict[str, Way] = {}
        few = skinny_gpu.low_rank_plan(*t[:3], down, t.w2, t.other, *t.more)
        if few is not None:
            extra = Extra(t.x, t.w2, t.other, t.scale, t.bias2)
            more = {"add": t.add, "bias": t.bias, "keep": keep, "out": t.out}
            ways["inside"] = (
                few.seconds,
                lambda: skinny_gpu.skinny_low_rank(t.x, t.w, down, few, extra, **more),
            )
        many = low_rank_plan(*t[:3], down, self.window, t.w2, t.other, *t.more)
        if many is not None:
            ways["low rank"] = (
                lambda moved: many.seconds,
                lambda: low_rank(t.x, t.w, down, t.w2, scale=t.scale, bias=t.bias),
            )
        return _fastest(t, ways, lambda: product_ways.seconds(t.x, down, self.window))


@dataclass(frozen=True)
class Mixed:
    """mix_blocks(x, w1)."""

    w1: Array

    def __call__(self, x: Array, made: Array | None = None) -> Array:
        return mix_blocks(x, self.w1, made=made)

    def joined(self, t: Terms, keep: bool) -> Made | None:
        """As for Down."""
        if not on_gpu(t.x):
            return None
        w1, ways = value_of(self.w1), {}
        few = skinny_gpu.mixed_plan(*t[:3], w1, t.w2, t.other, *t.more)
        if few is not None:
            extra = Extra(t.x, t.w2, t.other, t.scale, t.bias2)
            more = {"add": t.add, "bias": t.bias, "keep": keep, "out": t.out}
            ways["inside"] = (
                few.seconds,
                lambda: skinny_gpu.skinny_mixed(t.x, t.w, w1, few, extra, **more),
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


@dataclass(frozen=True)
class MixedDown:
    """mixed_product(x, w, w1, window). w: of the dtype of x, or wide."""

    w: Array
    w1: Array
    window: Window

    def __call__(self, x: Array, made: tuple[Array, Array] | None = None) -> Array:
        """made: the result and its inner one."""
        return mixed_product(x, self.w, self.w1, self.window, made=made)

    def joined(self, t: Terms, keep: bool) -> Made | None:
        """As for Down, but with x2 comes what it is mixed from."""
        down, w1 = value_of(self.w), value_of(self.w1)
        if not on_gpu(t.x) or not self.window.pointwise or down.dtype != t.x.dtype:
            return None
        if not self.window.shared or self.window.groups != w1.shape[1]:  # refused, by itself
            return None
        few = mixed_down_plan(*t[:3], down, w1, t.w2, t.other, *t.more)
        if few is None:
            return None
        extra = Extra(t.x, t.w2, t.other, t.scale, t.bias2)
        more = {"add": t.add, "bias": t.bias, "keep": keep, "out": t.out}
        inside = few.seconds, lambda: skinny_mixed_down(t.x, t.w, down, w1, few, extra, **more)
        return _fastest(t, {"inside": inside}, lambda: mixed_seconds(t.x, down, w1))


def _fastest(t: Terms, ways: dict[str, Way], before: Callable[[], float]) -> Made | None:
    """What the best of the ways gives; None where x2 by itself, in so many seconds, and then the
    rest are better."""
    if not ways:
        return None
    seconds = {name: of for name, (of, _) in ways.items()}
    best = product_ways.way_with(t.x, t.w, t.window, t.w2, t.other, seconds, before())
    return ways[best][1]() if best in ways else None
