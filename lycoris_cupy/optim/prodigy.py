"""Prodigy."""

from __future__ import annotations

import numpy as np

from ..arrays import Array
from ..errors import LycorisError
from . import multi
from .base import Optimizer, Rate, zeros_beside
from .nested import Nested
from .settings import not_negative, shares


class Prodigy(Optimizer):
    """Adam that estimates its rate d.  Mishchenko & Defazio 2023, arXiv 2306.06101, algorithm 4,
    with decoupled weight decay.

        m = b1 m + (1 - b1) d g                  v = b2 v + (1 - b2) d^2 g^2
        r = sqrt(b2) r + (1 - sqrt(b2)) lr d^2 <g, p0 - p>
        s = sqrt(b2) s + (1 - sqrt(b2)) lr d^2 g
        p = p - lr d (m / (sqrt(v) + d eps) + weight_decay * p)
        d = max(d, d_coef * r / |s|_1)           from the next step on

    lr: 1, or a schedule of about 1. d0: the first d, far too small rather than too large. d_coef:
    scales the estimate. d and r are one for all parameters and stay on the device, `d` and
    `d_numerator`. What `rates` multiply is the step alone, not the estimate. parameters, and rates,
    clip, seed: see Optimizer.
    """

    _kernel = "prodigy"

    def __init__(
        self,
        parameters: Nested,
        lr: Rate = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        **common,
    ):
        self.betas, self.eps = shares("betas", betas, 2), eps
        not_negative(eps=eps)
        for name, value in (("d0", d0), ("d_coef", d_coef)):
            if not value > 0:
                raise LycorisError(f"{name} is {value}, expected a number above 0")
        self.d0, self.d_coef = d0, d_coef
        self._plain = 0.0  # this step's rate without any factor
        super().__init__(parameters, lr, weight_decay, **common)
        self.d, self.d_numerator, self._d_now = self._scalars

    # m is kept divided by d0, v, r and s by d0^2: every quotient stays the same, and squares of
    # d0 = 1e-6 times squares of small gradients do not vanish in f32.

    def _start(self, p: Array) -> tuple[Array, ...]:
        return (*zeros_beside(p, 3), p)

    def _first_scalars(self) -> tuple[float, ...]:
        return self.d0, 0.0, self.d0

    def _count(self, lr: float) -> None:
        self._plain = lr

    def _numbers_of(self, lr: float, steps: int) -> tuple[float, ...]:
        return lr, lr * self.weight_decay, self._plain

    def _before_cpu(self, grads: Nested, clip: Array | None) -> None:
        """r, s and the next d; this step's own d is left in `_d_now`."""
        kept = self.betas[1] ** 0.5
        self._d_now[...] = self.d
        weight = (1 - kept) * self._numbers[0, 2:3] * (self.d / self.d0) ** 2
        total = size = 0.0
        for group in self._groups:
            for _, p, g, (_, _, s, first) in group.blocks(group.widened(), grads, clip):
                total += float((g * (first - p)).sum())
                s *= kept
                s += weight * g
                size += float(abs(s).sum())
        self.d_numerator *= kept
        self.d_numerator += weight * total
        # No gradient at all yet tells nothing: 0 / 0 would stay for ever.
        self.d[...] = np.maximum(self.d, self.d_coef * self.d_numerator / (size or 1.0))

    def _before_gpu(self, sources: list[multi.Sources], clip: Array | None) -> None:
        kept, (totals, sizes) = self.betas[1] ** 0.5, self._partial
        for chunks, own, group in self._chunks(sources):
            _, _, s, first = group.slots
            sums = (group.masters, s, first, totals[chunks], sizes[chunks])
            numbers = (self._numbers, clip, self.d, self.d0, kept)
            group.table.launch("prodigy_sums", group.masters.dtype, own, *sums, *numbers)
        scalars = (self.d_numerator, self.d, self._d_now, self.d0, self.d_coef, kept)
        sums = (totals, sizes, totals.size, self._numbers)
        multi.finish("prodigy_estimate", self._dtype, *sums, *scalars)

    def _update(self, p: Array, g: Array, slots: list[Array], numbers: list[Array]) -> None:
        b1, b2 = self.betas
        rate, decay, _ = numbers
        m, v, _, _ = slots
        d = self._d_now
        g = g * (d / self.d0)
        m += (1 - b1) * (g - m)
        v += (1 - b2) * (g * g - v)
        p *= 1 - decay * d
        p -= rate * d * m / (np.sqrt(v) + d / self.d0 * self.eps)

    def _arguments(self, slots: tuple[Array, ...]) -> tuple[tuple, tuple]:
        b1, b2 = self.betas
        return slots[:2], (self._d_now, self.d0, 1 - b1, 1 - b2, self.eps)
