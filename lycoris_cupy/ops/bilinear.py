"""resize_bilinear: images of any size from images of any size, and the exact adjoint.

(resize_nearest, by a whole factor, is in shapes.py.)
"""

from __future__ import annotations

from math import prod

import numpy as np

from ..arrays import Array, like, on_gpu, require_axes, require_float, wide
from ..errors import ShapeError
from ..kernels import kernel
from ..tape import Primitive, value_of

_LARGEST = 32767  # of an axis: 2 * inputs * outputs is a 32-bit number in the kernels


def resize_bilinear(x: Array, size: tuple[int, int], *, align_corners: bool = False) -> Array:
    """(N, H, W, C) -> (N, *size, C): each output between the four inputs around it, by distance.

    Output o of O lies at input (o + 1/2) * I / O - 1/2, held within 0 to I - 1 (pixels are areas
    whose edges are aligned); with align_corners at o (I - 1) / (O - 1), so that the corners'
    centres are. As torch's `interpolate(mode='bilinear')` without antialiasing. Summed wide,
    rounded once. Raises ShapeError, DtypeError.
    """
    require_float(value_of(x), "x")
    require_axes(x, 4, "x", "(N, H, W, C)")
    rows, columns = (int(s) for s in size)
    sizes = (*x.shape[1:3], rows, columns)
    if min(sizes) < 1 or max(sizes) > _LARGEST:
        raise ShapeError(
            f"x has shape {tuple(x.shape)} and size is {(rows, columns)}, expected axes of 1 to "
            f"{_LARGEST} pixels"
        )
    if max(x.shape[2], columns) * x.shape[3] > 2**31 - 256:
        raise ShapeError(f"x has shape {tuple(x.shape)}: a row of 2^31 values is too long")
    if (rows, columns) == tuple(x.shape[1:3]):
        return x
    return _resize_bilinear(x, size=(rows, columns), corners=bool(align_corners))


def _between(inputs: int, outputs: int, corners: bool, dtype):
    """(the input before each output, the next one, the share of the next one)."""
    o = np.arange(outputs)
    if corners:
        place, unit = o * (inputs - 1), max(outputs - 1, 1)
    else:
        place, unit = np.maximum((2 * o + 1) * inputs - outputs, 0), 2 * outputs
    before = np.minimum(place // unit, inputs - 1)
    share = ((place - before * unit) / unit).astype(dtype)
    return before, np.minimum(before + 1, inputs - 1), share


def _along(axis, share):
    """A share an output, to be multiplied along this axis of (N, H, W, C)."""
    return share.reshape(-1, *[1] * (3 - axis))


def _stretched(x, axis, outputs, corners):
    """x, wide, with another length of one axis."""
    if x.shape[axis] == outputs:
        return x
    before, after, share = _between(x.shape[axis], outputs, corners, x.dtype)
    out = x.take(after, axis=axis)
    out *= _along(axis, share)
    out += x.take(before, axis=axis) * _along(axis, 1 - share)
    return out


def _stretched_back(g, axis, inputs, corners):
    """The adjoint of _stretched. Outputs lie in order, so those that take from a run of inputs are
    a run too: a small dense matrix of shares turns one into the other, run by run.
    """
    outputs = g.shape[axis]
    if outputs == inputs:
        return g
    before, after, share = _between(inputs, outputs, corners, g.dtype)
    shape = (prod(g.shape[:axis]), outputs, prod(g.shape[axis + 1 :]))
    flat, out = g.reshape(shape), np.empty((shape[0], inputs, shape[2]), g.dtype)
    step = max(64 * inputs // outputs, 1)  # for some 64 outputs
    for first in range(0, inputs, step):
        last = min(first + step, inputs)
        low, high = np.searchsorted(after, first), np.searchsorted(before, last - 1, "right")
        matrix = np.zeros((last - first, high - low), g.dtype)
        for places, part in ((before, 1 - share), (after, share)):
            inside = np.flatnonzero((places[low:high] >= first) & (places[low:high] < last))
            matrix[places[low:high][inside] - first, inside] += part[low:high][inside]
        np.matmul(matrix, flat[:, low:high], out=out[:, first:last])
    return out.reshape(*g.shape[:axis], inputs, *g.shape[axis + 1 :])


def _ordered(shape, size):
    """The two axes with their new lengths: the one that shrinks most, or grows least, first."""
    return sorted(zip((1, 2), size, strict=True), key=lambda pair: pair[1] / shape[pair[0]])


def _resize_cpu(x, *, size, corners):
    out = wide(x)
    for axis, outputs in _ordered(x.shape, size):
        out = _stretched(out, axis, outputs, corners)
    return like(out, x)


def _launch(op, source, out, image, size, corners):
    if out.size:
        n, height, width, channels = image
        grid = ((out.shape[2] * channels + 255) // 256, out.shape[1], min(n, 65535))
        kernel("resize.cu", op, out.dtype)(
            grid, (256,), source, out, n, height, width, *size, channels, int(corners)
        )
    return out


def _resize_gpu(x, *, size, corners):
    import cupy

    out = cupy.empty((x.shape[0], *size, x.shape[3]), x.dtype)
    return _launch("resize_bilinear", x, out, x.shape, size, corners)


def _resize_vjp(needs, out, x, *, size, corners):
    shape = x.shape

    def pull(g):
        if on_gpu(g):
            import cupy

            dx = cupy.empty(shape, g.dtype)
            return (_launch("resize_bilinear_d", g, dx, shape, size, corners),)
        d = wide(g)
        for axis, _ in reversed(_ordered(shape, size)):
            d = _stretched_back(d, axis, shape[axis], corners)
        return (like(d, g),)

    return pull


_resize_bilinear = Primitive("resize_bilinear", _resize_cpu, _resize_gpu, _resize_vjp)
