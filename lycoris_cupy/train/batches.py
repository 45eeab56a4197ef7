"""Where a run's batches come from: a function of the step, or an iterable."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from ..arrays import Array
from ..errors import LycorisError

# Inputs, targets, and what the adapters read beside them, such as noise_level.
Batch = tuple[tuple[Array, ...], tuple[Array, ...], Mapping[str, Any]]
Given = Batch | tuple[tuple[Array, ...], tuple[Array, ...]]  # the last may be left out


class Batches:
    """Batches by the number of their step, in order; those since `mark` can be had again.

    rng: what the source draws from, if anything.
    """

    def __init__(
        self,
        source: Callable[[int], Given] | Iterable[Given],
        rng: np.random.Generator | None = None,
    ):
        self._function = source if callable(source) else None
        self._iterator = None if callable(source) else iter(source)
        self._rng, self._seen = rng, []
        self._first, self._taken = 0, 0
        self.mark(0)

    def __call__(self, step: int) -> Batch:
        if self._function is not None:
            return _checked(self._function(step), step)
        while self._taken <= step:
            self._seen.append(_checked(self._next(), self._taken))
            self._taken += 1
        return self._seen[step - self._first]

    def mark(self, step: int) -> None:
        """Batches from this step on may be asked for again, after `back`."""
        self._state = self.state()
        self._first, self._seen = step, []

    def back(self) -> None:
        """To the step of the last mark."""
        self.restore(self._state)

    def advance(self, steps: int) -> None:
        """Leave out the batches of so many steps from the beginning, of an iterable."""
        for _ in range(steps if self._function is None else 0):
            self._next()
            self._taken += 1

    def state(self) -> Any:
        """That of the random generator, for `restore`."""
        return None if self._rng is None else self._rng.bit_generator.state

    def restore(self, state: Any) -> None:
        """Put a state back."""
        if self._rng is not None and state is not None:
            self._rng.bit_generator.state = state

    def _next(self) -> Given:
        assert self._iterator is not None
        try:
            return next(self._iterator)
        except StopIteration:
            raise LycorisError(
                f"the batches end after {self._taken}: give a function of the step, or an iterable "
                "that goes on, such as itertools.cycle"
            ) from None


def _checked(batch: Any, step: int) -> Batch:
    known = isinstance(batch, (tuple, list)) and len(batch) in (2, 3)
    conditions = batch[2] if known and len(batch) == 3 else {}
    known = known and isinstance(conditions, Mapping)
    if not known or not all(isinstance(part, (tuple, list)) and len(part) for part in batch[:2]):
        raise LycorisError(
            f"the batch of step {step} is {type(batch).__name__}, expected a pair (inputs, "
            "targets) of tuples of arrays, such as ((x,), (target,)), and a dict of conditions "
            "behind them if the adapter reads any"
        )
    return batch[0], batch[1], conditions
