"""The gradients of a linear layer with a LoRA beside it, where one kernel makes more than one.

    dh = scale * g @ up^T         dx = g @ w^T + dh @ down^T
    dup = scale * h^T @ g         ddown = x^T @ dh

Both factors' come from one launch (`thin_outer_gpu`), and up to 16 ranks of dh are made on the way
to dx (`extended_low_rank_gpu`). Else one kernel makes dh and dup from one read of g (`thin_gpu`),
or a product each.
"""

from __future__ import annotations

import functools

from .. import plan
from ..arrays import Array
from ..tape import Deferred
from . import product_gpu
from .conv_gpu import processors
from .extended_gpu import Extra, takes
from .extended_low_rank_gpu import Plan, low_rank_dx, low_rank_dx_plan
from .extended_plan import Second
from .few_gpu import MOST
from .product import in_space_of
from .product_ways import dx_seconds
from .thin_gpu import pays, thin_seconds
from .thin_outer_gpu import Outer, plan_thin_outers, thin_outers, thin_outers_seconds
from .window import Window


class LowRankBack:
    """dx, ddown and dup, whichever is asked for first; dh is made once, and the factors' gradients
    with it. Of plain arrays, which are let go as soon as they have been used.
    """

    def __init__(self, planned: Plan | None, g, own: tuple[Array, Window], x, h, down, up, scale):
        """planned: how dh is made inside dx, or None. own, down, up: w and its window, likewise."""
        self._planned, self._g, self._own, self._x, self._h = planned, g, own, x, h
        self._down, self._up, self._scale = down, up, scale
        self._dh: Array | None = None
        self._factors: list[Array] = []  # ddown, dup

    def dx(self) -> Deferred:
        return Deferred(self._run_dx)

    def ddown(self) -> Deferred:
        return Deferred(functools.partial(self._run_factor, 0))

    def dup(self) -> Deferred:
        return Deferred(functools.partial(self._run_factor, 1))

    def _run_dx(self, add, term, spend):
        if add is None and self._dh is None and self._planned is not None:
            factors = self._own[0], self._down[0], self._up[0]
            made = low_rank_dx(self._g, *factors, self._planned, scale=self._scale)
            if made is not None:
                self._keep(made[1])
                self._g = None
                return made[0]
        extra = Extra(self._made(), *self._down, None)
        more = {"scale": None, "add": add, "extra": extra, "spend": spend}
        g, self._g = self._g, None
        return product_gpu.dx(g, *self._own, in_space_of(g, self._own[1]), **more)

    def _run_factor(self, which: int, add, term, spend):
        self._made()
        made = self._factors[which]
        return made if add is None else add + made

    def _made(self) -> Array:
        if self._dh is None:
            more = {"scale": self._scale, "add": None}
            space = in_space_of(self._g, self._up[1])
            self._keep(product_gpu.dx(self._g, *self._up, space, **more))
        return self._dh

    def _keep(self, dh: Array) -> None:
        x, h = self._x, self._h
        self._dh, self._x, self._h = dh, None, None
        pair = Outer(_rows(x), _rows(dh)), Outer(_rows(h), _rows(self._g), self._scale)
        self._factors = thin_outers(*pair) or [
            product_gpu.dw(x, dh, self._down[1], scale=None),
            product_gpu.dw(h, self._g, self._up[1], scale=self._scale),
        ]


def _rows(a: Array) -> Array:
    return a.reshape(-1, a.shape[-1])


def low_rank_back(
    g, x, w, window: Window, down, inner: Window, h, up, other: Window, scale
) -> tuple[Deferred, Deferred, Deferred] | None:
    """(dx, ddown, dup) by the gradient g of y; None where no kernel makes two of these together, or
    that is estimated to be the slower way.
    """
    if any(not v.pointwise or v.groups != 1 for v in (window, inner, other)):
        return None
    rows, (_, inputs, ranks), outputs = g.size // g.shape[-1], down.shape, g.shape[-1]
    of_down, of_up = (inputs, ranks), (ranks, outputs)
    if not takes(g, x, w, down, h, up) or not plan_thin_outers(
        rows, (of_down, of_up), processors()
    ):
        return None
    pair = thin_outers_seconds(rows, of_down, of_up)
    planned = low_rank_dx_plan(g, w, window, down, inner, up, other)
    dx = dx_seconds(g, w, window, Second(tuple(down.shape), inner))
    dh = dx_seconds(g, up, other)
    made = thin_seconds(g.nbytes) if pays(g, up) else dh + thin_outers_seconds(rows, of_up)
    ways = {"one by one": dx + made + thin_outers_seconds(rows, of_down)}
    if rows > MOST:  # else one launch makes dh and dup
        ways["factors together"] = dx + dh + pair
    if planned is not None:
        ways["low rank"] = planned.seconds + pair
    operations = 2 * g.size * (inputs + 2 * ranks)
    moved = 2 * g.nbytes + x.nbytes + w.nbytes
    what = f"g {tuple(g.shape)} of x * w {tuple(w.shape)} + x * down {tuple(down.shape)} * up"
    way = plan.choose(what, ways, operations, moved)
    if way == "one by one":
        return None
    inside = planned if way == "low rank" else None
    back = LowRankBack(inside, g, (w, window), x, h, (down, inner), (up, other), scale)
    return back.dx(), back.ddown(), back.dup()
