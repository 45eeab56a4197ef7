"""The gradients of a linear layer with a LoRA beside it, where one kernel makes the gradient of the
LoRA's inner values on its way to that of the input (see `extended_low_rank_gpu`).

    dh = scale * g @ up^T         dx = g @ w^T + dh @ down^T
    dup = scale * h^T @ g         ddown = x^T @ dh

Else one kernel makes dh and dup from one read of g (`thin_gpu`), and the input's takes dh in.
"""

from __future__ import annotations

from .. import plan
from ..arrays import Array
from ..tape import Deferred
from . import product_gpu
from .extended_gpu import Extra
from .extended_low_rank_gpu import Plan, low_rank_dx, low_rank_dx_plan
from .extended_plan import Second
from .product import in_space_of
from .product_ways import dx_seconds
from .thin_gpu import thin_seconds
from .window import Window


class LowRankBack:
    """dx and ddown, whichever is asked for first; dh is made once. Of plain arrays, which are let
    go as soon as they have been used.
    """

    def __init__(
        self, planned: Plan, g, x, w, window: Window, down, inner: Window, up, other: Window, scale
    ):
        self._planned, self._scale = planned, scale
        self._g, self._x, self._w, self._window = g, x, w, window
        self._down, self._inner, self._up, self._other = down, inner, up, other
        self._ddown: Array | None = None
        self._dh: Array | None = None

    def dx(self) -> Deferred:
        return Deferred(self._run_dx)

    def ddown(self) -> Deferred:
        return Deferred(self._run_ddown)

    def _run_dx(self, add, term, spend):
        if add is None and self._dh is None:
            made = low_rank_dx(
                self._g, self._w, self._down, self._up, self._planned, scale=self._scale
            )
            if made is not None:
                self._keep(made[1])
                self._g = None
                return made[0]
        extra = Extra(self._made(), self._down, self._inner, None)
        more = {"scale": None, "add": add, "extra": extra, "spend": spend}
        g, self._g = self._g, None
        return product_gpu.dx(g, self._w, self._window, in_space_of(g, self._window), **more)

    def _run_ddown(self, add, term, spend):
        self._made()
        return self._ddown if add is None else add + self._ddown

    def _made(self) -> Array:
        if self._dh is None:
            more = {"scale": self._scale, "add": None}
            space = in_space_of(self._g, self._other)
            self._keep(product_gpu.dx(self._g, self._up, self._other, space, **more))
        return self._dh

    def _keep(self, dh: Array) -> None:
        self._dh, x, self._x = dh, self._x, None
        self._ddown = product_gpu.dw(x, dh, self._inner, scale=None)


def low_rank_back(
    g, x, w, window: Window, down, inner: Window, h, up, other: Window, scale
) -> tuple[Deferred, Deferred, Array] | None:
    """(dx, ddown, dup) by the gradient g of y; None where the kernel does not take these, or is
    estimated to be the slower way.
    """
    planned = low_rank_dx_plan(g, w, window, down, inner, up, other)
    if planned is None:
        return None
    apart = dx_seconds(g, w, window, Second(tuple(down.shape), inner))
    operations = 2 * g.size * (w.shape[1] + 2 * up.shape[1])
    moved = 2 * g.nbytes + x.nbytes + w.nbytes
    ways = {
        "low rank": planned.seconds + plan.moving(g.nbytes),
        "one by one": apart + thin_seconds(g.nbytes),
    }
    what = f"g {tuple(g.shape)} of x * w {tuple(w.shape)} + x * down {tuple(down.shape)} * up"
    if plan.choose(what, ways, operations, moved) != "low rank":
        return None
    back = LowRankBack(planned, g, x, w, window, down, inner, up, other, scale)
    return back.dx(), back.ddown(), product_gpu.dw(h, g, other, scale=scale)
