"""Device time of a torch call, measured as the project's own is: replays of a CUDA graph, by
events, the L2 cache flushed before each.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import torch

FLUSH_BYTES = 256 << 20
REPEATS = 20


def measure(run: Callable, device: str) -> dict:
    """{'us', 'timed'}: 'graph' where the call could be captured; else 'kernels', the sum of its
    kernels' times in a profile (gaps left out, in the peer's favour), and why. On the CPU 'wall'.
    """
    if device == "cpu":
        return {"us": _wall_us(run), "timed": "wall"}
    why = _synchronises(run)
    if not why:
        try:
            return {"us": device_us(captured(run)), "timed": "graph"}
        except Exception as error:  # something else that a capture does not allow
            why = _line(error)
            torch.cuda.synchronize()
    try:
        return {"us": _kernels_us(run), "timed": "kernels", "not_captured": why}
    except Exception as error:  # no profiler on this machine: gaps between kernels are counted
        return {"us": device_us(run), "timed": "events", "not_captured": f"{why}; {_line(error)}"}


def _synchronises(run: Callable) -> str:
    """Why the call cannot be captured, in a line; empty if it can. Asked before, since a capture
    that fails spoils the process for what follows.
    """
    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        return _line(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def captured(run: Callable) -> Callable:
    """run's work as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay(keep=kept):
        graph.replay()

    return replay


def device_us(run: Callable) -> float:
    """Median device microseconds of one call."""
    buffer = _flush_buffer()  # read, as the project's side does
    starts, stops = (
        [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS)] for _ in range(2)
    )
    for _ in range(3):
        run()
    for start, stop in zip(starts, stops, strict=True):
        buffer.sum()
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in zip(starts, stops, strict=True)) * 1e3


@functools.cache
def _flush_buffer():
    return torch.zeros(FLUSH_BYTES // 4, dtype=torch.float32, device="cuda")


def _kernels_us(run: Callable, repeats: int = 5) -> float:
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    total = sum(event.self_device_time_total for event in found.key_averages())
    if not total:
        raise RuntimeError("the profiler saw no kernel")
    return total / repeats


def _wall_us(run: Callable, seconds: float = 0.03) -> float:
    start = time.perf_counter()
    run()
    repeats = max(3, min(200, int(seconds / max(time.perf_counter() - start, 1e-6))))
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats * 1e6


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
