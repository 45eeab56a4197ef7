"""Captured work: a CUDA graph with fixed input buffers and a memory pool of its own, replayed
without Python.

A forward, or a whole training step. All that changes between replays lies in arrays that stay where
they are: inputs, factors, strengths, an optimizer's state and its numbers for this step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from .arrays import Array, device_context, to_device
from .errors import LycorisError, ShapeError


class Captured:
    """Call it with inputs of the captured shapes; the result is written over by the next call.

    inputs: the buffers that the work reads. One that is given itself, or left out with all the
    others, is taken as it is: write into it instead of having it copied. On the CPU there is
    nothing to capture, and the work runs as it is.
    """

    def __init__(self, run: Callable[..., Any], inputs: Sequence[Array], device: str, convert):
        self._run, self._device, self._convert = run, device, convert
        self._shapes = [tuple(x.shape) for x in inputs]
        self.inputs = list(inputs)
        self.graph = None
        if device != "cpu":
            self._record()

    def __call__(self, *given: Array) -> Any:
        with device_context(self._device):
            arrays = self._checked(given) if given else self.inputs
            if self.graph is None:
                return self._run(*arrays)
            for buffer, x in zip(self.inputs, arrays, strict=True):
                if x is not buffer:
                    self._fill(buffer, x)
            import cupy

            self.graph.launch(cupy.cuda.get_current_stream())
        return self.result

    def _checked(self, given: Sequence[Array]) -> Sequence[Array]:
        same = len(given) == len(self.inputs) and all(
            x is b for x, b in zip(given, self.inputs, strict=True)
        )
        if same:
            return given
        arrays = self._convert(given)
        if [tuple(x.shape) for x in arrays] != self._shapes:
            raise ShapeError(
                f"captured for inputs of shapes {self._shapes}, called with "
                f"{[tuple(x.shape) for x in arrays]}"
            )
        return [x.astype(b.dtype, copy=False) for x, b in zip(arrays, self.inputs, strict=True)]

    def _fill(self, buffer: Array, x: Array) -> None:
        import cupy

        # An assignment would look for a kernel first, which takes longer than a small layer.
        buffer.data.copy_from_device_async(x.data, buffer.nbytes, cupy.cuda.get_current_stream())

    def _record(self) -> None:
        import cupy

        self.inputs = [x.copy() for x in self.inputs]
        # Blocks that the graph writes must never be handed to anybody else, so they come from a
        # pool that the graph keeps. The warm-up compiles kernels, picks cuBLASLt's algorithms and
        # fills the pool. The stream is kept too: its workspace is the graph's.
        self.pool = cupy.cuda.MemoryPool()
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.stream.wait_event(cupy.cuda.get_current_stream().record())
        with self.stream, cupy.cuda.using_allocator(self.pool.malloc):
            for _ in range(2):
                self._run(*self.inputs)
            self.stream.synchronize()
            # Relaxed, as the pool may be cut so that one block more is needed.
            self.stream.begin_capture(cupy.cuda.runtime.streamCaptureModeRelaxed)
            try:
                self.result = self._run(*self.inputs)
            except BaseException:
                # The first error is the cause; a capture that it broke cannot be ended cleanly.
                with contextlib.suppress(cupy.cuda.runtime.CUDARuntimeError):
                    self.stream.end_capture()
                raise
            self.graph = self.stream.end_capture()


def capture(engine, inputs: Sequence, conditions: Mapping[str, Any]) -> Callable[..., Any]:
    """See Engine.capture."""
    levels, fixed = _split(engine._conditions(conditions))

    def run(*arrays: Array) -> Any:
        end = len(arrays) - len(levels)
        return engine.forward(*arrays[:end], **_named(levels, arrays[end:]), **fixed)

    def convert(given: Sequence) -> list[Array]:
        end = len(given) - len(levels)
        told = engine._conditions(_named(levels, given[end:]))
        return [*engine._inputs(given[:end]), *told.values()]

    made = Captured(run, convert([*inputs, *levels.values()]), engine.device, convert)
    if not conditions:
        return made

    def replay(*given: Array, **told: Array) -> Any:
        return made(*given, *_in_order(told, levels))

    return replay


def capture_step(
    engine, name: str, loss, optimizer, inputs: Sequence, targets, conditions: Mapping[str, Any]
) -> Callable[..., Array]:
    """See Engine.capture_step. Arrays of conditions are given anew at every step."""
    count, end, factors = len(inputs), len(inputs) + len(targets), engine.parameters(name)
    if "step" in conditions:
        raise LycorisError("capture_step: the step is the optimizer's own, leave it out")
    levels, fixed = _split(engine._conditions(conditions))

    # What is dropped is drawn from the step's number, which stays on the device.
    if any(attached.dropout for attached in engine.attachments.values()):
        fixed["step"] = optimizer.clock()

    def run(*arrays: Array) -> Array:
        y, pullback = engine.vjp(*arrays[:count], **_named(levels, arrays[end:]), **fixed)
        value, dy = loss(y, *arrays[count:end])
        _, grads = pullback(dy)
        optimizer.apply(grads[name], out=factors)
        return value

    def convert(given: Sequence) -> list[Array]:
        # Targets are the loss's own affair: they keep their dtype.
        rest = (to_device(target, engine.device) for target in given[count:end])
        told = engine._conditions(_named(levels, given[end:]))
        return [*engine._inputs(given[:count]), *rest, *told.values()]

    # Warming up takes steps; what they change is put back, also if the capture fails.
    before = {layer: {n: v.copy() for n, v in p.items()} for layer, p in factors.items()}
    kept = optimizer.snapshot()
    try:
        optimizer.prepare()
        first = convert([*inputs, *targets, *levels.values()])
        made = Captured(run, first, engine.device, convert)
    finally:
        optimizer.restore(kept)
        engine.set_parameters(name, before)

    def step(*given: Array, **told: Array) -> Array:
        arrays = _in_order(told, levels if given else ())
        with device_context(engine.device):
            optimizer.prepare()
        return made(*given, *arrays)

    step.captured = made
    return step


def _split(conditions: Mapping[str, Any]) -> tuple[dict[str, Array], dict[str, Any]]:
    """(arrays, which are inputs of the graph; what stays as it is), of checked conditions."""
    levels = {name: value for name, value in conditions.items() if hasattr(value, "dtype")}
    return levels, {name: value for name, value in conditions.items() if name not in levels}


def _named(names: Iterable[str], arrays: Sequence[Array]) -> dict[str, Array]:
    return dict(zip(names, arrays, strict=True))


def _in_order(told: Mapping[str, Array], names: Collection[str]) -> list[Array]:
    """Arrays told by name, in the order of the names they were captured with."""
    if set(told) != set(names):
        raise LycorisError(
            f"captured with {', '.join(names) or 'no arrays'}, called with "
            f"{', '.join(told) or 'none'}"
        )
    return [told[name] for name in names]
