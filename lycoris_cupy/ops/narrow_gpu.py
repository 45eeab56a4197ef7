"""Convolutions with few outputs on a GPU: one product with all taps side by side, which reads x
once, and a shifted sum; over large images a kernel of its own, see `halo_gpu`.

    y[p, r] = sum over taps t of parts[pixel(p, t), t, r]      parts = x @ w as (IN, taps * R), wide
    dx = columns @ w^T,  dw = x^T @ columns                    columns[q, t, r] = g[o, r] where o
    reads q at tap t

A down factor has 16 outputs where its layer has hundreds: walking over the taps it would read x
once for each of them.
"""

from __future__ import annotations

from math import prod

from ..arrays import Array, bf16, wide_dtype
from ..errors import ShapeError
from ..gemm import gemm
from ..kernels import kernel
from .columns import moved, rows_of
from .conv_plan import geometry_of
from .halo_gpu import halo_conv, takes_halo
from .window import Window

LIMIT = 288  # taps * R up to which g spread out is smaller than what the taps would read again
_WIDE = (
    5 / 4
)  # taps * R over inputs up to which a forward is: its parts are as large as two x or so
_LEAST = 32  # inputs


def suits(x_channels: int, columns: int, window: Window, dtype, forward: bool = False) -> bool:
    """Whether a convolution from so many channels to so many columns may be done this way, or its
    gradients are."""
    limit = max(LIMIT, _WIDE * x_channels) if forward else LIMIT
    return (
        dtype == bf16
        and window.groups == 1
        and not window.pointwise
        and window.taps * columns <= limit
        and x_channels >= _LEAST
    )


def narrow_conv(x, w, window: Window, *, scale, add, bias, out=None) -> Array:
    """add + scale * (x * w) + bias, one rounding.  x: (N, *space, IN).  w: (taps, IN, R).  out:
    where the result goes, a new array by default; may be add.
    """
    import cupy

    if takes_halo(x, w, window, add, bias):
        return halo_conv(x, w, window, scale=scale, add=add, bias=bias, out=out)
    parts = gemm(rows_of(x), side_by_side(w), dtype=wide_dtype(x.dtype))
    space, columns = window.out_space(x.shape[1:-1]), w.shape[2]
    y = cupy.empty((x.shape[0], *space, columns), x.dtype) if out is None else out
    geometry = geometry_of(window, x.shape[1:-1], space)
    positions = x.shape[0] * prod(space)
    launch, grid = _launch("shifted_sum", x.dtype, columns, positions, add, bias)
    launch(grid, (256,), parts, scale, add, bias, y, geometry, positions, columns)
    return y


def spread(g, window: Window, in_space: tuple[int, ...]) -> Array:
    """columns (pixels, taps * R) of g (N, *out_space, R)."""
    import cupy

    pixels, columns = g.shape[0] * prod(in_space), g.shape[-1]
    out = cupy.empty((pixels, window.taps * columns), g.dtype)
    geometry = geometry_of(window, g.shape[1:-1], tuple(in_space))
    launch, grid = _launch("spread", g.dtype, columns, pixels * window.taps, g)
    launch(grid, (256,), g, out, geometry, pixels, columns)
    return out


def narrow_dx(g, w, window: Window, in_space, *, scale, add, out=None) -> Array:
    """add + scale * the gradient of narrow_conv for x, (N, *in_space, IN).  out: as above."""
    import cupy

    if out is None:
        out = cupy.empty((g.shape[0], *in_space, w.shape[1]), g.dtype)
    more = None if add is None else rows_of(add)
    columns = spread(g, window, in_space)
    gemm(columns, side_by_side(w), transpose_b=True, scale=scale, add=more, out=rows_of(out))
    return out


def narrow_dw(x, g, window: Window, *, scale) -> Array:
    """scale * the gradient of narrow_conv for w, (taps, IN, R), wide."""
    columns, kept = spread(g, window, x.shape[1:-1]), wide_dtype(x.dtype)
    flat = gemm(rows_of(x), columns, transpose_a=True, scale=scale, dtype=kept)
    flat = flat.reshape(x.shape[-1], window.taps, -1)
    return moved(flat, lambda b: b.transpose(1, 0, 2))


def side_by_side(w: Array) -> Array:
    """w (taps, IN, R) as (IN, taps * R)."""
    return moved(w, lambda b: b.transpose(1, 0, 2)).reshape(w.shape[1], w.shape[0] * w.shape[2])


def _launch(op: str, dtype, columns: int, rows: int, *arrays):
    aligned = all(a is None or a.data.ptr % 16 == 0 for a in arrays)
    vec = next(v for v in (8, 4, 1) if columns % v == 0 and (aligned or v == 1))
    if rows * columns >= 2**31:  # the kernels number their values so
        raise ShapeError(f"{rows} rows of {columns} are more than 2^31 values: split the batch")
    return kernel("narrow.cu", op, dtype, VEC=vec), (-(-rows * (columns // vec) // 256),)
