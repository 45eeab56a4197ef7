"""One gradient from several backward passes."""

from __future__ import annotations

from ..errors import LycorisError
from .nested import Nested, Own, require_gradients
from .running import Running


class Accumulator:
    """The weighted mean of gradients, in the wide dtype: a large batch in pieces.

        for x, target in pieces:
            ...
            accumulator.add(grads["style"], weight=len(x))
        optimizer.step(accumulator.mean())

    parameters: the arrays whose gradients are added, for their shapes.
    """

    def __init__(self, parameters: Nested):
        self._sums = Running(parameters)
        self.weight = 0.0

    def add(self, grads: Nested, weight: float = 1.0) -> None:
        """weight: how much this pass counts, such as its number of samples if its loss is a mean.
        Raises MatchError or ShapeError before anything is changed.
        """
        require_gradients(grads, self._sums.views)
        if not 0 < weight < float("inf"):
            raise LycorisError(f"weight is {weight}, expected a number above 0")
        self._sums.add(grads, weight)
        self.weight += weight

    def mean(self) -> Own:
        """The mean of what was added, in new arrays; the accumulator is empty again."""
        if not self.weight:
            raise LycorisError("nothing was added to the accumulator: there is no mean")
        out = self._sums.copies(1 / self.weight)
        self._sums.clear()
        self.weight = 0.0
        return out
