"""The launch of cuda_src/changed.cu: a weight with a low-rank change, or the elementwise product of
two, added in one pass over it.

Refused, with None: other dtypes than bf16 (and wide downs), more than 64 ranks, rows that are no
multiple of 16 bytes.
"""

from __future__ import annotations

from ..arrays import Array, bf16, f32
from ..kernels import kernel
from .aligned import aligned
from .columns import bits
from .conv_gpu import processors

# As in changed.cu.
_COLUMNS, _ROWS, _THREADS = 128, 16, 128
_BLOCKS = {16: 6, 32: 5, 64: 4}  # on a multiprocessor, by ranks; one less for two pairs


def factored_changed(weight: Array, scale: Array, *pairs: tuple[Array, Array]) -> Array | None:
    """weight[t] + scale[0] * the elementwise product of each pair's down[t] @ up.  weight: (taps,
    IN, OUT). down: (taps, IN, R), all bf16 or all f32. up: (1, R, OUT). scale: (1,) f32.
    """
    import cupy

    downs, ups = zip(*pairs, strict=True)
    (taps, inputs, rank), kept = downs[0].shape, downs[0].dtype
    width = next((r for r in _BLOCKS if 0 < rank <= r), None)
    alike = all(d.shape == downs[0].shape and d.dtype == kept for d in downs)
    if width is None or not alike or not aligned(weight) or any(u.dtype != bf16 for u in ups):
        return None
    rows, columns, hadamard = taps * inputs, weight.shape[2], len(pairs) - 1
    op = "factored_changed_wide" if kept == f32 else "factored_changed"
    launch = kernel("changed.cu", op, bf16, RANKS=width, HADAMARD=hadamard)
    grid, span = strips(rows, columns, _BLOCKS[width] - hadamard, processors())
    pitch = -(-rank // 8) * 8
    arrays = [
        a
        for down, up in (pairs * 2)[:2]
        for a in (_padded(down, pitch), cupy.ascontiguousarray(up))
    ]
    out = cupy.empty(weight.shape, bf16)
    launch(grid, (_THREADS,), weight, *arrays, scale, out, rows, columns, rank, pitch, span)
    return out


def strips(rows: int, columns: int, held: int, count: int) -> tuple[tuple[int, int], int]:
    """(grid, tiles of 16 rows a strip): as many strips as all run at once, since whoever starts
    late reads its part of the ups while nothing else is left to do.

    held: blocks that a multiprocessor holds. count: multiprocessors.
    """
    across, tiles = -(-columns // _COLUMNS), -(-rows // _ROWS)
    span = -(-tiles // max(1, min(tiles, held * count // across, 65535)))
    return (across, -(-tiles // span)), span


def _padded(down: Array, pitch: int) -> Array:
    """down with zeros up to `pitch` columns, at an address of a multiple of 16 bytes."""
    import cupy

    if down.shape[2] == pitch and down.flags.c_contiguous and down.data.ptr % 16 == 0:
        return down
    out = cupy.zeros((*down.shape[:2], pitch), bits(down).dtype)
    out[..., : down.shape[2]] = bits(down)
    return out.view(down.dtype)
