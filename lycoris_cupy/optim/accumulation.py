"""One gradient from several backward passes."""

from __future__ import annotations

from ..arrays import module_of, wide_dtype
from ..errors import LycorisError
from .nested import Nested, Own, mapped, require_gradients


class Accumulator:
    """The weighted mean of gradients, in the wide dtype: a large batch in pieces.

        for x, target in pieces:
            ...
            accumulator.add(grads["style"], weight=len(x))
        optimizer.step(accumulator.mean())

    parameters: the arrays whose gradients are added, for their shapes.
    """

    def __init__(self, parameters: Nested):
        self._sums = mapped(lambda p: module_of(p).zeros(p.shape, wide_dtype(p.dtype)), parameters)
        self.weight = 0.0

    def add(self, grads: Nested, weight: float = 1.0) -> None:
        """weight: how much this pass counts, such as its number of samples if its loss is a mean.
        Raises MatchError or ShapeError before anything is changed.
        """
        require_gradients(grads, self._sums)
        if not 0 < weight < float("inf"):
            raise LycorisError(f"weight is {weight}, expected a number above 0")
        for layer, factors in self._sums.items():
            for name, total in factors.items():
                total += weight * grads[layer][name].astype(total.dtype, copy=False)
        self.weight += weight

    def mean(self) -> Own:
        """The mean of what was added, in new arrays; the accumulator is empty again."""
        if not self.weight:
            raise LycorisError("nothing was added to the accumulator: there is no mean")
        out = mapped(lambda total: total * (1 / self.weight), self._sums)
        for factors in self._sums.values():
            for total in factors.values():
                total.fill(0)
        self.weight = 0.0
        return out
