"""What all optimizers share: masters, state beside them, and a step in two halves.

`prepare` counts the step on the host and writes its numbers into an array that stays; `apply` works
on arrays alone, so that a captured graph can hold it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np

from ..arrays import Array, bf16, f32, module_of, on_gpu, wide_dtype
from ..errors import LycorisError, MatchError
from .clipping import clip_by_global_norm
from .nested import Nested, Own, items, mapped, require_gradients
from .rounding import round_stochastically

Rate = float | Callable[[int], float]


class Optimizer:
    """A first-order method with decoupled weight decay.

    parameters: layer -> factor -> array of bf16, f32 or f64, as `engine.parameters(name)` gives
    them. They are copied into `masters` in the wide dtype (f32; f64 for f64) and not written: bf16
    has 8 bits and would lose any step below 2^-9 of a value. lr: a number, which may be set between
    steps, or a schedule, step -> rate, the first step being 0. rates: layer -> factor -> what its
    rate is multiplied by, as `rate_factors` makes them. clip: the bound of the gradients' global
    norm; what it was before is left in `grad_norm`, (1,). seed: keep bf16 parameters
    in bf16 alone, without f32 masters, each step rounded stochastically with this seed.
    Raises LycorisError for settings out of range.
    """

    def __init__(
        self,
        parameters: Nested,
        lr: Rate,
        weight_decay: float,
        rates: Mapping[str, Mapping[str, float]] | None = None,
        clip: float | None = None,
        seed: int | None = None,
    ):
        not_negative(weight_decay=weight_decay, **({} if callable(lr) else {"lr": lr}))
        if clip is not None and not clip > 0:
            raise LycorisError(f"clip is {clip}, expected a norm above 0, or None")
        if seed is not None and not 0 <= seed < 2**64:
            raise LycorisError(f"seed is {seed}, expected a whole number from 0 to 2^64 - 1")
        self.lr: Any = lr
        self.weight_decay, self.clip, self._seed = weight_decay, clip, seed
        self.masters = mapped(self._master, parameters)
        self._slots = {
            layer: {name: self._start(p.astype(wide_dtype(p.dtype))) for name, p in factors.items()}
            for layer, factors in self.masters.items()
        }
        self._counts: dict[str, float] = {"steps": 0}  # all that the host counts
        self._set_rates(rates)
        some = next((p for _, _, p in items(self.masters)), np.zeros(0, f32))
        xp = module_of(some)
        many = wide_dtype(some.dtype)
        columns = len(self._numbers_of(0.0, 1))
        self._numbers = xp.zeros((len(self._factors), columns), many)
        self._clock = xp.zeros(1, np.uint32)  # the step, for random numbers
        self._clocked = seed is not None
        self.grad_norm = xp.zeros(1, many)
        self._scalars = [xp.full(1, value, many) for value in self._first_scalars()]

    def step(self, grads: Nested) -> Own:
        """One update; returns the masters, for `engine.set_parameters(name, masters)`.

        grads: every factor's gradient, as a pullback gives them. The masters are updated in place.
        Raises MatchError or ShapeError, before anything is changed.
        """
        require_gradients(grads, self.masters)
        self.prepare()
        return self.apply(grads)

    def prepare(self) -> None:
        """Count a step, and put its numbers, with the present `lr`, where `apply` reads them."""
        steps = int(self._counts["steps"]) + 1
        lr = cast("Any", self.lr)(steps - 1) if callable(self.lr) else self.lr
        self._counts["steps"] = steps
        self._count(lr)
        now = [self._numbers_of(lr * factor, steps) for factor in self._factors]
        _write(self._numbers, np.array(now, self._numbers.dtype))
        if self._clocked:
            _write(self._clock, np.array([steps % 2**32], np.uint32))

    def apply(self, grads: Nested) -> Own:
        """The step that was prepared, on arrays alone; returns the masters."""
        require_gradients(grads, self.masters)
        if self.clip is not None:
            grads = {layer: {n: grads[layer][n] for n in p} for layer, p in self.masters.items()}
            grads, norm = clip_by_global_norm(grads, self.clip)
            self.grad_norm[...] = norm
        self._before(grads)
        for index, (layer, name, p) in enumerate(items(self.masters)):
            wide = p.astype(f32) if p.dtype == bf16 else p
            g = grads[layer][name].astype(wide.dtype, copy=False)
            row = self._numbers[self._rows[layer][name]]
            numbers = [row[i : i + 1] for i in range(row.shape[0])]
            self._update(wide, g, self._slots[layer][name], numbers)
            if p.dtype == bf16:
                p[...] = round_stochastically(wide, self._seed or 0, self._clock, index)
        return self.masters

    def clock(self) -> Array:
        """The number of the prepared step, the first being 1: (1,) u32 on the device, for random
        numbers. `prepare` writes it from the first time that it is asked for.
        """
        self._clocked = True
        return self._clock

    def snapshot(self) -> tuple:
        """A copy of all that a step changes, for `restore`."""
        return dict(self._counts), [array.copy() for array in self._state()]

    def restore(self, kept: tuple) -> None:
        """Put a snapshot back into the same arrays."""
        counts, copies = kept
        self._counts = dict(counts)
        for array, copy in zip(self._state(), copies, strict=True):
            array[...] = copy

    def _numbers_of(self, lr: float, steps: int) -> tuple[float, ...]:
        """What `_update` needs of a step, the first being 1, at this rate."""
        raise NotImplementedError

    def _update(self, p: Array, g: Array, slots: tuple, numbers: list[Array]) -> None:
        """Change p and its slots in place. p, g: wide. numbers: (1,) each, of `_numbers_of`."""
        raise NotImplementedError

    def _start(self, p: Array) -> tuple[Array, ...]:
        """The state beside a parameter, wide."""
        return ()

    def _first_scalars(self) -> tuple[float, ...]:
        """First values of the state that is one for all parameters."""
        return ()

    def _count(self, lr: float) -> None:
        """Change the host's own counts for a step at this rate, before its numbers are made."""

    def _before(self, grads: Nested) -> None:
        """Work over all gradients, on the device, before any parameter is updated."""

    def _master(self, p: Array) -> Array:
        kept = bf16 if self._seed is not None and p.dtype == bf16 else wide_dtype(p.dtype)
        return p.astype(kept)

    def _set_rates(self, rates: Mapping[str, Mapping[str, float]] | None) -> None:
        rates = rates or {}
        for layer, name, _ in items(rates):
            if name not in self.masters.get(layer, {}):
                raise MatchError(f"rates name factor {name!r} of layer {layer!r}: there is none")
        own = {
            layer: {name: float(rates.get(layer, {}).get(name, 1.0)) for name in factors}
            for layer, factors in self.masters.items()
        }
        for layer, name, factor in items(own):
            not_negative(**{f"the rate factor of {layer}.{name}": factor})
        self._factors = sorted({factor for _, _, factor in items(own)}) or [1.0]
        self._rows = mapped(self._factors.index, own)

    def _state(self) -> list[Array]:
        masters = [p for _, _, p in items(self.masters)]
        slots = [array for _, _, arrays in items(self._slots) for array in arrays]
        return [*masters, *slots, *self._scalars]


def not_negative(**settings: float) -> None:
    """Raise LycorisError for a setting that is not a finite number of at least 0."""
    for name, value in settings.items():
        if not 0 <= value < float("inf"):
            raise LycorisError(f"{name} is {value}, expected at least 0")


def shares(names: str, values: tuple[float, ...], count: int) -> tuple[float, ...]:
    """Decay rates of running means. Raises LycorisError unless there are `count` in [0, 1)."""
    values = tuple(values)
    if len(values) != count or not all(0 <= value < 1 for value in values):
        words = {1: "a number", 2: "two numbers"}[count]
        shown = values if count > 1 else values[0]
        verb = "are" if count > 1 else "is"
        raise LycorisError(f"{names} {verb} {shown}, expected {words} of at least 0 and below 1")
    return values


def zeros_beside(p: Array, count: int) -> tuple[Array, ...]:
    """So many arrays of zeros like p."""
    return tuple(module_of(p).zeros_like(p) for _ in range(count))


def _write(array: Array, now: np.ndarray) -> None:
    if on_gpu(array):
        array.set(now)  # pyright: ignore[reportAttributeAccessIssue]
    else:
        array[...] = now
