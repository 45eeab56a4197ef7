"""How a run has gone so far, as far as the loop itself has to know; checkpoints keep it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Course:
    """seconds: spent in all. best: the lowest validation, and after how many steps. stale:
    validations since then. batches: the state of what batches draw from.
    """

    seconds: float = 0.0
    best: tuple[float, int] | None = None
    stale: int = 0
    batches: Any = None

    def take(self, value: float, done: int) -> bool:
        """Take a validation in; whether it is the best so far. NaN never is."""
        if value < (float("inf") if self.best is None else self.best[0]):
            self.best, self.stale = (value, done), 0
        else:
            self.stale += 1
        return self.stale == 0

    def goes_on(self, done: int, steps: int, patience: int | None) -> bool:
        """Whether another step is to be made."""
        return done < steps and (patience is None or self.stale < patience)
