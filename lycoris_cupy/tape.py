"""Reverse-mode differentiation: primitives, and the tape that lists those which touched a watched
array.

A primitive has a `cpu` and a `gpu` implementation on plain arrays and a rule `vjp(needs, out,
*args, **static)` that is called when the primitive is recorded and returns `pull(g) -> one gradient
an argument`. What `pull` closes over is what stays alive. Gradient rules know nothing of the tape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .arrays import Array, on_gpu, wide_dtype
from .errors import LycorisError

PRIMITIVES: dict[str, Primitive] = {}  # by name; the tables of tests iterate over it


class Deferred:
    """A contribution to a gradient that is still to be computed: run(add) -> add plus it, rounded
    once.

    Contributions to one variable are chained through the accumulators of their products, so that a
    sum of several is not written and read again for each. One that `extends` takes the `term` of
    the one before it too, run(add, term), and computes both in one sum.
    """

    __slots__ = ("extends", "run", "term")

    def __init__(self, run: Callable[..., Array], term: Any = None, extends: bool = False):
        self.run, self.term, self.extends = run, term, extends


class Var:
    """An array that a tape watches. Operations take it wherever they take an array."""

    __slots__ = ("tape", "value")

    def __init__(self, value: Array, tape: Tape):
        self.value, self.tape = value, tape

    @property
    def shape(self):
        return self.value.shape

    @property
    def dtype(self):
        return self.value.dtype

    @property
    def ndim(self):
        return self.value.ndim

    def __repr__(self):
        return f"Var(shape={tuple(self.shape)}, dtype={self.dtype})"


def value_of(x: Any) -> Any:
    """The plain array inside a Var; anything else as it is."""
    return x.value if isinstance(x, Var) else x


@dataclass(frozen=True)
class Primitive:
    """One differentiable operation. Calling it runs `gpu` if the first array lies there, else
    `cpu`, and records it.

    keeps: they take keep=, whether the call is recorded, and return (result, what the gradient
    needs beside the arguments); `vjp` finds that as kept=.
    """

    name: str
    cpu: Callable
    gpu: Callable
    vjp: Callable
    keeps_wide: bool = False  # its gradient is not rounded to the dtype of its result on the way
    keeps: bool = False

    def __post_init__(self):
        if self.name in PRIMITIVES:
            raise LycorisError(f"a primitive named {self.name!r} exists already")
        PRIMITIVES[self.name] = self

    def __call__(self, *args, **static) -> Any:
        values = [value_of(a) for a in args]
        tape = next((a.tape for a in args if isinstance(a, Var)), None)
        run = self.gpu if on_gpu(values[0]) else self.cpu
        if self.keeps:
            out, static["kept"] = run(*values, keep=tape is not None, **static)
        else:
            out = run(*values, **static)
        if tape is None:
            return out
        needs = tuple(isinstance(a, Var) for a in args)
        if any(isinstance(a, Var) and a.tape is not tape for a in args):
            raise LycorisError(f"{self.name}: its arguments are watched by two tapes")
        result = Var(out, tape)
        pull = self.vjp(needs, out, *values, **static)
        tape.entries.append((args, result, pull if self.keeps_wide else _rounding(pull, out.dtype)))
        return result


class Tape:
    """The record of one forward pass. Played back once, by `gradients`."""

    def __init__(self):
        self.entries: list[tuple[tuple, Var, Callable]] = []
        self._played = False

    def watch(self, array: Array) -> Var:
        """A Var whose uses are recorded here."""
        return Var(array, self)

    def gradients(self, out: Var, g: Array, wanted: Sequence[Var]) -> list[Array | None]:
        """The gradients of <g, out> with respect to each wanted Var; None for one that out does not
        depend on.

        Contributions are summed in the wide dtype (f32; f64 for f64), those of products in their
        accumulators. A watched leaf may keep the wide sum; a gradient that goes on through an
        operation is rounded once to the dtype of its activation, so that products stay in bf16.
        """
        if self._played:
            raise LycorisError("this tape was played back already: record the forward pass again")
        self._played = True
        parts: dict[int, list[Array | Deferred]] = {id(out): [g]}
        done: dict[int, Array] = {}
        keep = {id(v) for v in wanted}
        while self.entries:
            args, result, pull = self.entries.pop()
            if id(result) not in parts:
                continue
            g = _total(parts.pop(id(result)), result.dtype)
            if id(result) in keep:
                done[id(result)] = g
            for arg, contribution in zip(args, pull(g), strict=True):
                if isinstance(arg, Var) and contribution is not None:
                    parts.setdefault(id(arg), []).append(contribution)
        for v in wanted:
            if id(v) in parts:
                done[id(v)] = _total(parts.pop(id(v)), v.dtype)
        return [done.get(id(v)) for v in wanted]


def _total(parts: list[Array | Deferred], dtype) -> Array:
    """The sum of all parts. Ready arrays first; then the deferred ones, last recorded first.

    An adapter's thin product is recorded before the layer's own and so played back after it: it is
    computed first, and the layer's product adds to it in its accumulators.
    """
    total = None
    for part in parts:
        if not isinstance(part, Deferred):
            total = part if total is None else _sum(total, part)
    deferred = [part for part in reversed(parts) if isinstance(part, Deferred)]
    if deferred and total is not None:
        total = _as(total, dtype)
    term = None
    for i, part in enumerate(deferred):
        following = deferred[i + 1] if i + 1 < len(deferred) else None
        if term is None and part.term is not None and following is not None and following.extends:
            term = part.term
        else:
            total, term = part.run(total) if term is None else part.run(total, term), None
    return total


def _as(g: Array, dtype) -> Array:
    # A wide cotangent of a bf16 activation is rounded, so that products stay on tensor cores.
    return g if g.dtype == dtype else g.astype(dtype)


def _rounding(pull: Callable, dtype) -> Callable:
    return lambda g: pull(_as(g, dtype))


def _sum(a: Array, b: Array) -> Array:
    kept = wide_dtype(a.dtype)
    return a.astype(kept, copy=False) + b.astype(kept, copy=False)
