"""low_rank_extended: a layer's product and a LoRA's in one sum, the inner one made beside them.

    y = add + x * w + scale * ((x * down) * up + bias2) + bias          rounded once

On Hopper one launch for few positions, which reads down beside w (see cuda_src/skinny.cu);
`Inner.joined` says where that is the faster way. Elsewhere the inner product, and then the two as
`extended` has them. Hu et al. 2021, arXiv 2106.09685.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..arrays import Array, on_gpu, require_same
from ..errors import ShapeError
from ..tape import Deferred, Primitive, value_of
from . import product_gpu, skinny_gpu
from .columns import column_sum
from .elementwise import cast
from .extended_gpu import Extra
from .product import (
    finished,
    in_space_of,
    out_shape,
    product,
    product_gradients,
    wide_product,
)
from .window import Window


@dataclass(frozen=True)
class Inner:
    """What a pending product's x is before: not yet the product with down, by this window."""

    down: Array
    window: Window

    def __call__(self, x: Array) -> Array:
        return product(x, self.down, self.window)

    def joined(self, x, w, window: Window, up, other: Window, terms: dict) -> Array | None:
        """`low_rank_extended`, where one kernel computes it here and is estimated to be the fastest
        way; else None. terms: scale, add, bias, bias2, spend.
        """
        x_, w_, down, up_ = (value_of(a) for a in (x, w, self.down, up))
        if not on_gpu(x_) or not self.window.pointwise or down.dtype != x_.dtype:
            return None
        more = (value_of(terms[name]) for name in ("add", "bias", "bias2"))
        planned = skinny_gpu.low_rank_plan(x_, w_, window, down, up_, other, *more)
        if planned is None:
            return None
        before = product_gpu.seconds(x_, down, self.window)
        if not product_gpu.takes_in(x_, w_, window, up_, other, planned, before):
            return None
        return low_rank_extended(x, w, window, self.down, up, other, **terms)


def low_rank_extended(
    x: Array,
    w: Array,
    window: Window,
    down: Array,
    up: Array,
    other: Window,
    *,
    scale: Array | None = None,
    add: Array | None = None,
    bias: Array | None = None,
    bias2: Array | None = None,
    spend: bool = False,
) -> Array:
    """The sum above, of the dtype of x. x, w, window, add, bias, spend: as for `product`.

    window has one group. down: (taps, IN, R), walks like w. up: (1, R, OUT), `other` pointwise;
    wide factors are rounded. bias2: (OUT,). scale: (1,) wide, a constant of the tape, or None for
    1. Raises ShapeError, DtypeError.
    """
    down, up = cast(down, x.dtype), cast(up, x.dtype)
    arrays = ("w", w), ("down", down), ("up", up), ("add", add), ("bias", bias), ("bias2", bias2)
    for name, array in arrays:
        if array is not None:
            require_same("x", value_of(x), name, value_of(array))
    shape = out_shape(x.shape, w.shape, window)
    given = out_shape(out_shape(x.shape, down.shape, window), up.shape, other)
    if given != shape:
        raise ShapeError(f"x2 * up has shape {given}, expected that of x * w, {shape}")
    for name, array, expected in (
        ("add", add, shape),
        *((n, a, shape[-1:]) for n, a in arrays[4:]),
    ):
        if array is not None and tuple(array.shape) != expected:
            raise ShapeError(f"{name} has shape {tuple(array.shape)}, expected {expected}")
    return _low_rank_extended(
        x, w, bias, add, x, down, up, bias2, scale, window=window, other=other, spend=spend
    )


def _cpu(x, w, bias, add, same, down, up, bias2, scale, *, window, other, spend, keep):
    x2 = finished(wide_product(x, down, window), None, None, None, x)
    total = wide_product(x2, up, other)
    if bias2 is not None:
        total += bias2.astype(total.dtype, copy=False)
    if scale is not None:
        total *= scale
    total += wide_product(x, w, window)
    return finished(total, None, add, bias, x), x2 if keep else None


def _gpu(x, w, bias, add, same, down, up, bias2, scale, *, window, other, spend, keep):
    planned = skinny_gpu.low_rank_plan(x, w, window, down, up, other, add, bias, bias2)
    if planned is not None:
        extra = Extra(x, up, other, scale, bias2)
        more = {"add": add, "bias": bias, "keep": keep, "out": add if spend else None}
        return skinny_gpu.skinny_low_rank(x, w, down, planned, extra, **more)
    x2 = product_gpu.forward(x, down, window, scale=None, add=None, bias=None)
    extra = Extra(x2, up, other, scale, bias2)
    more = {"add": add, "bias": bias, "extra": extra, "spend": spend}
    y = product_gpu.forward(x, w, window, scale=None, **more)
    return y, x2 if keep else None


def _vjp(needs, out, x, w, bias, add, same, down, up, bias2, scale, *, window, other, spend, kept):
    """x stands twice, so that its gradients by both products are two contributions. kept: x2."""
    space, x2_space = in_space_of(x, window), in_space_of(out, other)
    first = x if needs[1] else None, w if needs[0] else None
    inner = x if needs[5] else None, down if needs[4] else None
    outer = kept if needs[6] else None, up if needs[4] or needs[5] else None
    del x, kept

    def pull(g):
        flow, dup = product_gradients(g, *outer, scale, other, x2_space)
        dx = ddown = None
        if flow is not None:
            flow = (
                flow.run(None, None, False) if isinstance(flow, Deferred) else cast(flow, g.dtype)
            )
            dx, ddown = product_gradients(flow, *inner, None, window, space)
        return (
            *product_gradients(g, *first, None, window, space),
            column_sum(g) if needs[2] else None,
            g if needs[3] else None,
            dx,
            ddown,
            dup,
            column_sum(g, scale) if needs[7] else None,
            None,
        )

    return pull


_low_rank_extended = Primitive("low_rank_extended", _cpu, _gpu, _vjp, keeps=True)
