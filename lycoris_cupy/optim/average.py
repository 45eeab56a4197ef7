"""The exponential moving average of an adapter."""

from __future__ import annotations

from .nested import Nested, Own, require_gradients
from .running import Running
from .settings import shares


class Average:
    """average = decay * average + (1 - decay) * value, after every step, from the first values.

    masters: an optimizer's, or an engine's parameters; they are copied in the wide dtype. warmup:
    begin with the decay (1 + t) / (10 + t), t = 1, 2, ..., as long as that is smaller, so that the
    first values are forgotten. `values` is what to evaluate or save.
    """

    def __init__(self, masters: Nested, decay: float = 0.999, warmup: bool = False):
        (self.decay,) = shares("decay", (decay,), 1)
        self.warmup, self._updates = warmup, 0
        self._running = Running(masters)
        self._running.fill(masters)
        self.values: Own = self._running.views

    def update(self, masters: Nested) -> None:
        """Take the values of a step in: one launch for 480 factors."""
        require_gradients(masters, self.values, "value")
        self._updates += 1
        early = (1 + self._updates) / (10 + self._updates)
        decay = min(self.decay, early) if self.warmup else self.decay
        self._running.approach(masters, 1 - decay)

    def snapshot(self) -> tuple:
        """A copy of all that an update changes, for `restore`."""
        return self._updates, self._running.copies()

    def restore(self, kept: tuple) -> None:
        """Put a snapshot back into the same arrays."""
        self._updates, copies = kept
        self._running.fill(copies)
