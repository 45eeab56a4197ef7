"""The exponential moving average of an adapter."""

from __future__ import annotations

from ..arrays import wide_dtype
from .base import shares
from .nested import Nested, items, mapped, require_gradients


class Average:
    """average = decay * average + (1 - decay) * value, after every step, from the first values.

    masters: an optimizer's, or an engine's parameters; they are copied in the wide dtype. warmup:
    begin with the decay (1 + t) / (10 + t), t = 1, 2, ..., as long as that is smaller, so that the
    first values are forgotten. `values` is what to evaluate or save.
    """

    def __init__(self, masters: Nested, decay: float = 0.999, warmup: bool = False):
        (self.decay,) = shares("decay", (decay,), 1)
        self.warmup, self._updates = warmup, 0
        self.values = mapped(lambda p: p.astype(wide_dtype(p.dtype)), masters)

    def update(self, masters: Nested) -> None:
        """Take the values of a step in."""
        require_gradients(masters, self.values, "value")
        self._updates += 1
        early = (1 + self._updates) / (10 + self._updates)
        decay = min(self.decay, early) if self.warmup else self.decay
        for layer, name, value in items(self.values):
            value += (1 - decay) * (masters[layer][name].astype(value.dtype, copy=False) - value)

    def snapshot(self) -> tuple:
        """A copy of all that an update changes, for `restore`."""
        return self._updates, mapped(lambda value: value.copy(), self.values)

    def restore(self, kept: tuple) -> None:
        """Put a snapshot back into the same arrays."""
        self._updates, copies = kept
        for layer, name, value in items(self.values):
            value[...] = copies[layer][name]
