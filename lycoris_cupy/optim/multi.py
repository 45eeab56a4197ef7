"""Launches over many arrays at once, as cuda_src/multi_tensor.cuh has them.

What changes from launch to launch, the addresses of the sources, goes along as an argument: nothing
is uploaded, nothing waited for, and a captured graph keeps what it was captured with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..arrays import Array, bf16
from ..kernels import kernel
from .flat import Layout

THREADS, CHUNK, SOURCES = 256, 2048, 480  # of multi_tensor.cuh
NUMBERS, FINISH = 480, 1024  # of optimizer.cu
FILE = "optimizer.cu"

_WORK = np.dtype(  # struct Work
    [(name, np.int64) for name in ("tensors", "chunks", "outs")]
    + [(name, np.int32) for name in ("first_tensor", "first_chunk")]
    + [("sources", np.int64, SOURCES)]
)
_NUMBERS = np.dtype([("at", np.float64, NUMBERS)])  # struct Numbers


class Sources(NamedTuple):
    """Addresses as kernels take them, and the arrays, so that they stay."""

    pointers: np.ndarray
    arrays: list[Array]


class Table:
    """A layout as kernels read it. like: an array on its device."""

    def __init__(self, layout: Layout, like: Array):
        import cupy

        self._device = like.device
        tensors, chunks, self._parts = _tables(layout)
        with self._device:
            self._tensors, self._chunks = cupy.asarray(tensors), cupy.asarray(chunks)
        self.chunks = len(chunks)
        for work, *_ in self._parts:
            work["tensors"], work["chunks"] = self._tensors.data.ptr, self._chunks.data.ptr
        self._outs: dict[bytes, Array] = {}

    def sources(self, arrays: Sequence[Array], wide: np.dtype) -> Sources:
        """arrays: in the order of the spots; bf16 or wide is read as it is, any other is cast."""
        import cupy

        taken = [
            x
            if x.dtype in (wide, bf16) and x.flags.c_contiguous
            else cupy.ascontiguousarray(x, wide)
            for x in arrays
        ]
        return Sources(_tagged(taken), taken)

    def outs(self, arrays: Sequence[Array]) -> Array:
        """A table of where values go as well; made at the first call for these arrays, and kept,
        since a graph may hold it.
        """
        import cupy

        tagged = _tagged(arrays)
        key = tagged.tobytes()
        if key not in self._outs:
            with self._device:
                self._outs[key] = cupy.asarray(tagged)
        return self._outs[key]

    def launch(self, op: str, dtype, sources: Sources, *args, outs: Array | None = None) -> None:
        """NAME(op) for every chunk; a launch takes the sources of SOURCES arrays."""
        run = kernel(FILE, op, dtype)
        with self._device:
            for work, first, last, chunks in self._parts:
                work["outs"] = 0 if outs is None else outs.data.ptr
                work["sources"][: last - first] = sources.pointers[first:last]
                run((chunks,), (THREADS,), work, *args)


def finish(op: str, dtype, *args) -> None:
    """NAME(op), which sums partial sums, its first argument, in one block."""
    with args[0].device:
        kernel(FILE, op, dtype)((1,), (FINISH,), *args)


def tell(values: np.ndarray, numbers: Array, clock: Array, step: int) -> None:
    """Write values (f64) and the step into arrays on the device, in the order of the stream."""
    flat = numbers.reshape(-1)
    run = kernel(FILE, "tell", numbers.dtype)
    with numbers.device:
        for at in range(0, len(values), NUMBERS):
            told = np.zeros((), _NUMBERS)
            part = values[at : at + NUMBERS]
            told["at"][: len(part)] = part
            run((1,), (NUMBERS,), told, len(part), flat[at : at + len(part)], clock, step)


def _tagged(arrays: Sequence[Array]) -> np.ndarray:
    """Addresses, one more for bf16: no array begins at an odd one."""
    return np.array([x.data.ptr + (x.dtype == bf16) for x in arrays], np.int64)


def _tables(layout: Layout) -> tuple[np.ndarray, np.ndarray, list]:
    """(tensors, chunks, parts) where a part is (its Work, first array, end, chunks)."""
    tensors = np.array(
        [(spot.begin, spot.size, spot.row, spot.place) for spot in layout.spots], np.int64
    ).reshape(-1, 4)
    counts = -(-tensors[:, 1] // CHUNK)
    ends = np.concatenate([[0], np.cumsum(counts)])
    owner = np.repeat(np.arange(len(tensors)), counts)
    chunks = np.stack([owner, np.arange(len(owner)) - ends[owner]], axis=1).astype(np.int32)
    parts = []
    for first in range(0, len(tensors), SOURCES):
        last = min(first + SOURCES, len(tensors))
        work = np.zeros((), _WORK)
        work["first_tensor"], work["first_chunk"] = first, ends[first]
        count = int(ends[last] - ends[first])
        if count:
            parts.append((work, first, last, count))
    return tensors, chunks, parts
