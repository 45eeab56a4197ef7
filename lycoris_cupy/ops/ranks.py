"""Operations along the ranks of a low-rank pair: take_rows, interleave, mask_ranks."""

from __future__ import annotations

from math import prod

import numpy as np

from ..arrays import Array, module_of, on_gpu, require_float, require_same, wide_dtype
from ..errors import LycorisError, ShapeError
from ..kernels import kernel
from ..tape import Primitive, Var, value_of
from .columns import bits, moved


def take_rows(x: Array, first: int, last: int) -> Array:
    """x[..., first:last, :], a copy; `take_columns` does it for the last axis."""
    if x.ndim < 2 or not 0 <= first <= last <= x.shape[-2]:
        raise ShapeError(f"rows {first} to {last} do not lie in those of x {tuple(x.shape)}")
    return x if last - first == x.shape[-2] else _take_rows(x, first=first, last=last)


def interleave(a: Array, b: Array, axis: int) -> Array:
    """a0, b0, a1, b1, ... along the last axis, or (-2) the one before; shapes and dtypes alike."""
    if axis not in (-1, -2):
        raise ShapeError(f"axis {axis} must be -1 or -2")
    require_float(value_of(a), "a")
    require_same("a", value_of(a), "b", value_of(b))
    if tuple(a.shape) != tuple(b.shape):
        raise ShapeError(f"b has shape {tuple(b.shape)}, expected that of a, {tuple(a.shape)}")
    return _interleave(a, b, axis=axis)


def mask_ranks(
    x: Array, level: Array, *, least: int = 1, exponent: float = 1.0, width: int = 1
) -> Array:
    """x where the rank p of a column is below least + floor((1 - level)^exponent * (R - least)).

    x: (N, ..., R * width), the columns of a rank side by side. level: (N,), or (1,) for all
    samples, in the wide dtype: 0 is a clean sample, which has all R ranks, 1 pure noise, which has
    `least`. A constant of the tape. T-LoRA; Soboleva et al. 2025, arXiv 2507.05964.
    Raises ShapeError, LycorisError.
    """
    require_float(value_of(x), "x")
    if isinstance(level, Var):
        raise LycorisError("mask_ranks: the noise level is a constant of the tape")
    if level.dtype != wide_dtype(x.dtype) or tuple(level.shape) not in ((1,), tuple(x.shape[:1])):
        raise ShapeError(
            f"the noise level has shape {tuple(level.shape)} and dtype {level.dtype}, expected "
            f"(1,) or ({x.shape[0]},), one a sample, and {wide_dtype(x.dtype)}"
        )
    ranks = x.shape[-1] // max(width, 1)
    if width < 1 or x.shape[-1] % width or not 0 <= least <= ranks:
        raise ShapeError(f"{least} of {ranks} ranks of width {width} do not fit {tuple(x.shape)}")
    return _mask(x, level, least=int(least), exponent=float(exponent), width=int(width))


def _run_take_rows(x, *, first, last):
    return moved(x, lambda b: b[..., first:last, :])


def _take_rows_vjp(needs, out, x, *, first, last):
    shape = x.shape

    def pull(g):
        dx = module_of(g).zeros(shape, bits(g).dtype)
        dx[..., first:last, :] = bits(g)
        return (dx.view(g.dtype),)

    return pull


_take_rows = Primitive("take_rows", _run_take_rows, _run_take_rows, _take_rows_vjp, keeps_wide=True)


def _run_interleave(a, b, *, axis):
    xp = module_of(a)
    place = a.ndim if axis == -1 else a.ndim - 1  # of the axis of two, behind the ranks
    out = xp.stack([bits(a), bits(b)], axis=place)
    shape = list(a.shape)
    shape[axis] *= 2
    return xp.ascontiguousarray(out).view(a.dtype).reshape(shape)


def _interleave_vjp(needs, out, a, b, *, axis):
    shape = a.shape

    def pull(g):
        split = list(shape)
        split.insert(len(shape) if axis == -1 else len(shape) - 1, 2)
        g = g.reshape(split)
        return tuple(
            moved(g, lambda v, i=i: v[..., i] if axis == -1 else v[..., i, :]) if needs[i] else None
            for i in (0, 1)
        )

    return pull


_interleave = Primitive(
    "interleave", _run_interleave, _run_interleave, _interleave_vjp, keeps_wide=True
)


def _mask_cpu(x, level, *, least, exponent, width):
    ranks = x.shape[-1] // width
    active = least + np.floor(np.maximum(1 - level, 0) ** exponent * (ranks - least))
    keep = np.arange(x.shape[-1]) // width < active[:, None]  # (N or 1, columns)
    keep = keep.reshape(keep.shape[0], *(1,) * (x.ndim - 2), x.shape[-1])
    return np.where(keep, x, np.zeros((), x.dtype))


def _mask_gpu(x, level, *, least, exponent, width):
    import cupy

    out = cupy.empty(x.shape, x.dtype)
    if out.size:
        samples, columns = level.shape[0], x.shape[-1]
        rows = prod(x.shape[:-1]) // samples
        grid = (min((rows * columns + 255) // 256, 4096), samples)
        kernel("ranks.cu", "mask_ranks", x.dtype)(
            grid, (256,), x, level, out, rows, columns // width, width, least, exponent
        )
    return out


def _mask_vjp(needs, out, x, level, **static):
    return lambda g: ((_mask_gpu if on_gpu(g) else _mask_cpu)(g, level, **static), None)


_mask = Primitive("mask_ranks", _mask_cpu, _mask_gpu, _mask_vjp)
