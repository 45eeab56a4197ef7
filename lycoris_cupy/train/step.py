"""One training step of an adapter: gradients of one or several pieces of a batch, over one or
several processes, and an optimizer's update.

On a GPU all of it is captured: one graph where nothing stands between gradients and update, else
one that adds gradients up, for each piece, and one that updates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ..arrays import Array, module_of, wide_dtype
from ..engine import Engine
from ..errors import LycorisError, ShapeError
from ..graph import Captured
from ..optim import Average, Optimizer, apply_max_norm
from ..optim.nested import Nested, items
from ..optim.running import Running
from .meter import Meter

Loss = Callable[..., tuple[Any, Array]]
Piece = tuple[list[Array], list[Array], dict[str, Any]]  # inputs, targets, conditions
_LOSS = "\0loss"  # beside the layers, whose names are texts that people give


class Reducer(Protocol):
    """Processes that each take a share of a batch. rank: of this one, from 0. device: its own."""

    rank: int
    size: int
    device: str

    def mean(self, array: Array) -> None:
        """Put the mean over all processes into the array, in place, in the stream's order."""
        ...


class Step:
    """Call it with a batch: (inputs, targets), tuples of arrays, and what the adapter reads beside
    them, such as noise_level, as `Engine.capture_step` takes it.

    accumulate: the batch is run in this many equal pieces along its first axis, and their gradients
    averaged: less memory, the same step for a loss that is a mean. reducer: of several processes,
    which all are given the whole batch, and each takes its share along the first axis. max_norm:
    see `apply_max_norm`. average: is updated after every step. Shapes may differ from batch to
    batch: each is captured once.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        loss: Loss,
        optimizer: Optimizer,
        *,
        accumulate: int = 1,
        reducer: Reducer | None = None,
        average: Average | None = None,
        max_norm: float | None = None,
    ):
        if accumulate < 1:
            raise LycorisError(f"accumulate is {accumulate}, expected at least 1")
        self.engine, self.name, self.loss, self.optimizer = engine, name, loss, optimizer
        self.accumulate, self.reducer = accumulate, reducer
        self.average, self.max_norm = average, max_norm
        self.rank, self.processes = (0, 1) if reducer is None else (reducer.rank, reducer.size)
        self.meter = Meter(engine.device)
        apart = accumulate > 1 or reducer is not None
        self._sums = _Sums(optimizer, self.meter, accumulate) if apart else None
        self.count = 0  # of steps that are done
        optimizer.measure_norm()
        self._captured: dict[tuple, Callable] = {}
        self._update: Captured | None = None

    def __call__(
        self,
        inputs: Sequence[Array],
        targets: Sequence[Array],
        conditions: Mapping[str, Any] | None = None,
    ) -> None:
        for i, piece in enumerate(self.pieces(inputs, targets, conditions)):
            if self._sums is not None:
                self._sums.draw.fill(self.draw(i))
            self._gather(*piece)
        if self._sums is not None:
            if self.reducer is not None:
                self.reducer.mean(self._sums.flat)
            if self._update is None:
                self._update = self._capture_update(self._sums)
            self.optimizer.prepare()
            self._update()
        if self.max_norm is not None:
            adapters = self.engine.attachments[self.name].adapters
            apply_max_norm(adapters, self.optimizer.masters, self.max_norm)
            self.engine.set_parameters(self.name, self.optimizer.masters)
        if self.average is not None:
            self.average.update(self.optimizer.masters)
        self.count += 1

    def draw(self, piece: int) -> int:
        """The number that dropout draws by: another one for every piece and process, from 1 on."""
        first = (self.count * self.processes + self.rank) * self.accumulate
        return (first + piece + 1) % 2**32

    def pieces(
        self,
        inputs: Sequence[Array],
        targets: Sequence[Array],
        conditions: Mapping[str, Any] | None = None,
    ) -> list[Piece]:
        """What this process runs of a batch, one after the other."""
        every = split(inputs, targets, self.processes * self.accumulate, conditions)
        return every[self.rank * self.accumulate : (self.rank + 1) * self.accumulate]

    def snapshot(self) -> tuple:
        """A copy of all that a step changes, for `restore`."""
        average = None if self.average is None else self.average.snapshot()
        return self.optimizer.snapshot(), average, self.meter.snapshot(), self.count

    def restore(self, kept: tuple) -> None:
        """Put a snapshot back, and the factors that belong to it into the engine."""
        optimizer, average, meter, self.count = kept
        self.optimizer.restore(optimizer)
        if self.average is not None:
            self.average.restore(average)
        self.meter.restore(meter)
        self.engine.set_parameters(self.name, self.optimizer.masters)

    def _gather(
        self, inputs: Sequence[Array], targets: Sequence[Array], conditions: dict[str, Any]
    ) -> None:
        levels = {name: x for name, x in conditions.items() if hasattr(x, "shape")}
        fixed = tuple((name, tuple(x)) for name, x in conditions.items() if name not in levels)
        arrays = (*inputs, *targets, *levels.values())
        key = (fixed, *((tuple(x.shape), str(x.dtype)) for x in arrays))
        if key not in self._captured:
            taker = self._sums or _Direct(self.optimizer, self.meter)
            self._captured[key] = self.engine.capture_step(
                self.name,
                self.meter.watched(self.loss),
                taker,
                *inputs,
                targets=targets,
                **conditions,
            )
        self._captured[key](*inputs, *targets, **levels)

    def _capture_update(self, sums: _Sums) -> Captured:
        def run() -> None:
            sums.update(self.engine.parameters(self.name))

        # Warming up takes steps; what they change is put back.
        kept, total = self.snapshot(), sums.flat.copy()
        try:
            self.optimizer.prepare()
            return Captured(run, [], self.engine.device, list)
        finally:
            self.restore(kept)
            sums.flat[...] = total


class _Direct:
    """In an optimizer's place: the update itself, with a look at the gradient."""

    def __init__(self, optimizer: Optimizer, meter: Meter):
        self._optimizer, self._meter = optimizer, meter

    def prepare(self) -> None:
        self._optimizer.prepare()

    def clock(self) -> Array:
        return self._optimizer.clock()

    def apply(self, grads: Nested, out: Nested) -> None:
        self._optimizer.apply(grads, out)
        self._meter.step(self._optimizer.grad_norm)

    def snapshot(self) -> tuple:
        return self._optimizer.snapshot(), self._meter.snapshot()

    def restore(self, kept: tuple) -> None:
        self._optimizer.restore(kept[0])
        self._meter.restore(kept[1])


class _Sums:
    """In an optimizer's place: adds gradients up, in one flat array that holds the loss too.

    So that one all-reduce carries all, and a value that is not finite stops every process.
    """

    def __init__(self, optimizer: Optimizer, meter: Meter, pieces: int):
        self._optimizer, self._meter, self._share = optimizer, meter, 1 / pieces
        first = next((p for _, _, p in items(optimizer.masters)), None)
        if first is None:
            raise LycorisError("the optimizer has no parameters: there is nothing to train")
        xp = module_of(first)
        self._loss = {_LOSS: {_LOSS: xp.zeros(1, wide_dtype(first.dtype))}}
        self._running = Running({**optimizer.masters, **self._loss})
        self.draw = xp.zeros(1, np.uint32)  # see Step.draw

    @property
    def flat(self) -> Array:
        return self._running.flat

    def prepare(self) -> None:
        pass

    def clock(self) -> Array:
        return self.draw

    def apply(self, grads: Nested, out: Nested) -> None:
        """Add a piece; no factor changes."""
        self._loss[_LOSS][_LOSS][...] = self._meter.loss
        self._meter.loss.fill(0)
        self._running.add({**grads, **self._loss}, self._share)

    def update(self, out: Nested) -> None:
        """The optimizer's update with the sums, which begin anew."""
        views = self._running.views
        self._optimizer.apply(views, out)
        self._meter.loss[...] = views[_LOSS][_LOSS]
        self._meter.step(self._optimizer.grad_norm)
        self._running.clear()

    def snapshot(self) -> Array:
        return self.flat.copy()

    def restore(self, kept: Array) -> None:
        self.flat[...] = kept
        self._meter.loss.fill(0)


def split(
    inputs: Sequence[Array],
    targets: Sequence[Array],
    count: int,
    conditions: Mapping[str, Any] | None = None,
) -> list[Piece]:
    """A batch in equal pieces along the first axis of all its arrays; conditions of one value, and
    those that are no arrays, are those of every piece.
    """
    conditions = {
        name: x if hasattr(x, "shape") or isinstance(x, (tuple, list)) else np.asarray([x])
        for name, x in (conditions or {}).items()
    }
    if count == 1:
        return [(list(inputs), list(targets), conditions)]
    cut = [x for x in conditions.values() if hasattr(x, "shape") and x.size > 1]
    for what, arrays in (("input", inputs), ("target", targets), ("condition", cut)):
        for i, x in enumerate(arrays):
            if not x.ndim or x.shape[0] % count:
                raise ShapeError(
                    f"{what} {i} of the batch has shape {tuple(x.shape)}: its first axis cannot be "
                    f"cut into {count} equal pieces"
                )
    cut = {n: x for n, x in conditions.items() if hasattr(x, "shape") and x.size > 1}
    return [
        (
            [_piece(x, i, count) for x in inputs],
            [_piece(x, i, count) for x in targets],
            {**conditions, **{n: _piece(x, i, count) for n, x in cut.items()}},
        )
        for i in range(count)
    ]


def _piece(x: Array, i: int, count: int) -> Array:
    size = x.shape[0] // count
    return x[i * size : (i + 1) * size]
