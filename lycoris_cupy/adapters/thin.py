"""What several algorithms make their part of an output with: down and up, and scaled columns."""

from __future__ import annotations

from ..arrays import Array
from ..layers import Layer, LayerShape
from ..ops.before import by_down
from ..ops.extended import Pending, pending
from ..ops.scale_columns import spread_columns


def by_columns(w: Array, columns: Array | None) -> Array:
    """The last factor of a product whose outputs are multiplied by columns, if there are any."""
    return w if columns is None else spread_columns(w, columns)


def low_rank_cost(shape: LayerShape, rank: int) -> int:
    """Multiply-adds an output position of x -> down -> up: the down product in every group, then
    up's columns.
    """
    return rank * (shape.taps * shape.channels + shape.outputs)


def apply_low_rank(
    change: Array | None,
    layer: Layer,
    x: Array,
    down: Array,
    up: Array,
    scale: Array,
    columns: Array | None = None,
) -> Pending:
    """change + scale * ((x * down) @ up) * columns.  down: (taps, IN, R), walks like the layer. up:
    (1, R, OUT).

    All groups share `down`; each has its own columns of `up`.
    """
    window = layer.window
    inner, up = by_down(down, window.grouped(window.groups, shared=True)), by_columns(up, columns)
    outer = window.pointwise_like(window.groups)
    return pending(x, up, outer, add=change, scale=scale, before=inner)
