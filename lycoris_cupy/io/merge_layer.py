"""The arithmetic of a merge, one layer at a time: W + sum of strength * scale * change, summed in
f32 (f64 for an f64 base) and rounded once.

A weight stays in the file's order, (OUT, IN, *kernel); changes are (taps, IN, OUT). They meet in
blocks of outputs small enough to stay in the caches, each of which is changed, rounded and measured
before the next: where algorithms allow it no more of a change is ever in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import lcm
from typing import NamedTuple

import ml_dtypes
import numpy as np

from ..adapters import Adapter
from ..adapters.rows import row_unit, slice_rows
from ..arrays import device_context, f64, on_gpu, to_device
from ..errors import FileFormatError
from .header import NUMPY
from .rounding import Survival, rounded, sum_dtype, widened

_BLOCK = 384 << 10  # numbers a block: f32, it and its temporaries stay in the caches
_NAMES = {dtype: name for name, dtype in NUMPY.items()}
# One block in so many tells what survives rounding well enough; measuring costs as much as merging.
_MEASURED = 8


class Part(NamedTuple):
    """One adapter's part in one layer. params: factors in Flame layout, as in the file."""

    adapter: Adapter
    params: Mapping[str, np.ndarray]
    strength: float


@np.errstate(over="ignore", invalid="ignore")  # `_rounded_block` says it
def merge_into(
    name: str, weight: np.ndarray, parts: Sequence[Part], device: str = "cpu"
) -> Survival:
    """Change a weight in place, rounded once to its dtype; what survived the rounding (of an eighth
    of the blocks of a large one).

    device: where the changes are computed; those of an f64 weight on the CPU always. Raises
    FileFormatError for a sum that the dtype cannot hold, when the weight is half changed; name: of
    the tensor, for that message.
    """
    outputs, inputs = (*weight.shape, 1)[:2]  # a norm's weight has one axis
    matrix, survival = weight.reshape(outputs, inputs, -1), Survival()
    assert np.shares_memory(matrix, weight) or not weight.size
    for i, (rows, change) in enumerate(_changes(matrix, parts, device)):
        wide = widened(matrix[rows])
        new = _rounded_block(name, matrix[rows], wide + change)
        if i % _MEASURED == 0:
            survival = survival.plus(_survival(change, widened(new) - wide))
        matrix[rows] = new
    return survival


@np.errstate(over="ignore", invalid="ignore")
def merged_bias(name: str, old: np.ndarray, parts: Sequence[Part], new: bool = False) -> np.ndarray:
    """The changed bias, (OUT,), in the dtype of the old one. new: the layer has none, old is zero.
    Raises as `merge_into` does.
    """
    kept = sum_dtype(old.dtype)
    total = widened(old).astype(kept)
    before = None if new else total.copy()
    for adapter, params, strength in parts:
        change = adapter.delta_bias(params, before)
        if change is not None:
            total += np.asarray(strength * adapter.scale, kept) * change.astype(kept)
    return _rounded_block(name, old, total)


def _changes(
    before: np.ndarray, parts: Sequence[Part], device: str
) -> Iterator[tuple[slice, np.ndarray]]:
    """Blocks of outputs with their change, (rows, IN, taps) wide; computed block by block where
    every adapter can be taken apart.
    """
    step = max(_BLOCK // max(before.shape[1] * before.shape[2], 1), 16)
    units = [row_unit(part.adapter) for part in parts]
    apart = None not in units
    if apart:
        unit = lcm(*units)  # pyright: ignore
        step = max(step // unit, 1) * unit
    whole = None if apart else _change(before, parts, device)
    for at in range(0, len(before), step):
        rows = slice(at, min(at + step, len(before)))
        if whole is None:
            own = [Part(*slice_rows(a, p, rows.start, rows.stop), s) for a, p, s in parts]
            change = _change(before[rows], own, device)
        else:
            change = whole[rows]
        # Turned in the cache, where strides cost little.
        contiguous = change.flags.c_contiguous
        yield rows, change if contiguous else np.ascontiguousarray(change.T).T


def _change(before: np.ndarray, parts: Sequence[Part], device: str) -> np.ndarray:
    """The sum of all changes of a weight (OUT, IN, taps), in that order, wide, on the CPU."""
    kept = sum_dtype(before.dtype)
    if kept == f64:
        device = "cpu"  # the kernels know bf16 and f32
    with device_context(device):
        total = base = None
        if any(part.adapter.reads_weight for part in parts):
            base = to_device(to_device(widened(before), device).transpose(2, 1, 0), device)
        for adapter, params, strength in parts:
            wide = adapter.canonical(
                {key: to_device(value.astype(kept), device) for key, value in params.items()}
            )
            scale = to_device(np.array([strength * adapter.scale], kept), device)
            change = adapter.delta_weight(base, wide, scale)
            total = change if total is None else total + change
        assert total is not None, "a layer is merged for the sake of a part"
        turned = total.transpose(2, 1, 0)
        return to_device(turned, "cpu") if on_gpu(turned) else turned


def _rounded_block(name: str, old: np.ndarray, total: np.ndarray) -> np.ndarray:
    out = rounded(total, old.dtype)
    largest = max(total.max(initial=0), -total.min(initial=0))
    if not largest <= float(ml_dtypes.finfo(old.dtype).max):  # NaN too
        if (np.isfinite(widened(old)) & ~np.isfinite(widened(out))).any():
            raise FileFormatError(
                f"the merged {name!r} has values that {_NAMES[old.dtype]} cannot hold: lower the "
                "strength, or merge into a base of a wider dtype"
            )
    return out


def _survival(asked: np.ndarray, got: np.ndarray) -> Survival:
    asked, got = np.ascontiguousarray(asked).reshape(-1), got.reshape(-1)
    lost = got - asked
    return Survival(*(float(np.dot(a, b)) for a, b in ((asked, asked), (asked, got), (lost, lost))))
