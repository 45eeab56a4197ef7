"""The ways that a product can go on a GPU, and the seconds of each, estimated from shapes alone by
the rates of `plan`.

    library    cuBLASLt, where each output position reads one input position
    extended   one kernel for both sums, linear or convolution; on Hopper
    skinny     the same for linear products of few positions: see `skinny_gpu`
    inside     likewise, and x2 made there: see `before`
    low rank   likewise for many positions, x2 of a LoRA
    mixed      likewise, x2 of a LoKr
    portable   a convolution by mma.sync or, for groups of a few channels, a thread an output; of
               both sums where `joins` says so, and `extended` does not take them
    narrow     a convolution to a few columns, which reads x once: see `narrow_gpu`
    thin       a product to a few columns, which reads x once; on Hopper
    blocks     the extended product's second sum alone, for an input gradient of shared groups

    apart      portable or extended for the first sum, where neither takes both
"""

from __future__ import annotations

import functools
from math import prod

from .. import plan
from . import conv_extended_plan, skinny_gpu
from .conv_extended_plan import joins, term_of
from .conv_gpu import processors
from .conv_plan import direct
from .extended_plan import Second, plan_blocks_dx, plan_dx, plan_forward
from .narrow_gpu import suits
from .thin_product_gpu import THIN_ROWS, plan_thin
from .window import Window


def way_with(x, w, window: Window, w2, other: Window, inside: dict, before: float) -> str:
    """The way of x * w + x2 * w2 that is estimated to be the fastest, where x2 is made of x:
    `inside` has functions of the bytes that are moved, the seconds of launches that make it
    themselves; the ways above follow one for x2 of so many seconds. Of arrays that Hopper's kernels
    take.
    """
    shapes = tuple(x.shape), tuple(w.shape), window, Second(tuple(w2.shape), other)
    what, ways, operations, moved = forward_ways(*shapes, True, True, x.dtype, processors())
    ways = {f"{name} after x2": seconds + before for name, seconds in ways.items()}
    ways |= {name: seconds(moved) for name, seconds in inside.items()}
    return plan.choose(f"{what}, x2 of x", ways, operations, moved)


def seconds(x, w, window: Window) -> float:
    """Estimated of x * w by itself, of arrays that Hopper's kernels take."""
    shapes = tuple(x.shape), tuple(w.shape), window, None
    ways = forward_ways(*shapes, True, True, x.dtype, processors(), bare=True)
    return min(ways[1].values())


def dx_seconds(g, w, window: Window, second: Second | None = None) -> float:
    """Estimated of the input gradient of a linear product, with a second term, likewise."""
    shapes = tuple(g.shape), tuple(w.shape), window, tuple(g.shape[1:-1]), second
    return min(dx_ways(*shapes, True, True, g.dtype, processors())[1].values())


@functools.lru_cache(maxsize=4096)
def forward_ways(
    x, w, window: Window, extra, hopper: bool, plain: bool, dtype, count: int,
    whole: bool = True, bare: bool = False,
):  # fmt: skip
    """(what, seconds of each way, operations, bytes) of a forward product, from shapes alone.
    hopper: what Hopper's kernels can read. plain: without a scale. whole: the portable kernel may
    take both sums. bare: nothing is added to the product.
    """
    space = window.out_space(x[1:-1]) if window.axes else x[1:-1]
    positions = prod((x[0], *space)) if len(x) > 1 else 1
    columns = w[2] * (window.groups if window.shared else 1)
    result = positions * columns * dtype.itemsize
    operations = 2 * positions * w[0] * w[1] * columns
    more = 2 * positions * extra[0][0] * extra[0][1] * columns if extra else 0
    moved = prod(x) * dtype.itemsize + prod(w) * dtype.itemsize + result
    pixels = prod(x[:-1])
    idle = _idle(positions, w[2], w[1], window, count)
    ways = _ways(window, operations, x[-1], w[2], dtype, moved, pixels, idle, True)
    planned = plan_forward(x, w, window, extra, count) if hopper and plain else None
    if planned is not None:
        ways["extended"] = plan.extended(planned.tile.cycles, moved)
    if bare and window.pointwise and window.groups == 1 and positions <= THIN_ROWS:
        thin = plan_thin(positions, w[1], w[2], count)
        if thin is not None:
            ways["thin"] = thin.seconds
    if extra is not None:
        beside = positions * extra[0][1] * extra[1].groups * dtype.itemsize
        later = plan.apart(result, beside, more)
        if not extra.window.pointwise and extra.window.grouped(1) == window.grouped(1):
            channels = extra.shape[1] * extra.window.groups
            beside_x = (*x[:-1], channels)
            own = forward_ways(beside_x, *extra[:2], None, hopper, True, dtype, count)[1]
            later = max(later, min(own.values()))
        alone = plan_forward(x, w, window, None, count) if hopper else None
        ways = _apart(ways, later, alone, moved)
        if whole and planned is None and joins(dtype, w, window, *extra[:2]):
            rows = x if window.axes else (pixels, x[-1])
            both = conv_extended_plan.plan_forward(
                rows, w, window, term_of(*extra[:2]), True, True, count
            )
            total = operations + more * both.repeats
            ways["portable"] = _portable(
                window, total, x[-1], w[2], dtype, moved, pixels, both.busiest
            )
    few = skinny_gpu.plan_forward(x, w, window, extra, count) if hopper else None
    if few is not None:
        ways["skinny"] = few.seconds(moved)
    what = f"x {x} * w {w}" + (f" + x2 * w2 {extra[0]}" if extra else "")
    return what, ways, operations + more, moved


@functools.lru_cache(maxsize=4096)
def scaled_ways(x, w, window: Window, extra, hopper: bool, dtype, count: int):
    """As `forward_ways`, for a product with scaled columns, which else is one more pass."""
    what, ways, operations, moved = forward_ways(
        x, w, window, extra, False, True, dtype, count, False
    )
    result = moved - (prod(x) + prod(w)) * dtype.itemsize
    ways = {name: seconds + plan.moving(3 * result) for name, seconds in ways.items()}
    planned = plan_forward(x, w, window, extra, count, True) if hopper else None
    if planned is not None:
        ways["extended"] = plan.extended(planned.tile.cycles, moved)
    return f"columns of {what}", ways, operations, moved


@functools.lru_cache(maxsize=4096)
def dx_ways(
    g, w, window: Window, in_space, extra, hopper: bool, plain: bool, dtype, count: int,
    whole: bool = True,
):  # fmt: skip
    """As `forward_ways`, for the gradient of the input."""
    positions = g[0] * prod(in_space) if window.axes else prod(g[:-1])
    inputs = w[1] * window.groups
    result = positions * inputs * dtype.itemsize
    operations = 2 * prod(g) * w[0] * w[1]
    term, places, more = None, 0, 0
    if extra is not None:
        term = term_of(*extra[:2], back=True)
        places = positions if term.single else prod(g[:-1])
        more = 2 * places * extra[0][0] * term.inner * inputs
    moved = prod(g) * dtype.itemsize + prod(w) * dtype.itemsize + result
    idle = _idle(positions, w[1], w[2], window, count)
    ways = _ways(window, operations, inputs, w[2], dtype, moved, positions, idle, False)
    blocks = plan_blocks_dx(g, w, window, in_space, count) if hopper else None
    if blocks is not None:
        ways["blocks"] = plan.extended(blocks.tile.cycles, moved)
    planned = plan_dx(g, w, window, in_space, extra, count) if hopper and plain else None
    if planned is not None:
        ways["extended"] = plan.extended(planned.tile.cycles, moved)
    if extra is not None and term is not None:
        beside = places * term.inner * term.blocks * dtype.itemsize
        later = plan.apart(result, beside, more)
        if not term.single and extra.window.grouped(1) == window.grouped(1):
            columns = term.inner * term.blocks
            own = dx_ways(
                (*g[:-1], columns), *extra[:2], in_space, None, hopper, True, dtype, count
            )[1]
            later = max(later, min(own.values()))
        alone = plan_dx(g, w, window, in_space, None, count) if hopper else None
        ways = _apart(ways, later, alone, moved)
        if whole and planned is None and joins(dtype, w, window, *extra[:2], back=True):
            rows, space = (g, in_space) if window.axes else ((positions, g[-1]), ())
            both = conv_extended_plan.plan_dx(rows, w, window, space, term, True, True, count)
            total = operations + more * both.repeats
            ways["portable"] = _portable(
                window, total, inputs, w[2], dtype, moved, positions, both.busiest
            )
    few = skinny_gpu.plan_dx(g, w, window, extra, count) if hopper else None
    if few is not None:
        ways["skinny"] = few.seconds(moved)
    what = f"g {g} * w {w} turned" + (f" + g2 * w2 {extra[0]} turned" if extra else "")
    return what, ways, operations + more, moved


def _ways(window: Window, operations, channels, columns, dtype, moved, pixels, idle, forward):
    """Seconds of the ways that are not for Hopper alone."""
    if window.pointwise:
        more = plan.PARTS if columns <= 64 else 0  # cuBLASLt adds up parts by a second kernel
        return {"library": max(plan.library(operations), plan.moving(moved)) + more}
    ways = {
        "portable": _portable(window, operations * idle, channels, columns, dtype, moved, pixels)
    }
    if suits(channels, columns, window, dtype, forward):
        parts = 2 * pixels * window.taps * columns * 4
        ways["narrow"] = max(plan.library(operations), plan.moving(moved)) + plan.rereading(parts)
    return ways


def _idle(positions: int, columns: int, inner: int, window: Window, count: int) -> float:
    """By how much the portable kernel is slower than its operations say, where its tiles of a group
    are too few: two on each multiprocessor keep it busy, as far as was measured.
    """
    own = columns // (1 if window.shared else window.groups)
    if direct(inner, own, window.groups):
        return 1.0
    tiles = -(-positions // 64) * -(-own // 64) * window.groups
    return max(1.0, 2 * count / max(tiles, 1))


def _portable(
    window: Window, operations, channels, columns, dtype, moved, pixels, busiest=0.0
) -> float:
    """busiest: see `ExtendedPlan`. It counts beside cuBLASLt, which cuts a product with few rows
    into pieces enough.
    """
    reads = window.taps * pixels * channels * dtype.itemsize * -(-columns // 128)
    # Tiles of 64 or 128 columns fit the columns of many groups badly.
    products = operations * (2 if window.groups > 1 else 1)
    products = plan.portable(max(products, busiest) if window.pointwise else products)
    return max(products, plan.moving(moved), plan.rereading(reads))


def _apart(ways: dict[str, float], later: float, alone, moved: int) -> dict[str, float]:
    """The ways where there is a second sum: `later` seconds more for all but `extended`, which
    takes it in. alone: the extended plan of the first sum by itself, or None. moved: its bytes.
    """
    both, first = ways.get("extended"), ways.pop("portable", None)
    ways = {name: seconds + later for name, seconds in ways.items()}
    if both is not None:
        ways["extended"] = both
    elif alone is not None:
        own = plan.extended(alone.tile.cycles, moved)
        first = own if first is None else min(first, own)
    if first is not None:
        ways["apart"] = first + later
    return ways
