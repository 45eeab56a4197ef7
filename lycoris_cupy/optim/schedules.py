"""Learning rates as functions of the step, the first being 0, for an optimizer's `lr`.

The warm-up rises in a straight line: step i of `warmup` has (i + 1) / warmup of the rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ..errors import LycorisError

Schedule = Callable[[int], float]


def constant(lr: float, warmup: int = 0) -> Schedule:
    """lr from the end of the warm-up on."""
    return _schedule(lr, lr, None, warmup, lambda share: 0.0)


def linear(lr: float, steps: int, warmup: int = 0, end: float = 0.0) -> Schedule:
    """From lr after the warm-up in a straight line to `end` at step `steps`; then `end`."""
    return _schedule(lr, end, steps, warmup, lambda share: share)


def cosine(lr: float, steps: int, warmup: int = 0, end: float = 0.0) -> Schedule:
    """From lr after the warm-up to `end` at step `steps` along half a cosine.  Loshchilov & Hutter
    2017, equation 5, without restarts.
    """
    return _schedule(lr, end, steps, warmup, lambda share: (1 - math.cos(math.pi * share)) / 2)


def _schedule(
    lr: float, end: float, steps: int | None, warmup: int, way: Callable[[float], float]
) -> Schedule:
    for name, value in (("lr", lr), ("end", end), ("warmup", warmup)):
        if not 0 <= value < math.inf:
            raise LycorisError(f"{name} is {value}, expected at least 0")
    if steps is not None and not steps > warmup:
        raise LycorisError(f"steps is {steps}, expected more than the warm-up of {warmup}")

    def rate(step: int) -> float:
        if step < warmup:
            return lr * (step + 1) / warmup
        share = 0.0 if steps is None else min((step - warmup) / (steps - warmup), 1.0)
        return lr + (end - lr) * way(share)

    return rate
