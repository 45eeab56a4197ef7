"""Operations that only move values: reshape, transpose, tap_diagonal, pixel_shuffle and back,
resize_nearest, expand. Bits are untouched.

On the GPU a copy runs on the array seen as unsigned integers, so that no dtype support is asked of
CuPy.
"""

from __future__ import annotations

from math import prod

import numpy as np

from ..arrays import Array, module_of
from ..errors import ShapeError
from ..tape import Primitive, value_of
from .columns import _column_sum, _run_expand_rows, bits, moved


def reshape(x: Array, shape: tuple[int, ...]) -> Array:
    """x (C-contiguous) with other axes; a view."""
    shape = tuple(value_of(x).reshape(shape).shape)
    return x if shape == tuple(x.shape) else _reshape(x, shape=shape)


def transpose(x: Array, axes: tuple[int, ...]) -> Array:
    """x with its axes in another order, as a contiguous copy."""
    if sorted(axes) != list(range(x.ndim)):
        raise ShapeError(f"axes {axes} are not an order of the {x.ndim} axes of x {tuple(x.shape)}")
    return _transpose(x, axes=tuple(axes))


def tap_diagonal(x: Array) -> Array:
    """(taps, IN, R) -> (taps, IN, taps * R): tap t fills columns t * R to (t + 1) * R, all else is
    zero.

    x * tap_diagonal(down) keeps what each tap saw apart, side by side.
    """
    if x.ndim != 3:
        raise ShapeError(f"x has shape {tuple(x.shape)}, expected (taps, IN, R)")
    return _tap_diagonal(x)


def pixel_shuffle(x: Array, factor: int) -> Array:
    """(N, H, W, C * f^2) -> (N, H * f, W * f, C); input channel c * f^2 + i * f + j goes to pixel
    (i, j) of channel c.

    Shi et al. 2016, arXiv 1609.05158.
    """
    n, h, w, c = x.shape
    if c % (factor * factor):
        raise ShapeError(
            f"x has {c} channels, expected a multiple of {factor}^2 = {factor * factor}"
        )
    x = reshape(x, (n, h, w, c // factor**2, factor, factor))
    return reshape(transpose(x, (0, 1, 4, 2, 5, 3)), (n, h * factor, w * factor, c // factor**2))


def pixel_unshuffle(x: Array, factor: int) -> Array:
    """(N, H * f, W * f, C) -> (N, H, W, C * f^2), the inverse of pixel_shuffle: pixel (i, j) of
    channel c goes to channel c * f^2 + i * f + j.
    """
    if x.ndim != 4 or factor < 1 or x.shape[1] % factor or x.shape[2] % factor:
        raise ShapeError(
            f"x has shape {tuple(x.shape)}, expected (N, H, W, C) with H and W multiples of "
            f"{factor}"
        )
    n, h, w, c = x.shape[0], x.shape[1] // factor, x.shape[2] // factor, x.shape[3]
    x = reshape(x, (n, h, factor, w, factor, c))
    return reshape(transpose(x, (0, 1, 3, 5, 2, 4)), (n, h, w, c * factor**2))


def resize_nearest(x: Array, factor: int) -> Array:
    """(N, H, W, C) -> (N, H * f, W * f, C), each pixel repeated f x f times."""
    if x.ndim != 4 or factor < 1:
        raise ShapeError(
            f"x has shape {tuple(x.shape)}, expected (N, H, W, C), and factor {factor} must be at "
            "least 1"
        )
    return _resize_nearest(x, factor=int(factor))


def expand(x: Array, shape: tuple[int, ...]) -> Array:
    """x repeated along its axes of size 1 to a shape; axes in front that x lacks count as such.

    A vector a sample beside an image: add(image, expand(reshape(v, (N, 1, 1, C)), image.shape)).
    """
    shape, own = tuple(shape), (1,) * (len(shape) - x.ndim) + tuple(x.shape)
    if len(own) != len(shape) or any(a not in (1, b) for a, b in zip(own, shape, strict=True)):
        raise ShapeError(
            f"x has shape {tuple(x.shape)}, expected the axes of {shape}, or 1 in place of any"
        )
    x = reshape(x, own)
    return x if own == shape else _expand(x, shape=shape)


def _run_reshape(x, *, shape):
    return x.reshape(shape)


_reshape = Primitive(
    "reshape",
    cpu=_run_reshape,
    gpu=_run_reshape,
    vjp=lambda needs, out, x, *, shape: lambda g, old=x.shape: (g.reshape(old),),
    keeps_wide=True,
)


def _run_transpose(x, *, axes):
    return moved(x, lambda b: b.transpose(axes))


_transpose = Primitive(
    "transpose",
    cpu=_run_transpose,
    gpu=_run_transpose,
    vjp=lambda needs, out, x, *, axes: (
        lambda g: (_transpose(g, axes=tuple(np.argsort(axes).tolist())),)
    ),
    keeps_wide=True,
)


def _run_resize_nearest(x, *, factor):
    n, h, w, c = x.shape
    spread = (n, h, factor, w, factor, c)
    return moved(
        x,
        lambda b: (
            module_of(b)
            .broadcast_to(b[:, :, None, :, None, :], spread)
            .reshape(n, h * factor, w * factor, c)
        ),
    )


def _resize_nearest_vjp(needs, out, x, *, factor):
    n, h, w, c = x.shape

    def pull(g):
        # The sum over the f x f copies: bring them in front of everything else and add them as
        # rows.
        g = _transpose(g.reshape(n, h, factor, w, factor, c), axes=(2, 4, 0, 1, 3, 5))
        return (_column_sum(g.reshape(factor * factor, x.size), None).reshape(x.shape),)

    return pull


_resize_nearest = Primitive(
    "resize_nearest", cpu=_run_resize_nearest, gpu=_run_resize_nearest, vjp=_resize_nearest_vjp
)


def _expand_vjp(needs, out, x, *, shape):
    own = x.shape
    repeated = [i for i, (a, b) in enumerate(zip(own, shape, strict=True)) if a != b]
    order = (*repeated, *(i for i in range(len(shape)) if i not in repeated))

    def pull(g):
        # The repeated axes in front of all others, and their sum as one of rows.
        g = g if order == tuple(range(g.ndim)) else _transpose(g, axes=order)
        rows = prod(g.shape[: len(repeated)])
        return (_column_sum(g.reshape(rows, prod(own)), None).reshape(own),)

    return pull


_expand = Primitive("expand", cpu=_run_expand_rows, gpu=_run_expand_rows, vjp=_expand_vjp)


def _blocks(x, taps):
    """The diagonal blocks of (taps, IN, taps * R), as a view (taps, IN, R)."""
    inputs, rank = x.shape[1], x.shape[2] // taps
    step, row, one = x.strides
    strides = (step + rank * one, row, one)
    return module_of(x).lib.stride_tricks.as_strided(x, (taps, inputs, rank), strides)


def _run_tap_diagonal(x):
    taps, inputs, rank = x.shape
    out = module_of(x).zeros((taps, inputs, taps * rank), bits(x).dtype)
    _blocks(out, taps)[...] = bits(x)
    return out.view(x.dtype)


_tap_diagonal = Primitive(
    "tap_diagonal",
    cpu=_run_tap_diagonal,
    gpu=_run_tap_diagonal,
    vjp=lambda needs, out, x: lambda g, taps=x.shape[0]: (moved(g, lambda b: _blocks(b, taps)),),
    keeps_wide=True,
)
