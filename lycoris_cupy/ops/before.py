"""What a pending product's x is before: the product with a LoRA's down, the mix by a LoKr's w1, or
one after the other, not carried out yet.

On Hopper one kernel may make it beside the layer's own product, for few positions (see `skinny_gpu`
and `skinny_mixed_down_gpu`) or for many (`extended_low_rank_gpu`, `extended_mixed_gpu`). Hu et al.
2021, arXiv 2106.09685; Yeh et al. 2023, arXiv 2309.14859.
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
from .mixed import mixed_cpu, mixed_gpu, mixed_gradients, mixed_product
from .mixed import seconds as mixed_seconds
from .mixed_back import mixed_back
from .product import (
    deferred_dx,
    finished,
    in_space_of,
    out_shape,
    product,
    product_gradients,
    wide_product,
)
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

    @property
    def inside(self) -> tuple[Extra, dict[str, Any]]:
        """For the kernel of few positions, which makes x2 itself."""
        extra = Extra(self.x, self.w2, self.other, self.scale, self.bias2)
        return extra, {"add": self.add, "bias": self.bias, "out": self.out}


# The result, and if they were asked for x2 and what that is mixed from, where there are both.
Made = tuple[Array, Array | None, Array | None]
# The seconds of a way, of bytes moved; what runs it, None where it turns out not to run.
Way = tuple[Callable[[int], float], Callable[[], Made | None]]


@dataclass(frozen=True)
class _Down:
    """How x2 is made of x, and what follows: of plain arrays, but for the call itself."""

    window: Window

    def __call__(self, x: Array, down: Array) -> Array:
        """x2, of arrays that a tape may watch."""
        return product(x, down, self.window)

    def shape(self, x: tuple[int, ...], down: tuple[int, ...]) -> tuple[int, ...]:
        return out_shape(x, down, self.window)

    def make(self, x: Array, down: Array) -> tuple[Array, None]:
        """x2, and what that is mixed from."""
        if on_gpu(x):
            more = {"scale": None, "add": None, "bias": None}
            return product_gpu.forward(x, down, self.window, **more), None
        return finished(wide_product(x, down, self.window), None, None, None, x), None

    def gradients(self, needs: tuple[bool, ...], g: Array, x: Array, inner, down: Array) -> tuple:
        """For x and the factors, by that of x2; None for one that is not needed."""
        own = (x if needs[1] else None), (down if needs[0] else None)
        return product_gradients(g, *own, None, self.window, in_space_of(x, self.window))

    def together(self, g, x, w, window: Window, x2, inner, w2, other: Window, scale, down):
        """(two parts of dx, dw2, the factors') where one kernel makes more than one of them, and is
        estimated to be faster; else None."""
        made = low_rank_back(g, x, w, window, down, self.window, x2, w2, other, scale)
        if made is None:
            return None
        dx, ddown, dup = made
        return dx, None, dup, ddown

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
                lambda: (
                    *skinny_gpu.skinny_low_rank(t.x, t.w, down, few, extra, keep=keep, **more),
                    None,
                ),
            )
        many = low_rank_plan(*t[:3], down, self.window, t.w2, t.other, *t.more)
        if many is not None:
            ways["low rank"] = (
                lambda moved: many.seconds,
                lambda: _and_none(low_rank(t.x, t.w, down, t.w2, many, scale=t.scale, bias=t.bias)),
            )
        return _fastest(t, ways, lambda: product_ways.seconds(t.x, down, self.window))


@dataclass(frozen=True)
class _Mixed:
    """As _Down."""

    def __call__(self, x: Array, w1: Array) -> Array:
        return mix_blocks(x, w1)

    def shape(self, x: tuple[int, ...], w1: tuple[int, ...]) -> tuple[int, ...]:
        return mixed_shape(x, w1)

    def make(self, x: Array, w1: Array) -> tuple[Array, None]:
        return _mix_blocks(x, w1, turned=False), None

    def gradients(self, needs: tuple[bool, ...], g: Array, x: Array, inner, w1: Array) -> tuple:
        """As for _Down."""
        if all(needs):
            dx, dw1 = mix_gradients(g, x, w1)
            return Fresh(dx), dw1
        if needs[0]:
            return Fresh(_mix_blocks(g, w1, turned=True)), None
        rows, columns = w1.shape
        return None, _mix_blocks_dw1(g, x, rows=rows, columns=columns) if needs[1] else None

    def together(self, g, x, w, window: Window, x2, inner, w2, other: Window, scale, w1):
        """As for _Down."""
        made = few_mixed_gradients(g, x2, w2, x, w1, other, scale)
        if made is None:
            return None
        dx, dw1, dw2 = made
        own = deferred_dx(g, w, None, window, in_space_of(x, window))
        return own, Fresh(dx), dw2, dw1

    def joined(self, t: Terms, w1: Array, keep: bool) -> Made | None:
        """As for _Down."""
        ways: dict[str, Way] = {}
        few = skinny_gpu.mixed_plan(*t[:3], w1, t.w2, t.other, *t.more)
        if few is not None:
            extra, more = t.inside
            ways["inside"] = (
                few.seconds,
                lambda: (
                    *skinny_gpu.skinny_mixed(t.x, t.w, w1, few, extra, keep=keep, **more),
                    None,
                ),
            )
        many = mixed_plan(*t[:3], w1, t.w2, t.other, *t.more)
        if many is not None:
            terms = {"scale": t.scale, "bias": t.bias, "keep": keep, "out": t.out}
            ways["mixed"] = (
                lambda moved: many.seconds,
                lambda: _and_none(mixed(t.x, t.w, w1, t.w2, many, **terms)),
            )
        results = t.x.size // w1.shape[1] * sum(w1.shape) * t.x.dtype.itemsize
        return _fastest(t, ways, lambda: plan.moving(results))


@dataclass(frozen=True)
class _MixedDown:
    """As _Down."""

    window: Window

    def __call__(self, x: Array, down: Array, w1: Array) -> Array:
        return mixed_product(x, down, w1, self.window)

    def shape(self, x: tuple[int, ...], down: tuple[int, ...], w1: tuple[int, ...]):
        return mixed_shape(out_shape(x, down, self.window), w1)

    def make(self, x: Array, down: Array, w1: Array) -> tuple[Array, Array]:
        run = mixed_gpu if on_gpu(x) else mixed_cpu
        return run(x, down, w1, window=self.window, keep=True)

    def gradients(self, needs, g: Array, x: Array, inner: Array, down: Array, w1: Array) -> tuple:
        """As for _Down."""
        return mixed_gradients(needs, g, x, down, w1, inner, self.window)

    def together(self, g, x, w, window: Window, x2, inner, w2, other: Window, scale, down, w1):
        """As for _Down."""
        blocks = self.window.pointwise and self.window.shared
        made = few_mixed_gradients(g, x2, w2, inner, w1, other, scale, x if blocks else None)
        made = made or mixed_back(g, x2, w2, other, scale, inner, w1, x, down, self.window)
        if made is None:
            return None
        flow, dw1, dw2, *more = made
        space, ddown = in_space_of(x, window), more[0] if more else None
        if ddown is not None:
            dx = deferred_dx(flow, down, None, self.window, space)
        else:
            dx, ddown = product_gradients(flow, x, down, None, self.window, space)
        return deferred_dx(g, w, None, window, space), dx, dw2, ddown, dw1

    def joined(self, t: Terms, down: Array, w1: Array, keep: bool) -> Made | None:
        """As for _Down."""
        if not self.window.pointwise or not self.window.shared:
            return None
        few = mixed_down_plan(*t[:3], down, w1, t.w2, t.other, *t.more)
        if few is None:
            return None
        extra, more = t.inside

        def run() -> Made:
            y, kept = skinny_mixed_down(t.x, t.w, down, w1, few, extra, keep=keep, **more)
            return y, *(kept or (None, None))

        ways: dict[str, Way] = {"inside": (few.seconds, run)}
        return _fastest(t, ways, lambda: mixed_seconds(t.x, down, w1))


Kind = _Down | _Mixed | _MixedDown


@dataclass(frozen=True)
class Before:
    """What makes x2 of x, and its factors, of the dtype of x or wide. See the functions below."""

    kind: Kind
    factors: tuple[Array, ...]

    def __call__(self, x: Array) -> Array:
        return self.kind(x, *self.factors)


def by_down(down: Array, window: Window) -> Before:
    """x * down, by a window.  down: (taps, IN, R)."""
    return Before(_Down(window), (down,))


def by_mix(w1: Array) -> Before:
    """mix_blocks(x, w1).  w1: (L, M), of the dtype of x."""
    return Before(_Mixed(), (w1,))


def by_down_and_mix(down: Array, w1: Array, window: Window) -> Before:
    """mixed_product(x, down, w1, window)."""
    return Before(_MixedDown(window), (down, w1))


def _and_none(made: tuple | None) -> Made | None:
    return None if made is None else (*made, None)


def _fastest(t: Terms, ways: dict[str, Way], before: Callable[[], float]) -> Made | None:
    """What the best of the ways gives; None where x2 by itself, in so many seconds, and then the
    rest are better."""
    if not ways:
        return None
    seconds = {name: of for name, (of, _) in ways.items()}
    best = product_ways.way_with(t.x, t.w, t.window, t.w2, t.other, seconds, before())
    return ways[best][1]() if best in ways else None
