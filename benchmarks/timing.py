"""Time and memory of a call: device time of replays of a captured graph, by events, wall time, and
the high-water mark of what it allocates.
"""

from __future__ import annotations

import functools
import statistics
import time
import tracemalloc
from collections.abc import Callable, Sequence

import numpy as np

from lycoris_cupy import bf16, to_device

FLUSH_BYTES = 256 << 20  # several times the L2 cache of any GPU so far
COPY_BYTES = 1 << 30
Run = Callable[[], object]


def captured(run: Run) -> Run:
    """run's work as a CUDA graph with a memory pool of its own: no host time is measured."""
    import cupy

    pool = cupy.cuda.MemoryPool()
    stream = _capture_stream()
    stream.wait_event(cupy.cuda.get_current_stream().record())
    with stream, cupy.cuda.using_allocator(pool.malloc):
        run()
        run()
        stream.synchronize()
        stream.begin_capture(cupy.cuda.runtime.streamCaptureModeThreadLocal)
        try:
            kept = run()
        finally:
            graph = stream.end_capture()

    def replay(keep=(kept, pool)):
        graph.launch(cupy.cuda.get_current_stream())
        return keep[0]

    return replay


@functools.cache
def _capture_stream():
    # One for all captures: cuBLASLt keeps a workspace for every stream that it has seen.
    import cupy

    return cupy.cuda.Stream(non_blocking=True)


def device_us(run: Run, repeats: int = 20, *, flush: bool = True) -> float:
    """Median device microseconds of one call.

    flush: the L2 cache is full of something else before each. The host runs ahead: the flush before
    each call, or many before all of them, take longer than it takes to launch a graph.
    """
    if flush:
        return in_turns_us([run], repeats)[0]
    for _ in range(3):
        run()
    for _ in range(20):
        flush_cache()
    run()  # what it reads is in the cache again
    return _median_us([_span(run) for _ in range(repeats)])


def in_turns_us(runs: Sequence[Run], repeats: int = 20) -> list[float]:
    """device_us of each, one call of each after another: a card that is out of power lowers its
    clock by a tenth, for all of them alike.
    """
    spans: list[list] = [[] for _ in runs]
    for run in runs:
        for _ in range(3):
            run()
    for _ in range(repeats):
        for run, of in zip(runs, spans, strict=True):
            flush_cache()
            of.append(_span(run))
    return [_median_us(of) for of in spans]


def _span(run: Run) -> tuple:
    """The events around a call."""
    import cupy

    start, stop = cupy.cuda.Event(), cupy.cuda.Event()
    start.record()
    run()
    stop.record()
    return start, stop


def _median_us(spans) -> float:
    import cupy

    cupy.cuda.get_current_stream().synchronize()
    return statistics.median(cupy.cuda.get_elapsed_time(*span) for span in spans) * 1e3


def flush_cache() -> None:
    """Fill the L2 cache, by reading: what was written would have to go to memory first when the
    next kernel reads, 10 us for 28 MB, which no layer's cost is.
    """
    buffer, total = _flush_buffer()
    buffer.sum(out=total)


@functools.cache
def _flush_buffer():
    import cupy

    return cupy.zeros(FLUSH_BYTES // 4, cupy.float32), cupy.empty((), cupy.float32)


def wall_us(run: Run, gpu: bool, seconds: float = 0.03, most: int = 2000) -> float:
    """Wall microseconds a call, many in a row, the device's end awaited once."""
    synchronize(gpu)
    start = time.perf_counter()
    run()
    synchronize(gpu)
    repeats = max(3, min(most, int(seconds / max(time.perf_counter() - start, 1e-7))))
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize(gpu)
    return (time.perf_counter() - start) / repeats * 1e6


def synchronize(gpu: bool) -> None:
    if gpu:
        import cupy

        cupy.cuda.get_current_stream().synchronize()


def peak_bytes(run: Run, gpu: bool) -> int:
    """The most bytes that run holds at once beyond what was there, its result included.

    From CuPy's pool on a GPU, from tracemalloc (which NumPy reports to) on the CPU.
    """
    run()  # what stays for good (cuBLASLt's workspace, compiled kernels) is not the call's
    if gpu:
        peak = _pool_peak()
        with peak:
            kept = run()
        del kept
        return peak.most
    tracemalloc.start()
    try:
        kept = run()
        most = tracemalloc.get_traced_memory()[1]
        del kept
        return most
    finally:
        tracemalloc.stop()


def _pool_peak():
    import cupy

    class Peak(cupy.cuda.MemoryHook):
        """Bytes taken from the pool and not given back while the hook is on."""

        name = "peak of used bytes"

        def __init__(self):
            self.most = self._used = 0
            self._sizes = {}

        def malloc_postprocess(self, **of):
            self._sizes[of["pmem_id"], of["mem_ptr"]] = of["mem_size"]
            self._used += of["mem_size"]
            self.most = max(self.most, self._used)

        def free_postprocess(self, **of):
            self._used -= self._sizes.pop((of["pmem_id"], of["mem_ptr"]), 0)

    return Peak()


def ceilings() -> dict[str, float]:
    """What this GPU reaches: GB/s of a device-to-device copy, read and written counted, and TFLOP/s
    of an 8192^3 product of random bf16 by cuBLASLt.
    """
    from lycoris_cupy.gemm import gemm

    n = 8192
    a = np.random.default_rng(0).standard_normal((n, n), np.float32).astype(bf16)
    a = to_device(a, "cuda:0")
    product = device_us(captured(lambda: gemm(a, a)), 10)
    copied = _copy_us()
    return {"copy_gb_s": 2 * COPY_BYTES / copied / 1e3, "product_tflop_s": 2 * n**3 / product / 1e6}


def _copy_us() -> float:
    import cupy

    runtime = cupy.cuda.runtime
    source, target = (cupy.empty(COPY_BYTES, cupy.uint8) for _ in range(2))

    def copy():
        stream = cupy.cuda.get_current_stream().ptr
        kind = runtime.memcpyDeviceToDevice
        runtime.memcpyAsync(target.data.ptr, source.data.ptr, COPY_BYTES, kind, stream)

    return device_us(copy, 10)
