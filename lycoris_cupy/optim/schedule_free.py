"""Schedule-free AdamW."""

from __future__ import annotations

import numpy as np

from ..arrays import Array
from .base import Optimizer, Rate, zeros_beside
from .nested import Nested, Own
from .settings import not_negative, shares


class ScheduleFreeAdamW(Optimizer):
    """AdamW that averages instead of lowering its rate.  Defazio et al. 2024, arXiv 2405.15682,
    algorithm 1.

        y = (1 - b1) z + b1 x                    where gradients are taken
        v = b2 v + (1 - b2) g^2
        z = z - lr * (g / (sqrt(v / (1 - b2^t)) + eps) + weight_decay * y)
        x = (1 - c) x + c z                      c = lr^2 / (sum of lr^2 so far)

    Train with the masters, which are y: that is what `step` returns. Evaluate and save with
    `averaged`, which is x. lr: a constant, best after a warm-up. parameters, lr, and rates, clip,
    seed: see Optimizer; with `seed` y alone is bf16, z and x are f32.
    """

    _kernel = "schedule_free"

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
        self._share = 0.0
        super().__init__(parameters, lr, weight_decay, **common)
        self._counts["weights"] = 0.0

    @property
    def averaged(self) -> Own:
        """The weights to evaluate and to save: the arrays themselves, wide."""
        return self._nested(lambda group: group.slots[2])

    def _start(self, p: Array) -> tuple[Array, ...]:
        return (*zeros_beside(p, 1), p.copy(), p)

    def _count(self, lr: float) -> None:
        self._counts["weights"] += lr * lr
        # Steps of rate 0 at the very beginning weigh nothing.
        self._share = lr * lr / self._counts["weights"] if lr else 0.0

    def _numbers_of(self, lr: float, steps: int) -> tuple[float, ...]:
        root = (1 - self.betas[1] ** steps) ** 0.5
        return lr * root, self.eps * root, lr * self.weight_decay, self._share

    def _update(self, p: Array, g: Array, slots: list[Array], numbers: list[Array]) -> None:
        b1, b2 = self.betas
        rate, eps, decay, share = numbers
        v, z, x = slots
        v += (1 - b2) * (g * g - v)
        z -= rate * g / (np.sqrt(v) + eps) + decay * p
        x += share * (z - x)
        p[...] = z + b1 * (x - z)

    def _arguments(self, slots: tuple[Array, ...]) -> tuple[tuple, tuple]:
        b1, b2 = self.betas
        return slots, (b1, 1 - b2)
