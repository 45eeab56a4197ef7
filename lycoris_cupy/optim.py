"""AdamW on f32 masters of an adapter's factors. Runs where they lie and never looks at a value.

A step has two halves, so that the second can be captured: `prepare` counts the step and writes its
numbers to the device, `apply` works on arrays alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .arrays import Array, f32, module_of, on_gpu, wide_dtype
from .errors import LycorisError, MatchError, ShapeError

Nested = Mapping[str, Mapping[str, Array]]  # layer -> factor -> array


class AdamW:
    """Adam with decoupled weight decay.  Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2.

        m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
        p = p - lr * (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay * p)

    parameters: layer -> factor -> array of bf16, f32 or f64, as `engine.parameters(name)` gives
    them. They are copied into `masters` in the wide dtype (f32; f64 for f64) and not written: bf16
    has 8 bits and would lose any step below 2^-9 of a value. `lr` may be set between steps.
    Raises LycorisError for settings out of range.
    """

    def __init__(
        self,
        parameters: Nested,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise LycorisError(f"betas are {betas}, expected two numbers of at least 0 and below 1")
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise LycorisError(f"{name} is {value}, expected at least 0")
        self.lr, self.betas, self.eps, self.weight_decay = lr, tuple(betas), eps, weight_decay
        self.masters = {
            layer: {name: p.astype(wide_dtype(p.dtype)) for name, p in factors.items()}
            for layer, factors in parameters.items()
        }
        self._moments = {
            layer: {
                name: (module_of(p).zeros_like(p), module_of(p).zeros_like(p))
                for name, p in factors.items()
            }
            for layer, factors in self.masters.items()
        }
        self._steps = 0
        some = next((p for f in self.masters.values() for p in f.values()), np.zeros(0, f32))
        self._numbers = module_of(some).zeros(3, some.dtype)  # rate, eps, what decay leaves

    def step(self, grads: Nested) -> dict[str, dict[str, Array]]:
        """One update; returns the masters, for `engine.set_parameters(name, masters)`.

        grads: every factor's gradient, as a pullback gives them. The masters are updated in place.
        Raises MatchError or ShapeError, before anything is changed.
        """
        self._check(grads)
        self.prepare()
        return self.apply(grads)

    def prepare(self) -> None:
        """Count a step, and put its numbers, with the present `lr`, where `apply` reads them."""
        self._steps += 1
        b1, b2 = self.betas
        # Both corrections go into the step size and eps: the same formula, two passes fewer.
        root = (1 - b2**self._steps) ** 0.5
        rate, eps = self.lr * root / (1 - b1**self._steps), self.eps * root
        now = np.array([rate, eps, 1 - self.lr * self.weight_decay], self._numbers.dtype)
        if on_gpu(self._numbers):
            self._numbers.set(now)  # pyright: ignore[reportAttributeAccessIssue]
        else:
            self._numbers[...] = now

    def apply(self, grads: Nested) -> dict[str, dict[str, Array]]:
        """The step that was prepared, on arrays alone; returns the masters."""
        self._check(grads)
        b1, b2 = self.betas
        rate, eps, kept = (self._numbers[i : i + 1] for i in range(3))
        for layer, factors in self.masters.items():
            for name, p in factors.items():
                g = grads[layer][name].astype(p.dtype, copy=False)
                m, v = self._moments[layer][name]
                m += (1 - b1) * (g - m)
                v += (1 - b2) * (g * g - v)
                p *= kept
                p -= rate * m / (module_of(p).sqrt(v) + eps)
        return self.masters

    def snapshot(self) -> tuple:
        """A copy of all that a step changes, for `restore`."""
        copies = [array.copy() for array in self._state()]
        return self._steps, copies

    def restore(self, kept: tuple) -> None:
        """Put a snapshot back into the same arrays."""
        self._steps, copies = kept
        for array, copy in zip(self._state(), copies, strict=True):
            array[...] = copy

    def _state(self) -> list[Array]:
        masters = [p for factors in self.masters.values() for p in factors.values()]
        moments = [m for f in self._moments.values() for pair in f.values() for m in pair]
        return [*masters, *moments]

    def _check(self, grads: Nested) -> None:
        for layer, factors in self.masters.items():
            for name, p in factors.items():
                g = grads.get(layer, {}).get(name)
                if g is None:
                    raise MatchError(f"there is no gradient for factor {name!r} of layer {layer!r}")
                if g.shape != p.shape:
                    raise ShapeError(
                        f"the gradient of {layer}.{name} has shape {tuple(g.shape)}, "
                        f"expected {tuple(p.shape)}"
                    )
