"""The launch of the extended product on Hopper: c * (x * w) + scale * (x2 * w2 + bias2) + add +
bias, one rounding.

For arrays that `takes` allows, and shapes that `extended_plan` has a plan for.
"""

from __future__ import annotations

import functools
from math import prod
from typing import NamedTuple

from ..arrays import Array
from ..tensor_map import NOTHING, ROW, matrix_map, pixel_map
from .aligned import aligned
from .conv_gpu import processors
from .extended_plan import Plan, Second, plan_blocks_dx, plan_dx, plan_forward
from .window import Window

_THREADS = {
    128: 384,
    192: 512,
    256: 384,
}  # by the rows of a tile: a warpgroup that copies, and more
OUT_BOX = (16, 32)  # rows and columns that a warp writes at a time
SHARED = 226 * 1024  # sm_90 has 227 KiB for a block; the barriers stand in the rest


class Extra(NamedTuple):
    """The second sum: scale[0] * (x * w + bias). shared: x holds a block of channels for each block
    of w's columns."""

    x: Array
    w: Array
    window: Window
    scale: Array | None
    bias: Array | None = None

    def beside(self, x: Array) -> Second:
        """What a plan knows of it beside a first sum over x."""
        return Second(tuple(self.w.shape), self.window, self.x is x)


def run(plan: Plan, x, w, out, *, extra: Extra | None, add, bias, c=None, kept=None) -> Array:
    """Write the sum into `out`, (positions, columns) in any shape, and return it. kept: with c,
    where x * w is left by itself, or None."""
    x2, w2, _, scale, bias2 = extra or (None,) * 5
    maps = (
        NOTHING if x is None else _map_x(x, plan.image, plan.tile.rows),
        NOTHING if w is None else matrix_map(w.data.ptr, w.shape, plan.boxes[0]),
        NOTHING if x2 is None else _map_x(x2, plan.other_image, plan.tile.rows),
        NOTHING if w2 is None else matrix_map(w2.data.ptr, w2.shape, plan.boxes[1]),
    )
    written = (kept, out) if plan.tile.staged(plan.b_rows) else (None, None)
    to = [
        NOTHING if y is None else matrix_map(y.data.ptr, plan.numbers[:2], OUT_BOX) for y in written
    ]
    args = (*maps, *to, scale, c, add, bias, bias2, kept, out, plan.geometry, plan.own, plan.other)
    plan.launch(plan.grid, (_THREADS[plan.tile.rows],), *args, *plan.numbers, shared=SHARED)
    return out


def _map_x(x, image, tile_rows):
    if image is None:
        rows, channels = prod(x.shape[:-1]), x.shape[-1]
        return matrix_map(x.data.ptr, (rows, channels), (tile_rows, ROW))
    shape, *corners = image
    return pixel_map(x.data.ptr, (*shape, x.shape[-1]), tile_rows, *corners)


def takes(*arrays) -> bool:
    """Whether the copy engine can read these: bf16 on Hopper, contiguous (it is told an address and
    a shape alone), rows and addresses multiples of 16 bytes.
    """
    return aligned(*arrays) and hopper()


def hopper() -> bool:
    """Whether the current device is an sm_90."""
    import cupy

    return _hopper(cupy.cuda.runtime.getDevice())


@functools.cache
def _hopper(device: int) -> bool:
    import cupy

    return cupy.cuda.Device(device).compute_capability == "90"


def blocks_dx(g, w, window: Window, in_space, *, scale, add, out=None) -> Array:
    """add + scale * the gradient of x where groups share w. Only where `plan_blocks_dx` says so.
    out: where the result goes, a new array by default; may be add.
    """
    import cupy

    shapes = tuple(g.shape), tuple(w.shape)
    plan = plan_blocks_dx(*shapes, window, tuple(in_space), processors())
    assert plan is not None
    if out is None:
        out = cupy.empty((g.shape[0], *in_space, w.shape[1] * window.groups), g.dtype)
    return run(plan, None, None, out, extra=Extra(g, w, window, scale), add=add, bias=None)


def extended_forward(
    x, w, window: Window, *, extra: Extra | None, add, bias, c=None, keep: bool = False, out=None
) -> tuple[Array, Array | None]:
    """(c * (x * w) + extra + add + bias, in the dtype of x; x * w if keep). Only where `takes` and
    `plan_forward` say so; with c extra has no scale. out: as above.
    """
    import cupy

    second = None if extra is None else extra.beside(x)
    sizes = tuple(x.shape), tuple(w.shape)
    plan = plan_forward(*sizes, window, second, processors(), c is not None)
    assert plan is not None
    space = window.out_space(x.shape[1:-1]) if window.axes else x.shape[1:-1]
    shape = (*x.shape[:1], *space, w.shape[2]) if x.ndim > 1 else (w.shape[2],)
    out = cupy.empty(shape, x.dtype) if out is None else out
    kept = cupy.empty(shape, x.dtype) if keep else None
    return run(plan, x, w, out, extra=extra, add=add, bias=bias, c=c, kept=kept), kept


def extended_dx(g, w, window: Window, in_space, *, extra: Extra | None, add, out=None) -> Array:
    """g * w^T + extra + add, (N, *in_space, C). extra: x (positions, R) and w (1, C, R), or x as g
    but R wide and w (taps, C, R), of the same walk. As above, by `plan_dx`.
    """
    import cupy

    second = None if extra is None else extra.beside(g)
    plan = plan_dx(tuple(g.shape), tuple(w.shape), window, tuple(in_space), second, processors())
    assert plan is not None
    space = tuple(in_space) if window.axes else g.shape[1:-1]
    shape = (*g.shape[:1], *space, w.shape[1]) if g.ndim > 1 else (w.shape[1],)
    out = cupy.empty(shape, g.dtype) if out is None else out
    return run(plan, g, w, out, extra=extra, add=add, bias=None)
