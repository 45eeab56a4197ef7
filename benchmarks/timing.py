"""Time on a GPU: of replays of a captured graph, by events, with the L2 cache flushed before each;
and wall time of eager calls.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def captured(run: Callable[[], object]) -> Callable[[], None]:
    """run's work as a CUDA graph with a memory pool of its own: no host time is measured."""
    import cupy

    pool = cupy.cuda.MemoryPool()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream, cupy.cuda.using_allocator(pool.malloc):
        run()
        run()
        stream.synchronize()
        stream.begin_capture(cupy.cuda.runtime.streamCaptureModeThreadLocal)
        kept = run()
        graph = stream.end_capture()

    def replay(keep=(kept, pool)):
        graph.launch(cupy.cuda.get_current_stream())

    return replay


def device_us(run: Callable[[], object], repeats: int = 20) -> float:
    """Median device microseconds of one call, L2 flushed before each."""
    import cupy

    flush = cupy.empty(256 << 20, cupy.uint8)
    starts, stops = ([cupy.cuda.Event() for _ in range(repeats)] for _ in range(2))
    for _ in range(3):
        run()
    for start, stop in zip(starts, stops, strict=True):
        flush.fill(0)
        start.record()
        run()
        stop.record()
    cupy.cuda.get_current_stream().synchronize()
    spans = (cupy.cuda.get_elapsed_time(a, b) for a, b in zip(starts, stops, strict=True))
    return statistics.median(spans) * 1e3


def wall_us(run: Callable[[], object], repeats: int = 20) -> float:
    """Wall microseconds a call, many in a row, the device's end awaited once."""
    import cupy

    run()
    cupy.cuda.Device().synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    cupy.cuda.Device().synchronize()
    return (time.perf_counter() - start) / repeats * 1e6
