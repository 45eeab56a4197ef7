"""Validation by the loss itself, on batches that never change."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..arrays import to_device
from ..engine import Engine
from .batches import Batches, Given
from .step import Loss


def mean_loss(loss: Loss, batches: Sequence[Given]) -> Callable[[Engine], float]:
    """For `fit`: engine -> the mean of the loss over these batches."""

    def validate(engine: Engine) -> float:
        total = 0.0
        for inputs, targets, conditions in map(Batches(batches), range(len(batches))):
            y = engine.forward(*inputs, **conditions)
            value, _ = loss(y, *(to_device(target, engine.device) for target in targets))
            total = total + value
        return float(total) / len(batches)

    return validate
