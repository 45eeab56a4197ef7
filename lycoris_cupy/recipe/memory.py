"""How much memory training takes: what can be counted, and what has to be measured."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np

from ..arrays import Array, dtype_name, dtype_of, on_gpu, wide_dtype
from ..errors import LycorisError
from ..optim import SGD, AdamW, Lion, Prodigy, ScheduleFreeAdamW
from ..tape import Tape

OPTIMIZERS = (SGD, Lion, AdamW, ScheduleFreeAdamW, Prodigy)
_SAMPLE = 2**16  # elements; more than any padding of a buffer


class Memory(NamedTuple):
    """Bytes on the device. factors: as the layers read them. constants: of the frozen weights, that
    adapters keep. gradients, masters: wide. states: optimizer -> what it keeps beside the masters.
    """

    factors: int
    constants: int
    gradients: int
    masters: int
    states: Mapping[str, int]

    def total(self, optimizer: str) -> int:
        """Without activations; they are `activation_bytes`. Raises LycorisError for an optimizer
        that is not known.
        """
        if optimizer not in self.states:
            known = ", ".join(self.states)
            raise LycorisError(f"optimizer {optimizer!r} is unknown: use one of {known}")
        return sum(self[:4]) + self.states[optimizer]


def training_memory(
    parameters: Mapping[str, Mapping[str, Array]], kept: Mapping[str, Mapping[str, Array]], dtype
) -> Memory:
    """Of the factors of an adapter, in an engine of this dtype, and the constants beside them."""
    arrays = [array for factors in parameters.values() for array in factors.values()]
    count = sum(array.size for array in arrays)
    wide = count * wide_dtype(dtype).itemsize
    constants = sum(array.nbytes for one in kept.values() for array in one.values())
    states = {kind.__name__: count * _state_bytes(kind, dtype_name(dtype)) for kind in OPTIMIZERS}
    return Memory(sum(array.nbytes for array in arrays), constants, wide, wide, states)


@cache
def _state_bytes(kind: type, dtype: str) -> int:
    """Bytes for each element of a parameter, beside its master: by what a snapshot grows."""

    def size(count: int) -> int:
        p = np.zeros(count, dtype_of(dtype))
        _, arrays = kind({"layer": {"factor": p}}, lr=1.0).snapshot()
        return sum(array.nbytes for array in arrays)

    return (size(2 * _SAMPLE) - size(_SAMPLE)) // _SAMPLE - wide_dtype(dtype_of(dtype)).itemsize


def activation_bytes(engine: Any, *inputs: Array, **conditions) -> int:
    """Bytes that the tape of one forward keeps for its pullback, without the layers' own arrays and
    the adapters': measured, on these inputs, by running it.

    An input of a layer is kept where an adapter on it needs it for its gradients. The output, what
    single operations take for a moment, and what a pullback needs while it runs, comes on top.
    """
    _, pullback = engine.vjp(*inputs, **conditions)
    tape = inspect.getclosurevars(pullback).nonlocals["tape"]
    if not isinstance(tape, Tape):
        raise LycorisError("the engine's pullback holds no tape")
    own = [a for layer in engine.layers.values() for a in (layer.weight, layer.bias)]
    for attached in engine.attachments.values():
        for one in (attached.parameters, attached.kept):
            own += [array for factors in one.values() for array in factors.values()]
        own += attached.scales.values()
    given = {_buffer(array)[0] for array in own if array is not None}
    sizes = dict(_buffer(array) for array in _arrays(tape.entries))
    return sum(size for key, size in sizes.items() if key not in given)


def _buffer(array: Array) -> tuple[int, int]:
    """(what two views of one buffer share, its bytes)."""
    if on_gpu(array):
        memory: Any = array.data
        return memory.mem.ptr, memory.mem.size
    while isinstance(array.base, np.ndarray):
        array = array.base
    return id(array), array.nbytes


def _arrays(root: Any) -> Iterator[Array]:
    """Every array that something holds, through containers, closures and plain objects."""
    waiting, seen = [root], set()
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, np.ndarray) or on_gpu(one):
            yield one
        else:
            waiting += _held(one)


def _held(one: Any) -> Iterable[Any]:
    if isinstance(one, Mapping):
        return one.values()
    if isinstance(one, (list, tuple, set)):
        return one
    if isinstance(one, partial):
        return [one.func, one.args, one.keywords]
    if inspect.ismethod(one):
        return [one.__self__, one.__func__]
    if inspect.isfunction(one):
        cells = [c.cell_contents for c in one.__closure__ or () if _filled(c)]
        return [*cells, *(one.__defaults__ or ())]
    if isinstance(one, type) or not type(one).__module__.startswith("lycoris_cupy"):
        return []
    slots = [getattr(one, n) for n in getattr(one, "__slots__", ()) if hasattr(one, n)]
    return [*slots, *getattr(one, "__dict__", {}).values()]


def _filled(cell) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False
