"""Both products of a low-rank adapter inside the layer's own: x is read once.

    y = x * w + scale * (x * down) * up + bias          one sum, rounded once

One more way to compute what `product` and `extended` say, for a change whose own x is a product of
the layer's x that waits as well: see `extended_low_rank_gpu`. Hu et al. 2021, arXiv 2106.09685.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from .. import plan
from ..arrays import Array, on_gpu
from ..tape import value_of
from . import product_gpu
from .conv_gpu import processors
from .extended_gpu import takes
from .extended_low_rank_gpu import low_rank, plan_low_rank
from .window import Window

if TYPE_CHECKING:
    from .extended import Pending


def made(
    x: Array, w: Array, window: Window, change: Pending, bias: Array | None
) -> tuple[Array, Array] | None:
    """(x * w + change + bias, x * down), plain arrays; None where the kernel does not take these,
    or is estimated to be the slower way.
    """
    inner = change.x
    x, down = value_of(x), value_of(inner.w)
    w, up, bias = value_of(w), value_of(change.w), value_of(bias)
    if not on_gpu(x) or value_of(inner.x) is not x:
        return None
    if any(p is not None for p in (change.add, change.bias, inner.add, inner.bias, inner.scale)):
        return None
    if any(not v.pointwise or v.groups != 1 for v in (window, inner.window, change.window)):
        return None
    if down.shape[:2] != w.shape[:2] or up.shape != (1, down.shape[2], w.shape[2]):
        return None
    positions, (_, inputs, outputs), ranks = prod(x.shape[:-1]), w.shape, down.shape[2]
    one = plan_low_rank(positions, inputs, ranks, outputs, processors())
    if one is None or not takes(x, w, down, up, bias):
        return None
    two = product_gpu.low_rank_seconds(x, w, down, up, window)
    operations = 2 * positions * (inputs * (ranks + outputs) + ranks * outputs)
    moved = (x.size + w.size + down.size + up.size + positions * outputs) * x.dtype.itemsize
    what = f"x {tuple(x.shape)} * w {tuple(w.shape)} + x * down {tuple(down.shape)} * up"
    ways = {"low rank": one.seconds, "one by one": two}
    if plan.choose(what, ways, operations, moved) != "low rank":
        return None
    return low_rank(x, w, down, up, scale=change.scale, bias=bias)
