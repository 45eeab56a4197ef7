"""mixed_extended: a layer's product and a LoKr's in one sum, blocks of x mixed for the second.

    y = add + x * w + scale * (mix_blocks(x, w1) * w2 + bias2) + bias          rounded once

On Hopper one launch for few positions, which makes the mix of the channels of x that it has at hand
(see cuda_src/skinny.cu); `Mixed.joined` says where that is the faster way. Elsewhere a mix, and the
two products as `extended` has them. Yeh et al. 2023, arXiv 2309.14859.
"""

from __future__ import annotations

from dataclasses import dataclass

from .. import plan
from ..arrays import Array, on_gpu, require_axes, require_same
from ..errors import ShapeError
from ..tape import Deferred, Fresh, Primitive, value_of
from . import product_gpu, skinny_gpu
from .columns import column_sum
from .elementwise import cast
from .extended_gpu import Extra
from .kron import _mix_blocks, _mix_blocks_dw1, mix_blocks, mix_gradients
from .product import finished, in_space_of, out_shape, product_gradients, wide_product
from .window import Window


def mixed_extended(
    x: Array,
    w: Array,
    window: Window,
    w1: Array,
    w2: Array,
    other: Window,
    *,
    scale: Array | None = None,
    add: Array | None = None,
    bias: Array | None = None,
    bias2: Array | None = None,
    spend: bool = False,
) -> Array:
    """The sum above, of the dtype of x. x, w, window, add, bias, spend: as for `product`.

    w1: (L, M). w2: (taps, N, K), shared by the L groups of `other`, with M * N the channels of x
    and L * K the columns of w; a wide one is rounded. bias2: (L * K,). scale: (1,) wide, a constant
    of the tape, or None for 1. Raises ShapeError, DtypeError.
    """
    require_axes(w1, 2, "w1", "(L, M)")
    require_axes(w2, 3, "w2", "(taps, N, K)")
    w2 = cast(w2, x.dtype)
    arrays = ("w", w), ("w1", w1), ("w2", w2), ("add", add), ("bias", bias), ("bias2", bias2)
    for name, array in arrays:
        if array is not None:
            require_same("x", value_of(x), name, value_of(array))
    shape, (rows, blocks) = out_shape(x.shape, w.shape, window), w1.shape
    if x.shape[-1] != blocks * w2.shape[1] or other.groups != rows:
        raise ShapeError(
            f"w1 {tuple(w1.shape)} and w2 {tuple(w2.shape)} mix {blocks * w2.shape[1]} channels "
            f"to {rows} blocks, expected the {x.shape[-1]} of x and {other.groups} groups"
        )
    if (given := out_shape((*x.shape[:-1], rows * w2.shape[1]), w2.shape, other)) != shape:
        raise ShapeError(f"x2 * w2 has shape {given}, expected that of x * w, {shape}")
    for name, array, expected in (
        ("add", add, shape),
        *((n, a, shape[-1:]) for n, a in arrays[4:]),
    ):
        if array is not None and tuple(array.shape) != expected:
            raise ShapeError(f"{name} has shape {tuple(array.shape)}, expected {expected}")
    return _mixed_extended(
        x, w, bias, add, x, w1, w2, bias2, scale, window=window, other=other, spend=spend
    )


@dataclass(frozen=True)
class Mixed:
    """What a pending product's x is before: not mixed by w1 yet."""

    w1: Array

    def __call__(self, x: Array) -> Array:
        return mix_blocks(x, self.w1)

    def joined(self, x, w, window: Window, w2, other: Window, terms: dict) -> Array | None:
        """`mixed_extended`, where one kernel computes it here and is estimated to be the fastest
        way; else None. terms: scale, add, bias, bias2, spend.
        """
        values = value_of(x), value_of(w), window, value_of(self.w1), value_of(w2), other
        if not on_gpu(values[0]):
            return None
        more = (value_of(terms[name]) for name in ("add", "bias", "bias2"))
        planned = skinny_gpu.mixed_plan(*values, *more)
        if planned is None:
            return None
        x_, w_, w2_ = values[0], values[1], values[4]
        results = x_.size // self.w1.shape[1] * sum(self.w1.shape) * x_.dtype.itemsize
        if not product_gpu.takes_in(x_, w_, window, w2_, other, planned, plan.moving(results)):
            return None
        return mixed_extended(x, w, window, self.w1, w2, other, **terms)


def _cpu(x, w, bias, add, same, w1, w2, bias2, scale, *, window, other, spend, keep):
    x2 = _mix_blocks(x, w1, turned=False)
    total = wide_product(x2, w2, other)
    if bias2 is not None:
        total += bias2.astype(total.dtype, copy=False)
    if scale is not None:
        total *= scale
    total += wide_product(x, w, window)
    return finished(total, None, add, bias, x), x2 if keep else None


def _gpu(x, w, bias, add, same, w1, w2, bias2, scale, *, window, other, spend, keep):
    planned = skinny_gpu.mixed_plan(x, w, window, w1, w2, other, add, bias, bias2)
    if planned is not None:
        extra = Extra(x, w2, other, scale, bias2)
        more = {"add": add, "bias": bias, "keep": keep, "out": add if spend else None}
        return skinny_gpu.skinny_mixed(x, w, w1, planned, extra, **more)
    x2 = _mix_blocks(x, w1, turned=False)
    extra = Extra(x2, w2, other, scale, bias2)
    more = {"add": add, "bias": bias, "extra": extra, "spend": spend}
    y = product_gpu.forward(x, w, window, scale=None, **more)
    return y, x2 if keep else None


def _vjp(needs, out, x, w, bias, add, same, w1, w2, bias2, scale, *, window, other, spend, kept):
    """x stands twice, so that its gradients by both products are two contributions. kept: x2."""
    space, x2_space, (rows, columns) = in_space_of(x, window), in_space_of(x, other), w1.shape
    first = x if needs[1] else None, w if needs[0] else None
    second = kept if needs[6] else None, w2 if needs[4] or needs[5] else None
    x = x if needs[5] else None
    del kept

    def pull(g):
        dx = dw1 = None
        flow, dw2 = product_gradients(g, *second, scale, other, x2_space)
        if flow is not None:
            flow = (
                flow.run(None, None, False) if isinstance(flow, Deferred) else cast(flow, g.dtype)
            )
            if needs[4] and needs[5]:
                dx, dw1 = mix_gradients(flow, x, w1)
            elif needs[4]:
                dx = _mix_blocks(flow, w1, turned=True)
            else:
                dw1 = _mix_blocks_dw1(flow, x, rows=rows, columns=columns)
        return (
            *product_gradients(g, *first, None, window, space),
            column_sum(g) if needs[2] else None,
            g if needs[3] else None,
            None if dx is None else Fresh(dx),
            dw1,
            dw2,
            column_sum(g, scale) if needs[7] else None,
            None,
        )

    return pull


_mixed_extended = Primitive("mixed_extended", _cpu, _gpu, _vjp, keeps=True)
