"""Prodigy."""

from __future__ import annotations

from ..arrays import Array, module_of, wide_dtype
from ..errors import LycorisError
from .base import Optimizer, Rate, not_negative, shares, zeros_beside
from .nested import Nested, items


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
        return (*zeros_beside(p, 3), p.copy())

    def _first_scalars(self) -> tuple[float, ...]:
        return self.d0, 0.0, self.d0

    def _count(self, lr: float) -> None:
        self._plain = lr

    def _numbers_of(self, lr: float, steps: int) -> tuple[float, ...]:
        return lr, lr * self.weight_decay, self._plain

    def _before(self, grads: Nested) -> None:
        """r, s and the next d; this step's own d is left in `_d_now`."""
        kept = self.betas[1] ** 0.5
        self._d_now[...] = self.d
        weight = (1 - kept) * self._numbers[0, 2:3] * (self.d / self.d0) ** 2
        total = size = 0.0
        for layer, name, p in items(self.masters):
            g = grads[layer][name].astype(wide_dtype(p.dtype), copy=False)
            _, _, s, first = self._slots[layer][name]
            total = total + (g * (first - p.astype(g.dtype, copy=False))).sum()
            s *= kept
            s += weight * g
            size = size + abs(s).sum()
        self.d_numerator *= kept
        self.d_numerator += weight * total
        xp = module_of(self.d)
        size = size + xp.zeros_like(self.d)
        # No gradient at all yet tells nothing: 0 / 0 would stay for ever.
        found = self.d_coef * self.d_numerator / xp.where(size > 0, size, 1)
        self.d[...] = xp.maximum(self.d, found)

    def _update(self, p: Array, g: Array, slots: tuple, numbers: list[Array]) -> None:
        b1, b2 = self.betas
        rate, decay, _ = numbers
        m, v, _, _ = slots
        d = self._d_now
        g = g * (d / self.d0)
        m += (1 - b1) * (g - m)
        v += (1 - b2) * (g * g - v)
        p *= 1 - decay * d
        p -= rate * d * m / (module_of(p).sqrt(v) + d / self.d0 * self.eps)
