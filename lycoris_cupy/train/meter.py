"""What a run tells of itself, summed on the device, so that no step waits to be looked at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..arrays import Array, device_context, to_device

# Places in the sums, f64: exact as counts, and a mean of many losses loses nothing.
_STEPS, _LOSS, _NORM, _ALL, _BAD = range(5)


class Reading(NamedTuple):
    """Means over the steps since the last reading. bad: the first step, counted from 0, whose loss
    or gradient was not finite; None if all were.
    """

    steps: int
    loss: float
    grad_norm: float
    bad: int | None


class Meter:
    """Sums of losses and gradient norms, and the first step at which one was not finite.

    All is arrays on the device: made to be captured.
    """

    def __init__(self, device: str):
        with device_context(device):
            self._sums = to_device(np.zeros(5), device)
            self.loss = to_device(np.zeros(1), device)  # of the step that is being made
        self.clear()
        self._sums[_ALL] = 0

    def watched(self, loss: Callable[..., tuple[Any, Array]]) -> Callable[..., tuple[Any, Array]]:
        """The loss, that leaves its value here when it is called."""

        def run(y: Array, *targets: Array):
            value, dy = loss(y, *targets)
            self.loss += value
            return value, dy

        return run

    def step(self, norm: Array) -> None:
        """Take a step in: the loss since the last one, and the norm of its gradient, (1,)."""
        sums, loss = self._sums, self.loss
        fine = (abs(loss) < np.inf) & (norm < np.inf)  # of a NaN neither is
        seen = sums[_BAD : _BAD + 1]
        now = sums[_ALL : _ALL + 1]
        # -1 as long as all is well, then the step; where both are arrays there is no branch.
        seen += (seen < 0) * ~fine * (now + 1)
        sums[_STEPS : _STEPS + 1] += 1
        sums[_LOSS : _LOSS + 1] += loss
        sums[_NORM : _NORM + 1] += norm
        now += 1
        loss.fill(0)

    def look(self) -> Reading:
        """The means so far; waits for the device."""
        steps, loss, norm, _, bad = (float(value) for value in to_device(self._sums, "cpu"))
        count = max(int(steps), 1)
        return Reading(int(steps), loss / count, norm / count, None if bad < 0 else int(bad))

    def clear(self) -> None:
        """Begin new means."""
        self._sums[: _NORM + 1] = 0
        self._sums[_BAD] = -1

    def snapshot(self) -> Array:
        """A copy of the sums, for `restore`."""
        return self._sums.copy()

    def restore(self, kept: Array) -> None:
        """Put a snapshot back into the same array."""
        self._sums[...] = kept
        self.loss.fill(0)
