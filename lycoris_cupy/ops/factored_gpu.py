"""The launch of cuda_src/changed.cu: a weight with a low-rank change, or the elementwise product of
two, each with a Tucker core or without, added in one pass over it.

Refused, with None: other dtypes than bf16, more than 64 ranks, rows that are no multiple of 16
bytes.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from ..arrays import Array, bf16
from ..cuda_source import define_sets, expand
from ..kernels import kernel
from .aligned import aligned
from .columns import bits
from .conv_gpu import processors

_ROWS, _FILE = 16, "changed.cu"


class Pair(NamedTuple):
    """down[t] @ up, or down @ core[t] @ up.

    down: (taps, IN, R), or (1, IN, Q). up: (1, R, OUT). core: None, or (taps, Q, R).
    """

    down: Array
    up: Array
    core: Array | None = None


def factored_changed(weight: Array, scale: Array, *pairs: Pair) -> Array | None:
    """weight[t] + scale[0] * the elementwise product of what the pairs, one or two, are.  weight:
    (taps, IN, OUT). scale: (1,) f32. The factors of two pairs have the same shapes.
    """
    import cupy

    first, (taps, inputs, columns) = pairs[0], weight.shape
    ranks, core = first.up.shape[1], first.core is not None
    defines = variant(max(ranks, first.down.shape[2]), len(pairs) - 1, int(core))
    alike = all(_shapes(pair) == _shapes(first) for pair in pairs)
    narrow = all(a.dtype == bf16 for pair in pairs for a in pair if a is not None)
    small = taps * inputs < 1 << 30  # rows are counted in int
    if defines is None or not (alike and narrow and small and aligned(weight)):
        return None
    if not core:  # all rows are those of one tap
        taps, inputs = 1, taps * inputs
    warps, held = int(defines["WARPS"]), int(defines["BLOCKS"])
    tiles = taps * -(-inputs // _ROWS)
    grid, span = strips(tiles, -(-columns // (32 * warps)), held * processors())
    arrays = [
        a
        for down, up, core in ((_padded(p.down), _padded(p.up), _padded(p.core)) for p in pairs)
        for a in (down, core, up)
    ]
    arrays += [None] * (6 - len(arrays))
    core_rows, core_pitch = (0, 0) if not core else arrays[1].shape[1:]
    out = cupy.empty(weight.shape, bf16)
    kernel(_FILE, "factored_changed", bf16, **defines)(
        grid, (32 * warps,), weight, *arrays, scale, out,
        taps, inputs, columns, ranks, arrays[0].shape[2], core_rows, core_pitch, span,
    )  # fmt: skip
    return out


@functools.cache
def variant(ranks: int, hadamard: int, core: int) -> dict[str, str] | None:
    """The define set of changed.cu with the fewest ranks that are enough, or None."""
    found = [
        defines
        for defines in define_sets(expand(_FILE))["bf16"]
        if 0 < ranks <= int(defines["RANKS"])
        and (hadamard, core) == (int(defines["HADAMARD"]), int(defines["CORE"]))
    ]
    return min(found, key=lambda defines: int(defines["RANKS"]), default=None)


def strips(tiles: int, across: int, at_once: int) -> tuple[tuple[int, int], int]:
    """(grid, tiles a strip): as many strips as all run at once, since whoever starts late reads its
    part of the ups while nothing else is left to do.

    across: strips beside each other. at_once: blocks that the GPU holds.
    """
    span = -(-tiles // max(1, min(tiles, at_once // across, 65535)))
    return (across, -(-tiles // span)), span


def _shapes(pair: Pair) -> list[tuple[int, ...] | None]:
    return [None if a is None else tuple(a.shape) for a in pair]


def _padded(factor: Array | None) -> Array | None:
    """factor with zeros up to a multiple of 8 columns, at an address of a multiple of 16 bytes."""
    import cupy

    if factor is None or aligned(factor):
        return factor
    out = cupy.zeros((*factor.shape[:2], -(-factor.shape[2] // 8) * 8), bits(factor).dtype)
    out[..., : factor.shape[2]] = bits(factor)
    return out.view(factor.dtype)
