"""A captured forward: a CUDA graph with fixed input buffers and a memory pool of its own, replayed
without Python.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .arrays import Array, device_context
from .errors import ShapeError


def capture(engine, inputs: Sequence[Array]) -> Callable[..., Any]:
    """See Engine.capture. The returned callable's result lives in the graph's memory: the next call
    writes over it.
    """
    shapes = [tuple(x.shape) for x in inputs]

    def check(given):
        if [tuple(x.shape) for x in given] != shapes:
            raise ShapeError(
                f"captured for inputs of shapes {shapes}, called with "
                f"{[tuple(x.shape) for x in given]}"
            )
        return given

    if engine.device == "cpu":
        return lambda *given: engine.forward(*check(engine._inputs(given)))

    import cupy

    buffers = [x.copy() for x in inputs]
    # Blocks that the graph writes must never be handed to anybody else, so they come from a pool
    # that the graph keeps. The warm-up compiles kernels, picks cuBLASLt's algorithms and fills the
    # pool: a capture cannot allocate anew.
    pool = cupy.cuda.MemoryPool()
    stream = cupy.cuda.Stream(non_blocking=True)
    stream.wait_event(cupy.cuda.get_current_stream().record())
    with stream, cupy.cuda.using_allocator(pool.malloc):
        for _ in range(2):
            engine.forward(*buffers)
        stream.synchronize()
        stream.begin_capture(cupy.cuda.runtime.streamCaptureModeThreadLocal)
        try:
            result = engine.forward(*buffers)
        finally:
            graph = stream.end_capture()

    def replay(*given):
        with device_context(engine.device):
            for buffer, x in zip(buffers, check(engine._inputs(given)), strict=True):
                buffer[...] = x
            graph.launch(cupy.cuda.get_current_stream())
        return result

    replay.graph, replay.pool = graph, pool
    return replay
