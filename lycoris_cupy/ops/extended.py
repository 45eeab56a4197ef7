"""extended: a layer's product and an adapter's in one sum, and `Pending`, a product that waits to
be part of one.

    y = add + c * (x * w) + scale * (x2 * w2 + bias2) + bias          one sum, rounded once

An adapter's last product is not carried out by itself: it waits until the layer's own, which takes
it into its accumulators where that is cheaper (see `plan`), and else adds its rounded result.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..arrays import Array, like, on_gpu, require_same
from ..errors import LycorisError, ShapeError
from ..tape import Primitive, total_of, value_of
from . import product_gpu
from .before import Before, Terms
from .columns import column_sum
from .elementwise import cast
from .elementwise import scale as scaled
from .product import (
    LINEAR,
    finished,
    in_space_of,
    out_shape,
    product,
    product_gradients,
    wide_product,
)
from .scale_columns import column_gradients, require_columns
from .thin_gpu import thin_gradients
from .waiting import Waiting
from .window import Window


@dataclass(frozen=True)
class Pending(Waiting):
    """add + scale * (x * w + bias), not computed yet; the arguments are those of `product`, but the
    scale is the bias's too. before: what makes of x the operand of w, if it is not that itself.
    """

    x: Array
    w: Array
    window: Window
    add: Array | None
    scale: Array | None
    bias: Array | None = None
    before: Before | None = None

    def plain(self) -> Pending:
        return self

    @property
    def operand(self) -> Array:
        return self.x if self.before is None else self.before(self.x)

    @property
    def unscaled(self) -> bool:
        """Whether it may stand beside scaled columns: no scale and no bias."""
        return self.scale is None and self.bias is None


Change = Array | Waiting  # what an adapter adds to a layer's output


def pending(
    x: Array,
    w: Array,
    window: Window = LINEAR,
    *,
    add: Change | None = None,
    scale: Array | None = None,
    bias: Array | None = None,
    before: Before | None = None,
) -> Pending:
    """A product for `extended` to take in; one that `add` still waits for is computed now. bias:
    (columns,) of the dtype of x, scaled too. before: what is done to x first.
    """
    return Pending(x, w, window, ready(add), scale, bias, before)


def ready(change: Change | None, spend: bool = False) -> Array | None:
    """The array that a pending product stands for; anything else as it is. spend: as for `product`,
    of what it is added to.
    """
    if not isinstance(change, Waiting):
        return change
    p = change.plain()
    bias = p.bias
    if bias is not None and p.scale is not None:
        bias = scaled(bias, p.scale)
    return product(p.operand, p.w, p.window, bias=bias, add=p.add, scale=p.scale, spend=spend)


def extended(
    x: Array,
    w: Array,
    window: Window,
    change: Waiting,
    *,
    bias: Array | None = None,
    c: Array | None = None,
    spend: bool = False,
) -> Array:
    """c * (x * w) + change + bias, summed wide, rounded once: `product(x, w, window,
    add=ready(change), bias=bias)` in one sum where there is no c.

    x, w, bias: as for `product`; spend too, of what the change is added to. c: (columns,) in the
    wide dtype, or None for 1; the change must have no scale then, it stands in its own w, and no
    bias. Returns (..., columns) in the dtype of x. Raises ShapeError, DtypeError.
    """
    joined = change.joined(x, w, window, bias, c, spend)
    if joined is not None:
        return joined
    change = change.plain()
    w2, add, before = cast(change.w, x.dtype), change.add, change.before
    x2, factors, kind = change.x, (), None
    if before is not None and change.x is x:  # made beside x * w, if that is faster
        factors, kind = [cast(f, x.dtype) for f in before.factors], before.kind
        x2_shape = kind.shape(x.shape, *(f.shape for f in factors))
    else:
        x2 = change.operand
        x2_shape = x2.shape
    shape = out_shape(x.shape, w.shape, window)
    biases = ("bias", bias), ("bias2", change.bias)
    for name, array in (
        ("w", w),
        ("x2", x2),
        *(("its factor", f) for f in factors),
        *biases,
        ("add", add),
    ):
        if array is not None:
            require_same("x", value_of(x), name, value_of(array))
    given = out_shape(x2_shape, w2.shape, change.window)
    if given != shape:
        raise ShapeError(f"x2 * w2 has shape {given}, expected that of x * w, {shape}")
    for name, array in biases:
        if array is not None and tuple(array.shape) != shape[-1:]:
            raise ShapeError(f"{name} has shape {tuple(array.shape)}, expected {shape[-1:]}")
    if add is not None and tuple(add.shape) != shape:
        raise ShapeError(f"add has shape {tuple(add.shape)}, expected {shape}")
    if c is not None:
        require_columns(c, x, shape[-1:])
        if not change.unscaled:
            raise LycorisError(
                "extended: a change beside scaled columns carries its scale in its w, and has no "
                "bias"
            )
    args = (x, w, bias, add, x2, w2, change.bias, change.scale, c, *factors)
    return _extended(*args, window=window, other=change.window, spend=spend, before=kind)


# With `before`, x2 is what that makes of the x2 among the arguments, which then is x, and factors.
def _cpu(x, w, bias, add, x2, w2, bias2, scale, c, *factors, window, other, spend, before, keep):
    x2, inner = (x2, None) if before is None else before.make(x2, *factors)
    more, own = wide_product(x2, w2, other), wide_product(x, w, window)
    if bias2 is not None:
        more += bias2.astype(more.dtype, copy=False)
    if scale is not None:
        more *= scale
    more += own if c is None else own * c
    kept = like(own, x) if keep and c is not None else None
    return finished(more, None, add, bias, x), (x2, inner, kept) if keep else None


def _gpu(x, w, bias, add, x2, w2, bias2, scale, c, *factors, window, other, spend, before, keep):
    inner = None
    if before is not None:
        out = add if spend else None
        terms = Terms(x, w, window, w2, other, add, bias, bias2, scale, out)
        made = before.joined(terms, *factors, keep=keep) if c is None else None
        if made is not None:
            return made[0], (*made[1:], None) if keep else None
        x2, inner = before.make(x2, *factors)
    extra = product_gpu.Extra(x2, w2, other, scale, bias2)
    more = {"add": add, "bias": bias, "extra": extra, "spend": spend}
    if c is None:
        y, own = product_gpu.forward(x, w, window, scale=None, **more), None
    else:
        y, own = product_gpu.scaled_forward(x, w, window, c, keep=keep, **more)
    return y, (x2, inner, own) if keep else None


def _vjp(
    needs, out, x, w, bias, add, x2, w2, bias2, scale, c, *factors,
    window, other, spend, before, kept,
):  # fmt: skip
    """kept: x2 as it was multiplied, what that is mixed from if that is needed, and x * w rounded,
    where there is a c."""
    made, inner, own = kept
    space, other_space = in_space_of(x, window), in_space_of(made, other)
    sources = needs[4], *needs[9:]  # of x2
    x, w = (x if needs[1] else None), (w if needs[0] else None)
    made, w2 = (made if needs[5] else None), (w2 if any(sources) else None)
    source = x2 if before is not None and any(sources) else None
    # The layer's own weight stands still, and all else is wanted.
    alone = source is not None and c is None and needs[0] and needs[5] and all(sources)
    alone = alone and not needs[1]
    held = [made]  # until it has been used: x2 may be as large as x
    del kept, x2, made

    def pull(g):
        flow, dc, thin, made = g, None, None, held.pop()
        if c is not None:
            if made is not None and w2 is not None and on_gpu(g):
                thin = thin_gradients(g, made, w2, other, None, c, own)
            flow, dc = (thin.gc, thin.dc) if thin else column_gradients(g, own, c)
        rest = column_sum(g) if needs[2] else None, g if needs[3] else None
        last = column_sum(g, scale) if needs[6] else None, None, dc
        if alone and on_gpu(g):
            joint = before.together(g, source, w, window, made, inner, w2, other, scale, *factors)
            if joint is not None:
                dx, dx2, dw2, *others = joint
                return dx, None, *rest, dx2, dw2, *last, *others
        base = product_gradients(flow, x, w, None, window, space)
        dx2, dw2 = thin[:2] if thin else product_gradients(g, made, w2, scale, other, other_space)
        others = made = None
        if source is not None:
            dx2 = cast(total_of([dx2], g.dtype), g.dtype)
            dx2, *others = before.gradients(sources, dx2, source, inner, *factors)
        return (*base, *rest, dx2, dw2, *last, *(others or [None] * len(factors)))

    return pull


_extended = Primitive("extended", _cpu, _gpu, _vjp, keeps=True)
