"""Lion."""

from __future__ import annotations

from ..arrays import Array, module_of
from .base import Optimizer, Rate, shares, zeros_beside
from .nested import Nested


class Lion(Optimizer):
    """Evolved sign momentum.  Chen et al. 2023, arXiv 2302.06675, algorithm 2.

        p = p - lr * (sign(b1 m + (1 - b1) g) + weight_decay * p)
        m = b2 m + (1 - b2) g

    Every value moves by lr, so lr is three to ten times smaller than AdamW's, and weight_decay as
    much larger. parameters, lr, and rates, clip, seed: see Optimizer.
    """

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

    def _update(self, p: Array, g: Array, slots: tuple, numbers: list[Array]) -> None:
        b1, b2 = self.betas
        rate, left = numbers
        (m,) = slots
        p *= left
        p -= rate * module_of(p).sign(b1 * m + (1 - b1) * g)
        m += (1 - b2) * (g - m)
