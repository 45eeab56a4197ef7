"""Reverse-mode differentiation: primitives, and the tape that lists those which touched a watched
array.

A primitive has a `cpu` and a `gpu` implementation on plain arrays and a rule `vjp(needs, out,
*args, **static)` that is called when the primitive is recorded and returns `pull(g) -> one gradient
an argument`. What `pull` closes over is what stays alive between the passes, and no longer than
until it has been called: the tape itself holds no array. Gradient rules know nothing of the tape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .arrays import Array, on_gpu, wide_dtype
from .errors import LycorisError

PRIMITIVES: dict[str, Primitive] = {}  # by name; the tables of tests iterate over it


class Fresh:
    """A contribution to a gradient that nobody else holds: the next one may be added in place."""

    __slots__ = ("array",)

    def __init__(self, array: Array):
        self.array = array


class Deferred:
    """A contribution to a gradient that is still to be computed: run(add, term, spend) -> add plus
    it, rounded once, an array that nobody else holds.

    Contributions to one variable are chained through the accumulators of their products, so that a
    sum of several is not written and read again for each. One that `extends` may be given the
    `term` of the one before it, and computes both in one sum; else term is None. spend: add is
    Fresh, and may be where the sum is written.
    """

    __slots__ = ("extends", "run", "term")

    def __init__(self, run: Callable[..., Array], term: Any = None, extends: bool = False):
        self.run, self.term, self.extends = run, term, extends


Part = Array | Fresh | Deferred


class Node:
    """What a tape keeps of a Var: all but the array."""

    __slots__ = ("dtype", "shape")

    def __init__(self, array: Array):
        self.shape, self.dtype = tuple(array.shape), array.dtype


class Var:
    """An array that a tape watches. Operations take it wherever they take an array."""

    __slots__ = ("node", "tape", "value")

    def __init__(self, value: Array, tape: Tape):
        self.value, self.tape, self.node = value, tape, Node(value)

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
        nodes = tuple(a.node if isinstance(a, Var) else None for a in args)
        pull = pull if self.keeps_wide else _rounding(pull, out.dtype)
        tape.entries.append((nodes, result.node, pull))
        return result


class Tape:
    """The record of one forward pass. Played back once, by `gradients`."""

    def __init__(self):
        self.entries: list[tuple[tuple[Node | None, ...], Node, Callable]] = []
        self._played = False

    def watch(self, array: Array) -> Var:
        """A Var whose uses are recorded here."""
        return Var(array, self)

    def gradients(
        self, out: Var | Node, g: Array, wanted: Sequence[Var | Node]
    ) -> list[Array | None]:
        """The gradients of <g, out> with respect to each wanted Var, or the Node of one; None for
        one that out does not depend on. g is not changed.

        Contributions are summed in the wide dtype (f32; f64 for f64), those of products in their
        accumulators. A watched leaf may keep the wide sum; a gradient that goes on through an
        operation is rounded once to the dtype of its activation, so that products stay in bf16.
        """
        if self._played:
            raise LycorisError("this tape was played back already: record the forward pass again")
        self._played = True
        parts: dict[Node, list[Part]] = {_node(out): [g]}
        nodes = [_node(v) for v in wanted]
        kept, done = set(nodes), {}
        while self.entries:
            _play(self.entries.pop(), parts, kept, done)
        for node in nodes:
            if node in parts:
                done[node] = total_of(parts.pop(node), node.dtype)
        return [done.get(node) for node in nodes]


def _node(v: Var | Node | Array) -> Node:
    if isinstance(v, Var):
        return v.node
    return v if isinstance(v, Node) else Node(v)  # nothing watched leads to a plain array


# A function of its own, so that what one entry holds is let go before the next is played.
def _play(entry, parts: dict[Node, list[Part]], kept: set[Node], done: dict[Node, Array]) -> None:
    args, result, pull = entry
    if result not in parts:
        return
    g = total_of(parts.pop(result), result.dtype)
    if result in kept:
        done[result] = g
    for arg, contribution in zip(args, pull(g), strict=True):
        if arg is not None and contribution is not None:
            parts.setdefault(arg, []).append(contribution)


def total_of(parts: list[Part], dtype) -> Array:
    """The sum of all parts, which are taken out. Ready arrays first; then the deferred ones, last
    recorded first.

    An adapter's thin product is recorded before the layer's own and so played back after it: it is
    computed first, and the layer's product adds to it in its accumulators.
    """
    total, own = None, False  # own: nobody else holds the total
    deferred = []
    for part in parts:
        if isinstance(part, Deferred):
            deferred.append(part)
        elif total is None:
            total, own = (part.array, True) if isinstance(part, Fresh) else (part, False)
        else:
            total, own = _sum(total, part.array if isinstance(part, Fresh) else part), True
    parts.clear()
    del part
    if deferred and total is not None and total.dtype != dtype:
        total, own = _as(total, dtype), True
    term = None
    while deferred:
        part = deferred.pop()
        if term is None and part.term is not None and deferred and deferred[-1].extends:
            term = part.term
        else:
            total, own, term = part.run(total, term, own), True, None
    return total


def _as(g: Array, dtype) -> Array:
    # A wide cotangent of a bf16 activation is rounded, so that products stay on tensor cores.
    return g if g.dtype == dtype else g.astype(dtype)


def _rounding(pull: Callable, dtype) -> Callable:
    return lambda g: pull(_as(g, dtype))


def _sum(a: Array, b: Array) -> Array:
    kept = wide_dtype(a.dtype)
    return a.astype(kept, copy=False) + b.astype(kept, copy=False)
