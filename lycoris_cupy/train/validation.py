"""Validation by the loss itself, on batches that never change."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..arrays import to_device
from ..engine import Engine
from .batches import Batch
from .step import Loss


def mean_loss(loss: Loss, batches: Sequence[Batch]) -> Callable[[Engine], float]:
    """For `fit`: engine -> the mean of the loss over these batches."""

    def validate(engine: Engine) -> float:
        total = 0.0
        for inputs, targets in batches:
            y = engine.forward(*inputs)
            value, _ = loss(y, *(to_device(target, engine.device) for target in targets))
            total = total + value
        return float(total) / len(batches)

    return validate
