"""Products on a GPU: which kernel computes x * w (+ x2 * w2), its input gradient and its weight
gradient.

The ways are listed in `product_ways`. All but `extended`, `skinny` and `portable` write x2 * w2 by
itself first, and their own sum over it.
"""

from __future__ import annotations

from .. import plan
from ..arrays import Array
from . import outer_gpu
from .columns import rows_of
from .conv_gpu import conv, conv_dw, conv_dx, conv_extended, conv_extended_dx, processors
from .elementwise import scale as scaled
from .extended_gpu import Extra, blocks_dx, extended_dx, extended_forward, takes
from .narrow_gpu import narrow_conv, narrow_dw, narrow_dx, suits
from .pointwise_gpu import pointwise, pointwise_dw, pointwise_dx
from .product_ways import dx_ways, forward_ways, scaled_ways
from .scale_columns import scale_columns_gpu
from .skinny_gpu import skinny_dx, skinny_forward
from .thin_product_gpu import thin_product
from .window import Window

__all__ = ["Extra", "dw", "dx", "forward", "scaled_forward"]


def forward(
    x, w, window: Window, *, scale, add, bias, extra: Extra | None = None, spend: bool = False
) -> Array:
    """add + scale * (x * w) + bias + extra.  Both a scale and an extra are never there. spend: the
    result is written over add: every kernel reads a value of add in the thread that then writes it.
    """
    out = add if spend else None
    second = () if extra is None else (extra.x, extra.w, extra.bias)
    sizes = None if extra is None else extra.beside(x)
    own = bias is None or window.groups == 1  # Hopper's kernels know one bias for all groups
    hopper = own and x.size > 0 and takes(x, w, add, bias, *second)
    whole = extra is not None and _whole(x, w, add, bias, *second)
    bare = extra is None and add is None and bias is None and takes(x, w)
    ways = forward_ways(
        tuple(x.shape), tuple(w.shape), window, sizes, hopper, scale is None, x.dtype,
        processors(), whole, bare,
    )  # fmt: skip
    way = plan.choose(*ways)
    if way == "thin":
        return thin_product(x, w, scale=scale)
    if way == "skinny":
        more = {"extra": extra, "scale": scale, "add": add, "bias": bias}
        return skinny_forward(x, w, window, **more, out=out)
    if way == "extended":
        return extended_forward(x, w, window, extra=extra, add=add, bias=bias, out=out)[0]
    if extra is not None and way == "portable":
        rows = x if window.axes else rows_of(x)
        y = conv_extended(rows, w, window, extra, add=add, bias=bias, out=out)
        return y if window.axes else y.reshape(*x.shape[:-1], y.shape[-1])
    if extra is not None:
        own = extra.bias
        if own is not None and extra.scale is not None:
            own = scaled(own, extra.scale)
        more = {"scale": extra.scale, "add": add, "bias": own, "spend": spend}
        add = forward(extra.x, extra.w, extra.window, **more)
        return forward(x, w, window, scale=None, add=add, bias=bias, spend=True)
    run = {"library": pointwise, "portable": conv, "narrow": narrow_conv}[way]
    return run(x, w, window, scale=scale, add=add, bias=bias, out=out)


def scaled_forward(x, w, window: Window, c, *, add, bias, extra: Extra, keep: bool, spend: bool):
    """(c * (x * w) + extra + add + bias, x * w rounded if keep); extra has no scale and no bias."""
    out = add if spend else None
    second = (extra.x, extra.w)
    hopper = x.size > 0 and takes(x, w, add, bias, *second)
    sizes = extra.beside(x)
    ways = scaled_ways(tuple(x.shape), tuple(w.shape), window, sizes, hopper, x.dtype, processors())
    if plan.choose(*ways) == "extended":
        more = {"extra": extra, "add": add, "bias": bias, "out": out}
        return extended_forward(x, w, window, c=c, keep=keep, **more)
    more = forward(extra.x, extra.w, extra.window, scale=None, add=add, bias=bias, spend=spend)
    own = forward(x, w, window, scale=None, add=None, bias=None)
    return scale_columns_gpu(own, c, None, more), own


def dx(
    g, w, window: Window, in_space, *, scale, add, extra: Extra | None = None, spend: bool = False
) -> Array:
    """add + scale * g * w^T + extra: the gradient of x.  Both a scale and an extra are never there.
    spend: as for `forward`.
    """
    out = add if spend else None
    second = () if extra is None else (extra.x, extra.w)
    sizes = None if extra is None else extra.beside(g)
    hopper = g.size > 0 and takes(g, w, add, *second)
    ways = dx_ways(
        tuple(g.shape), tuple(w.shape), window, tuple(in_space), sizes, hopper, scale is None,
        g.dtype, processors(), extra is not None and _whole(g, w, add, *second),
    )  # fmt: skip
    way = plan.choose(*ways)
    if way == "skinny":
        return skinny_dx(g, w, window, extra=extra, scale=scale, add=add, out=out)
    if way == "extended":
        return extended_dx(g, w, window, in_space, extra=extra, add=add, out=out)
    if extra is not None and way == "portable":
        rows, space = (g, in_space) if window.axes else (rows_of(g), ())
        out = conv_extended_dx(rows, w, window, space, extra, add=add, out=out)
        return out if window.axes else out.reshape(*g.shape[:-1], out.shape[-1])
    if extra is not None:
        if extra.window.pointwise and extra.window.groups == 1:
            positions = (g.shape[0], *in_space) if window.axes else g.shape[:-1]
            add = _rows_dx(extra, positions, add, out)
        else:
            more = {"scale": extra.scale, "add": add, "spend": spend}
            add = dx(extra.x, extra.w, extra.window, in_space, **more)
        return dx(g, w, window, in_space, scale=None, add=add, spend=True)
    if way == "library":
        return pointwise_dx(g, w, window, scale=scale, add=add, out=out)
    run = {"portable": conv_dx, "narrow": narrow_dx, "blocks": blocks_dx}[way]
    return run(g, w, window, in_space, scale=scale, add=add, out=out)


def _whole(*arrays) -> bool:
    """Whether the portable kernel can be told an address and a shape alone, and reads by these
    as the plan for shapes says."""
    return all(
        a is None or (a.size > 0 and a.flags.c_contiguous and a.data.ptr % 16 == 0) for a in arrays
    )


def _rows_dx(extra: Extra, positions, add, out) -> Array:
    """add + extra, of an extra whose rows are the positions of an input."""
    add, out = (None if a is None else rows_of(a) for a in (add, out))
    dx = pointwise_dx(rows_of(extra.x), extra.w, Window(), scale=extra.scale, add=add, out=out)
    return dx.reshape(*positions, dx.shape[-1])


def dw(x, g, window: Window, *, scale) -> Array:
    """scale * x^T * g: the gradient of w, wide."""
    if window.pointwise:
        return pointwise_dw(x, g, window, scale=scale)
    if x.size and g.size and suits(x.shape[-1], g.shape[-1], window, x.dtype):
        return narrow_dw(x, g, window, scale=scale)
    planned = outer_gpu.plan_for(x, g, window) if takes(x, g) else None
    if planned is not None:
        return outer_gpu.outer_dw(x, g, window, planned, scale=scale)
    return conv_dw(x, g, window, scale=scale)
