"""Counters for the blocks of one launch, which wait for each other by them or learn who is last.

Zeros before and after every launch, so that nothing has to be cleared in between.
"""

from __future__ import annotations

from ..arrays import Array

COUNTERS = 1 << 11

_kept: dict[tuple[int, int], Array] = {}


def counters() -> Array:
    """(COUNTERS,) uint32 zeros of the current stream, whose kernels run one after the other.

    As with cuBLASLt's workspace, a graph must not run at the same time as another one that was
    captured on the same stream.
    """
    import cupy

    stream = cupy.cuda.get_current_stream().ptr
    key = cupy.cuda.runtime.getDevice(), stream
    found = _kept.get(key)
    if found is None:
        found = cupy.zeros(COUNTERS, "uint32")
        if not cupy.cuda.runtime.streamIsCapturing(stream):  # else zeros only when replayed
            _kept[key] = found
    return found
