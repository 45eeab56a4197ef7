"""AdamW."""

from __future__ import annotations

import numpy as np

from ..arrays import Array
from .base import Optimizer, Rate, zeros_beside
from .nested import Nested
from .settings import not_negative, shares


class AdamW(Optimizer):
    """Adam with decoupled weight decay.  Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2.

        m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
        p = p - lr * (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay * p)

    parameters, lr, and rates, clip, seed: see Optimizer.
    """

    _kernel = "adamw"

    def __init__(
        self,
        parameters: Nested,
        lr: Rate = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        **common,
    ):
        self.betas, self.eps = shares("betas", betas, 2), eps
        not_negative(eps=eps)
        super().__init__(parameters, lr, weight_decay, **common)

    def _start(self, p: Array) -> tuple[Array, ...]:
        return zeros_beside(p, 2)

    def _numbers_of(self, lr: float, steps: int) -> tuple[float, ...]:
        b1, b2 = self.betas
        # Both corrections go into the step size and eps: the same formula, two passes fewer.
        root = (1 - b2**steps) ** 0.5
        return lr * root / (1 - b1**steps), self.eps * root, 1 - lr * self.weight_decay

    def _update(self, p: Array, g: Array, slots: list[Array], numbers: list[Array]) -> None:
        b1, b2 = self.betas
        rate, eps, left = numbers
        m, v = slots
        m += (1 - b1) * (g - m)
        v += (1 - b2) * (g * g - v)
        p *= left
        p -= rate * m / (np.sqrt(v) + eps)

    def _arguments(self, slots: tuple[Array, ...]) -> tuple[tuple, tuple]:
        b1, b2 = self.betas
        return slots, (1 - b1, 1 - b2)
