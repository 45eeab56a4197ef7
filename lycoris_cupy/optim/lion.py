"""Lion."""

from __future__ import annotations

import numpy as np

from ..arrays import Array
from .base import Optimizer, Rate, zeros_beside
from .nested import Nested
from .settings import shares


class Lion(Optimizer):
    """Evolved sign momentum.  Chen et al. 2023, arXiv 2302.06675, algorithm 2.

        p = p - lr * (sign(b1 m + (1 - b1) g) + weight_decay * p)
        m = b2 m + (1 - b2) g

    Every value moves by lr, so lr is three to ten times smaller than AdamW's, and weight_decay as
    much larger. parameters, lr, and rates, clip, seed: see Optimizer.
    """

    _kernel = "lion"

    def __init__(
        self,
        parameters: Nested,
        lr: Rate = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **common,
    ):
        self.betas = shares("betas", betas, 2)
        super().__init__(parameters, lr, weight_decay, **common)

    def _start(self, p: Array) -> tuple[Array, ...]:
        return zeros_beside(p, 1)

    def _numbers_of(self, lr: float, steps: int) -> tuple[float, ...]:
        return lr, 1 - lr * self.weight_decay

    def _update(self, p: Array, g: Array, slots: list[Array], numbers: list[Array]) -> None:
        b1, b2 = self.betas
        rate, left = numbers
        (m,) = slots
        p *= left
        p -= rate * np.sign(b1 * m + (1 - b1) * g)
        m += (1 - b2) * (g - m)

    def _arguments(self, slots: tuple[Array, ...]) -> tuple[tuple, tuple]:
        b1, b2 = self.betas
        return slots, (b1, 1 - b1, 1 - b2)
