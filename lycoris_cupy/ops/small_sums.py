"""Sums of products of small arrays, several in one launch: what a small weight's factors get of its
gradient, and what it is made of, where a launch for each takes longer than the sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import numpy as np

from ..arrays import Array, on_gpu, wide_dtype
from ..kernels import kernel

_JOB = np.dtype(
    [
        *((name, np.int32, 3) for name in ("size", "a", "b")),
        *((name, np.int32, 2) for name in ("inner", "a_inner", "b_inner")),
        ("lanes", np.int32),
        ("blocks", np.int32),
    ]
)
_THREADS, _MOST = 256, 3  # as in small_sums.cu
_SHORT = 16  # terms of a sum that one lane adds
_SMALL = 1 << 22  # multiply-adds up to which a launch costs more. Estimated


class Sum(NamedTuple):
    """spec: as numpy.einsum's, 'tio,po->tip', with at most three axes of the result and two that
    are summed over. a: wide, or of the dtype of b. b: of the storage dtype.
    """

    spec: str
    a: Array
    b: Array

    @property
    def sizes(self) -> dict[str, int]:
        left, right = self.spec.split("->")[0].split(",")
        return dict(zip(left + right, (*self.a.shape, *self.b.shape), strict=True))


def small(*sums: Sum) -> bool:
    """Whether all are on a GPU, contiguous, and small enough together."""
    arrays = [array for term in sums for array in (term.a, term.b)]
    if not on_gpu(arrays[0]) or not all(a.flags.c_contiguous and a.size for a in arrays):
        return False
    return sum(prod(term.sizes.values()) for term in sums) <= _SMALL


def small_sums(sums: Sequence[Sum], scale: Array | None = None) -> list[Array]:
    """scale * einsum(spec, a, b) of each, wide, for up to three that are `small`, the a of one
    dtype.  scale: (1,) wide, or None for 1.
    """
    import cupy

    left, right = sums[0].a.dtype, sums[0].b.dtype
    kept = wide_dtype(right)
    jobs, arguments, outs = [], [], []
    for term in sums:
        job, shape = _job(term)
        out = cupy.empty(shape, kept)
        jobs.append(job), outs.append(out), arguments.extend((term.a, term.b, out))
    missing = _MOST - len(jobs)
    jobs += [np.zeros((), _JOB)] * missing
    arguments += [None] * 3 * missing
    grid = sum(int(job["blocks"]) for job in jobs)
    op = "small_sums" if left == kept else "small_sums_narrow"
    kernel("small_sums.cu", op, right)((grid,), (_THREADS,), *arguments, scale, *jobs)
    return outs


def _job(term: Sum) -> tuple[np.ndarray, tuple[int, ...]]:
    """(the kernel's view of a sum, the result's shape)."""
    (left, right), to = term.spec.split("->")[0].split(","), term.spec.split("->")[1]
    sizes = term.sizes
    summed = [axis for axis in sizes if axis not in to]
    job = np.zeros((), _JOB)
    for axes, count, names in ((to, 3, ("size", "a", "b")), (summed, 2, _INNER)):
        for place, axis in enumerate(axes, count - len(axes)):
            job[names[0]][place] = sizes[axis]
            job[names[1]][place] = _stride(term.a.shape, left, axis)
            job[names[2]][place] = _stride(term.b.shape, right, axis)
        job[names[0]][: count - len(axes)] = 1
    shape = tuple(sizes[axis] for axis in to)
    job["lanes"] = _lanes(term)
    job["blocks"] = -(-prod(shape) * job["lanes"] // _THREADS)
    return job, shape


def _lanes(term: Sum) -> int:
    """That an element has: more than one only wait for each other where there is little to add."""
    to = term.spec.split("->")[1]
    return 1 if prod(n for axis, n in term.sizes.items() if axis not in to) <= _SHORT else 8


_INNER = ("inner", "a_inner", "b_inner")


def _stride(shape: tuple[int, ...], axes: str, axis: str) -> int:
    """Elements from one to the next along an axis of a contiguous array; 0 where it has none."""
    return prod(shape[axes.index(axis) + 1 :]) if axis in axes else 0
