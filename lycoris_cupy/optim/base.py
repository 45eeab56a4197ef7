"""What all optimizers share: masters, state beside them, and a step in two halves.

`prepare` counts the step on the host and writes its numbers into an array that stays; `apply` works
on arrays alone, so that a captured graph can hold it. On a GPU a step is one launch over all
factors (one for 480 of them, and for each dtype of masters), and three with `clip`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import numpy as np

from ..arrays import Array, bf16, f32, module_of, on_gpu, wide_dtype
from ..errors import DtypeError, LycorisError, MatchError
from . import multi
from .flat import Layout
from .group import Group
from .nested import Nested, Own, common_dtype, items, mapped, require_gradients
from .settings import not_negative

Rate = float | Callable[[int], float]
_WORD = 0xFFFFFFFF


class Optimizer:
    """A first-order method with decoupled weight decay.

    parameters: layer -> factor -> array of bf16 or f32, or all of f64, as
    `engine.parameters(name)` gives them. They are copied into `masters`, views of one buffer, in
    the wide dtype (f32; f64 for f64) and not written: bf16 has 8 bits and would lose any step below
    2^-9 of a value. lr: a number, which may be set between steps, or a schedule, step -> rate, the
    first step being 0. rates: layer -> factor -> what its rate is multiplied by, as `rate_factors`
    makes them. clip: the bound of the gradients' global norm; what it was before is left in
    `grad_norm`, (1,). seed: keep bf16 parameters in bf16 alone, without f32 masters, each step
    rounded stochastically with this seed. Raises LycorisError for settings out of range.
    """

    _kernel: str  # the op of optimizer.cu that is `_update` of all factors

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
        self._dtype = common_dtype(parameters)
        self._given = mapped(lambda p: p.dtype, parameters)
        self._set_rates(rates)
        self._groups: list[Group] = []
        for kept in (self._dtype, bf16):
            layout = Layout(parameters, self._rows, lambda p, kept=kept: self._kept(p) == kept)
            if layout.spots:
                self._groups.append(Group(layout, kept, parameters, self._start))
        self.masters = self._nested(lambda group: group.masters)
        self._counts: dict[str, float] = {"steps": 0}  # all that the host counts
        some = next((p for _, _, p in items(parameters)), np.zeros(0, f32))
        xp, self._gpu = module_of(some), on_gpu(some)
        columns = len(self._numbers_of(0.0, 1))
        self._numbers = xp.zeros((len(self._factors), columns), self._dtype)
        self._clock = xp.zeros(1, np.uint32)  # the step, for random numbers
        self.grad_norm = xp.zeros(1, self._dtype)
        self._measured = clip is not None  # whether a step leaves the norm in grad_norm
        self._factor = xp.ones(1, self._dtype)  # what clipping multiplies by
        self._scalars = [xp.full(1, value, self._dtype) for value in self._first_scalars()]
        chunks = sum(group.table.chunks for group in self._groups if group.table)
        self._partial = xp.zeros((2, chunks), self._dtype)  # sums of the chunks

    def step(self, grads: Nested, out: Nested | None = None) -> Own:
        """One update; returns the masters, for `engine.set_parameters(name, masters)`.

        grads: every factor's gradient, as a pullback gives them. The masters are updated in place.
        out: arrays like the parameters that were given, such as `engine.parameters(name)`, which
        are set to the new values, rounded once, in the same pass. Raises MatchError, ShapeError,
        DeviceError or DtypeError, before anything is changed.
        """
        self._require(grads, out)
        self.prepare()
        return self._apply(grads, out)

    def prepare(self) -> None:
        """Count a step, and put its numbers, with the present `lr`, where `apply` reads them."""
        steps = int(self._counts["steps"]) + 1
        lr = cast("Any", self.lr)(steps - 1) if callable(self.lr) else self.lr
        self._counts["steps"] = steps
        self._count(lr)
        now = np.array([self._numbers_of(lr * factor, steps) for factor in self._factors])
        if self._gpu:
            multi.tell(now.ravel(), self._numbers, self._clock, steps % 2**32)
        else:
            self._numbers[...] = now
            self._clock[...] = steps % 2**32

    def apply(self, grads: Nested, out: Nested | None = None) -> Own:
        """The step that was prepared, on arrays alone, see `step`."""
        self._require(grads, out)
        return self._apply(grads, out)

    def clock(self) -> Array:
        """The number of the prepared step, the first being 1: (1,) u32 on the device, for random
        numbers.
        """
        return self._clock

    def measure_norm(self) -> None:
        """From now on every step leaves the gradients' norm in `grad_norm`, as with `clip`."""
        self._measured = True

    def snapshot(self) -> tuple:
        """A copy of all that a step changes, for `restore`."""
        return dict(self._counts), [array.copy() for array in self._state()]

    def restore(self, kept: tuple) -> None:
        """Put a snapshot back into the same arrays."""
        counts, copies = kept
        self._counts = dict(counts)
        for array, copy in zip(self._state(), copies, strict=True):
            array[...] = copy

    # What a method has of its own.

    def _numbers_of(self, lr: float, steps: int) -> tuple[float, ...]:
        """What an update needs of a step, the first being 1, at this rate."""
        raise NotImplementedError

    def _update(self, p: Array, g: Array, slots: list[Array], numbers: list[Array]) -> None:
        """Change p and its slots in place, by NumPy. p, g: wide. numbers: (1,) each."""
        raise NotImplementedError

    def _arguments(self, slots: tuple[Array, ...]) -> tuple[tuple, tuple]:
        """What `_kernel` takes: the slots behind the masters, and the constants at the end."""
        raise NotImplementedError

    def _start(self, p: Array) -> tuple[Array, ...]:
        """The state beside the parameters, wide; p: a copy of their first values."""
        return ()

    def _first_scalars(self) -> tuple[float, ...]:
        """First values of the state that is one for all parameters."""
        return ()

    def _count(self, lr: float) -> None:
        """Change the host's own counts for a step at this rate, before its numbers are made."""

    def _before_cpu(self, grads: Nested, clip: Array | None) -> None:
        """Work over all gradients before any parameter is updated. clip: what they are multiplied
        by.
        """

    def _before_gpu(self, sources: list[multi.Sources], clip: Array | None) -> None:
        """The same on the device; sources: a group's each."""

    # The step.

    def _apply(self, grads: Nested, out: Nested | None) -> Own:
        (self._apply_gpu if self._gpu else self._apply_cpu)(grads, out)
        return self.masters

    def _apply_cpu(self, grads: Nested, out: Nested | None) -> None:
        clip = None
        if self._measured:
            self.grad_norm[...] = sum(group.squares(grads) for group in self._groups) ** 0.5
        if self.clip is not None:
            clip, norm = self._factor, self.grad_norm
            clip[...] = self.clip / np.maximum(norm, self.clip)
        self._before_cpu(grads, clip)
        for group in self._groups:
            wide = group.widened()
            for row, p, g, slots in group.blocks(wide, grads, clip):
                numbers = self._numbers[row]
                self._update(p, g, slots, [numbers[i : i + 1] for i in range(len(numbers))])
            group.keep(wide, self._seed or 0, self._clock)
        for layer, name, value in items(out or {}):
            if name in self.masters.get(layer, {}):
                value[...] = self.masters[layer][name].astype(value.dtype, copy=False)

    def _apply_gpu(self, grads: Nested, out: Nested | None) -> None:
        sources = [g.table.sources(g.layout.listed(grads), self._dtype) for g in self._groups]
        clip = None if self.clip is None else self._factor
        if self._measured:
            partial, bound = self._partial[0], float("inf") if self.clip is None else self.clip
            for chunks, own, group in self._chunks(sources):
                group.table.launch("squares", self._dtype, own, partial[chunks])
            numbers = (partial, partial.size, float(bound), self.grad_norm, self._factor)
            multi.finish("norm_bound", self._dtype, *numbers)
        self._before_gpu(sources, clip)
        seed = self._seed or 0
        for own, group in zip(sources, self._groups, strict=True):
            slots, constants = self._arguments(group.slots)
            common = (self._numbers, clip, self._clock, seed & _WORD, seed >> 32)
            outs = None if out is None else group.table.outs(group.layout.listed(out))
            group.table.launch(
                self._kernel, group.masters.dtype, own, group.masters, *slots, *common, *constants,
                outs=outs,
            )  # fmt: skip

    def _chunks(self, sources: list[multi.Sources]) -> Iterator[tuple[slice, multi.Sources, Group]]:
        """Every group with its sources and the place of its chunks among all."""
        begin = 0
        for own, group in zip(sources, self._groups, strict=True):
            yield slice(begin, begin + group.table.chunks), own, group
            begin += group.table.chunks

    def _require(self, grads: Nested, out: Nested | None) -> None:
        require_gradients(grads, self.masters)
        if out is None:
            return
        require_gradients(out, self.masters, "array to write")
        for layer, name, dtype in items(self._given):
            found = out[layer][name]
            if found.dtype != dtype or not found.flags.c_contiguous:
                raise DtypeError(
                    f"the array to write of {layer}.{name} is {found.dtype} with strides "
                    f"{found.strides}, expected {dtype}, C-contiguous, as the parameter was"
                )

    def _kept(self, p: Array) -> np.dtype:
        return bf16 if self._seed is not None and p.dtype == bf16 else wide_dtype(p.dtype)

    def _nested(self, of: Callable[[Group], Array]) -> Own:
        """layer -> factor -> view of the groups' buffers, in the order of the parameters."""
        found = [group.layout.nested(of(group)) for group in self._groups]
        return {
            layer: {
                name: next(part[layer][name] for part in found if name in part.get(layer, {}))
                for name in factors
            }
            for layer, factors in self._given.items()
        }

    def _set_rates(self, rates: Mapping[str, Mapping[str, float]] | None) -> None:
        rates = rates or {}
        for layer, name, _ in items(rates):
            if name not in self._given.get(layer, {}):
                raise MatchError(f"rates name factor {name!r} of layer {layer!r}: there is none")
        own = {
            layer: {name: float(rates.get(layer, {}).get(name, 1.0)) for name in factors}
            for layer, factors in self._given.items()
        }
        for layer, name, factor in items(own):
            not_negative(**{f"the rate factor of {layer}.{name}": factor})
        self._factors = sorted({factor for _, _, factor in items(own)}) or [1.0]
        self._rows = mapped(self._factors.index, own)

    def _state(self) -> list[Array]:
        return [array for group in self._groups for array in group.state()] + self._scalars


def zeros_beside(p: Array, count: int) -> tuple[Array, ...]:
    """So many arrays of zeros like p."""
    return tuple(module_of(p).zeros_like(p) for _ in range(count))
