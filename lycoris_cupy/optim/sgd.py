"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from ..arrays import Array
from .base import Optimizer, Rate, zeros_beside
from .nested import Nested
from .settings import shares


class SGD(Optimizer):
    """Momentum of Polyak, or with `nesterov` the form of Sutskever et al. 2013 in which the
    gradient is taken at the point that is stored; weight decay decoupled.

        m = momentum * m + g         d = g + momentum * m if nesterov, else m
        p = p - lr * (d + weight_decay * p)

    parameters, lr, and rates, clip, seed: see Optimizer.
    """

    _kernel = "sgd"

    def __init__(
        self,
        parameters: Nested,
        lr: Rate = 1e-2,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        **common,
    ):
        (self.momentum,) = shares("momentum", (momentum,), 1)
        self.nesterov = nesterov
        super().__init__(parameters, lr, weight_decay, **common)

    def _start(self, p: Array) -> tuple[Array, ...]:
        return zeros_beside(p, 1)

    def _numbers_of(self, lr: float, steps: int) -> tuple[float, ...]:
        return lr, 1 - lr * self.weight_decay

    def _update(self, p: Array, g: Array, slots: list[Array], numbers: list[Array]) -> None:
        rate, left = numbers
        (m,) = slots
        m *= self.momentum
        m += g
        p *= left
        p -= rate * (g + self.momentum * m if self.nesterov else m)

    def _arguments(self, slots: tuple[Array, ...]) -> tuple[tuple, tuple]:
        return slots, (self.momentum, float(self.nesterov))
