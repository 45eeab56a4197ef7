"""Layer and group normalization of channels-last activations: one primitive, of which layer_norm is
the case of one group and one position a sample.

Ba et al. 2016, arXiv 1607.06450; Wu & He 2018, arXiv 1803.08494.
"""

from __future__ import annotations

from math import prod

import numpy as np

from ..arrays import Array, like, on_gpu, require_float, wide, wide_dtype
from ..errors import DtypeError, ShapeError
from ..tape import Primitive, value_of
from .columns import column_sum
from .norm_gpu import group_norm_gpu, group_norm_pull_gpu
from .shapes import reshape


def layer_norm(x: Array, weight: Array, bias: Array, *, eps: float = 1e-5) -> Array:
    """(x - mean) / sqrt(variance + eps) * weight + bias, mean and variance over the last axis.

    x: (..., C). weight, bias: (C,) in the wide dtype. Returns the dtype of x, summed wide, rounded
    once. Raises ShapeError, DtypeError.
    """
    rows = (prod(x.shape[:-1]), 1, x.shape[-1])
    return reshape(group_norm(reshape(x, rows), weight, bias, groups=1, eps=eps), x.shape)


def group_norm(x: Array, weight: Array, bias: Array, *, groups: int, eps: float = 1e-5) -> Array:
    """(x - mean) / sqrt(variance + eps) * weight + bias, mean and variance over the space and the
    C / groups channels of each group of each sample; the variance is the biased one.

    x: (N, *space, C). weight, bias: (C,) in the wide dtype. Returns the dtype of x, summed wide,
    rounded once. Raises ShapeError, DtypeError.
    """
    require_float(value_of(x), "x")
    channels = x.shape[-1]
    if x.ndim < 2:
        raise ShapeError(f"x has shape {tuple(x.shape)}, expected (N, *space, C)")
    if groups < 1 or channels % groups:
        raise ShapeError(f"x has {channels} channels, expected a multiple of the {groups} groups")
    for name, array in (("weight", weight), ("bias", bias)):
        if tuple(array.shape) != (channels,):
            raise ShapeError(f"{name} has shape {tuple(array.shape)}, expected ({channels},)")
        if array.dtype != wide_dtype(x.dtype):
            expected = wide_dtype(x.dtype)
            raise DtypeError(f"{name} is {array.dtype}, expected {expected} beside {x.dtype}")
    return _group_norm(x, weight, bias, groups=int(groups), eps=float(eps))


def _sizes(x, groups):
    """(samples, positions, groups, channels of a group)."""
    return x.shape[0], prod(x.shape[1:-1]), groups, x.shape[-1] // groups


def _group_mean(split):
    """The mean over positions and width of (samples, positions, groups, width), its axes kept."""
    # Over whole rows first: NumPy adds those as vectors.
    total = split.sum(axis=1, keepdims=True).sum(axis=3, keepdims=True)
    return total / max(split.shape[1] * split.shape[3], 1)


def _normal_cpu(x, groups, eps):
    """(x - mean) / deviation and 1 / deviation, as (samples, positions, groups, width), wide."""
    split = wide(x).reshape(_sizes(x, groups))
    centred = split - _group_mean(split)
    inverse = 1 / np.sqrt(_group_mean(np.square(centred)) + split.dtype.type(eps))
    return np.multiply(centred, inverse, out=centred), inverse


def _group_norm_cpu(x, weight, bias, *, groups, eps):
    normal, _ = _normal_cpu(x, groups, eps)
    return like(normal.reshape(x.shape) * weight + bias, x)


def _pull_cpu(needs, g, x, weight, groups, eps):
    normal, inverse = _normal_cpu(x, groups, eps)
    h = (wide(g) * weight).reshape(normal.shape)
    mean, along = _group_mean(h), _group_mean(h * normal)
    dx = like(((h - mean - normal * along) * inverse).reshape(x.shape), x)
    dweight = column_sum(wide(g) * normal.reshape(x.shape)) if needs[1] else None
    return dx, dweight


def _group_norm_vjp(needs, out, x, weight, bias, *, groups, eps):
    def pull(g):
        dx = dweight = None
        if needs[0] or needs[1]:
            run = group_norm_pull_gpu if on_gpu(x) else _pull_cpu
            dx, dweight = run(needs, g, x, weight, groups, eps)
        return dx if needs[0] else None, dweight, column_sum(g) if needs[2] else None

    return pull


_group_norm = Primitive("group_norm", _group_norm_cpu, group_norm_gpu, _group_norm_vjp)
