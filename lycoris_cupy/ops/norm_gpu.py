"""Group normalization on the GPU: a block a group where groups are small or many (norm.cu), and
blocks for parts of each sample's positions where they are large (norm_parts.cu).
"""

from __future__ import annotations

from math import prod

from ..kernels import kernel
from .columns import column_sum

_LARGE = 8192  # values of a group from which on one block for all of them is too few
_CHANNELS = 4096  # that a block of norm_parts.cu has shared memory for
_PART = 8192  # values that a block of norm_parts.cu should have at least


def _sizes(x, groups):
    """(samples, positions, channels, groups)."""
    return x.shape[0], prod(x.shape[1:-1]), x.shape[-1], groups


def _parts(samples, positions, channels, groups) -> int:
    """Into how many parts a sample's positions are cut; 0 where a block takes a whole group."""
    if positions * (channels // groups) <= _LARGE or positions < 64 or channels > _CHANNELS:
        return 0
    # Some eight blocks a multiprocessor over all samples.
    return max(min(1056 // samples, positions * channels // _PART, positions // 8), 1)


def _statistics(x, kept, sizes, parts, eps):
    """(samples, groups, 2): mean and 1 / deviation of each group."""
    import cupy

    samples, *numbers = sizes
    partial = cupy.empty((samples, parts, sizes[3], 2), kept)
    stats = cupy.empty((samples, sizes[3], 2), kept)
    shared = (sizes[2] + sizes[3]) * partial.dtype.itemsize
    kernel("norm_parts.cu", "norm_parts", x.dtype)(
        (samples, parts), (256,), x, partial, *numbers, shared=shared
    )
    kernel("norm_parts.cu", "norm_join", x.dtype)(
        (sizes[3], samples), (32,), partial, stats, eps, *numbers, parts
    )
    return stats


def _whole_groups(x, weight, bias, out, sizes, eps):
    """Writes out if it is given; returns the statistics."""
    import cupy

    samples, *numbers = sizes
    stats = cupy.empty((samples, sizes[3], 2), weight.dtype)
    kernel("norm.cu", "group_norm", x.dtype)(
        (samples, sizes[3]), (256,), x, weight, bias, out, stats, eps, *numbers
    )
    return stats


def group_norm_gpu(x, weight, bias, *, groups, eps):
    import cupy

    out, sizes = cupy.empty(x.shape, x.dtype), _sizes(x, groups)
    if not out.size:
        return out
    parts, (samples, *numbers) = _parts(*sizes), sizes
    if not parts:
        _whole_groups(x, weight, bias, out, sizes, eps)
        return out
    stats = _statistics(x, weight.dtype, sizes, parts, eps)
    kernel("norm_parts.cu", "norm_apply", x.dtype)(
        (samples, parts), (256,), x, weight, bias, stats, out, *numbers
    )
    return out


def group_norm_pull_gpu(needs, g, x, weight, groups, eps):
    """The gradients of x and of the weight, the latter None unless it is needed."""
    import cupy

    # The statistics are computed again, which reads x once more; nothing is held until here.
    dx, sizes = cupy.empty(x.shape, x.dtype), _sizes(x, groups)
    samples, *numbers = sizes
    if not dx.size:
        return dx, cupy.zeros(weight.shape, weight.dtype)
    parts = _parts(*sizes)
    if not parts:
        stats = _whole_groups(x, weight, weight, None, sizes, eps)
        terms = cupy.empty(x.shape, weight.dtype) if needs[1] else None
        kernel("norm.cu", "group_norm_d", x.dtype)(
            (samples, groups), (256,), g, x, weight, stats, dx, terms, *numbers
        )
        return dx, None if terms is None else column_sum(terms)
    stats = _statistics(x, weight.dtype, sizes, parts, eps)
    partial, means = cupy.empty((samples, parts, groups, 2), weight.dtype), cupy.empty_like(stats)
    slopes = cupy.empty((samples * parts, x.shape[-1]), weight.dtype) if needs[1] else None
    kernel("norm_parts.cu", "norm_parts_d", x.dtype)(
        (samples, parts), (256,), g, x, weight, stats, partial, slopes, *numbers,
        shared=2 * x.shape[-1] * partial.dtype.itemsize,
    )  # fmt: skip
    kernel("norm_parts.cu", "norm_join_d", x.dtype)(
        (groups, samples), (32,), partial, means, *numbers, parts
    )
    kernel("norm_parts.cu", "norm_apply_d", x.dtype)(
        (samples, parts), (256,), g, x, weight, stats, means, dx, *numbers
    )
    return dx, None if slopes is None else column_sum(slopes)
