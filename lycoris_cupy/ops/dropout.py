"""dropout: what a draw keeps of an array; kept_gain: what makes up for the rest.

Masks are not stored. Entry m of one is 1 where word m of `philox.random_bits`, with the seed as key
and (tensor, step, kind) in the counter, is at least the probability of a drop times 2^32: the same
on every device, in every replay of a captured graph that has moved the step on, and again when the
gradient asks for it.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import numpy as np

from ..arrays import Array, like, on_gpu, require_float, require_same, wide, wide_dtype
from ..errors import DtypeError, LycorisError, ShapeError
from ..kernels import kernel
from ..philox import random_bits
from ..tape import Primitive, Var, value_of
from .elementwise import require_factor

ELEMENTS, RANKS, MODULE = 1, 2, 3  # kinds of draws; 0 is the optimizers' rounding


class Draw(NamedTuple):
    """Which random numbers. probability: of a drop, 0 to below 1. seed: below 2^64, the key.
    tensor, kind: below 2^32, words of the counter.
    """

    probability: float
    seed: int
    tensor: int = 0
    kind: int = ELEMENTS

    @property
    def threshold(self) -> int:
        """The least 32-bit number that is kept."""
        return min(round(self.probability * 2**32), 2**32 - 1)

    @property
    def inverse(self) -> float:
        """1 / (1 - probability): with this factor the mean of what is kept is the whole."""
        return 1 / (1 - self.probability)


def dropout(
    x: Array,
    draw: Draw,
    step: Array,
    *,
    axis: int | None = None,
    gain: float | Array = 1.0,
    add: Array | None = None,
) -> Array:
    """add + gain * keep * x, summed wide, rounded once to the dtype of x; keep is 0 or 1.

    axis: one entry of keep for each place along it; None: for each element. step: (1,) u32 on the
    device of x, a constant. gain: a number, or (1,) in the wide dtype of x, a constant. add: like
    x. Where keep is 0, x does not count, be it infinite. Srivastava et al. 2014, JMLR 15.
    Raises ShapeError, DtypeError, LycorisError.
    """
    require_float(value_of(x), "x")
    _require_draw(draw, step)
    if add is not None:
        require_same("x", value_of(x), "add", value_of(add))
        if tuple(add.shape) != tuple(x.shape):
            raise ShapeError(f"add has shape {tuple(add.shape)}, expected {tuple(x.shape)}")
    entries, inner = prod(x.shape), 1
    if axis is not None:
        if not -x.ndim <= axis < x.ndim:
            raise ShapeError(f"axis {axis} is none of the {x.ndim} axes of x {tuple(x.shape)}")
        entries, inner = x.shape[axis], prod(x.shape[axis % x.ndim + 1 :])
    if entries > 2**34:  # 2^32 counters of four words
        raise ShapeError(f"a mask of {entries} entries: one has at most 2^34")
    factor, array = (float(gain), None) if isinstance(gain, (int, float)) else (1.0, gain)
    if array is not None:
        require_factor(array, x)
    return _dropout(x, add, step, array, draw=draw, entries=entries, inner=inner, factor=factor)


def kept_gain(entries: int, draw: Draw, step: Array, dtype) -> Array:
    """entries / how many of them the draw keeps, (1,) in the wide dtype of dtype; 0 if it keeps
    none.

    The gain by which `dropout` along an axis of so many places keeps the mean of its mask at 1.
    Raises LycorisError, DtypeError.
    """
    _require_draw(draw, step)
    kept = wide_dtype(dtype)
    if not on_gpu(step):
        count = int((random_bits((entries,), *_numbers(draw, step)) >= draw.threshold).sum())
        return np.full(1, entries / count if count else 0.0, kept)
    import cupy

    out = cupy.empty(1, kept)
    low, high = _key(draw)
    kernel("dropout.cu", "kept_gain", kept)(
        (1,), (256,), step, out, entries, draw.threshold, low, high, draw.tensor, draw.kind
    )
    return out


def _require_draw(draw: Draw, step: Array) -> None:
    if not 0 <= draw.probability < 1:
        raise LycorisError(
            f"the probability of a drop is {draw.probability}, expected 0 to below 1"
        )
    if isinstance(step, Var) or step.dtype != np.uint32 or tuple(step.shape) != (1,):
        raise DtypeError(
            f"step has shape {tuple(step.shape)} and dtype {step.dtype}, expected (1,) and uint32"
        )


def _numbers(draw: Draw, step: Array) -> tuple:
    """What `random_bits` takes behind the shape."""
    return int(draw.seed), step, draw.tensor, draw.kind


def _key(draw: Draw) -> tuple[int, int]:
    seed = int(draw.seed)
    return seed & 0xFFFFFFFF, seed >> 32


def _cpu(x, add, step, gain, *, draw, entries, inner, factor):
    keep = random_bits((entries,), *_numbers(draw, step)) >= draw.threshold
    seen = wide(x).reshape(-1, entries, inner) if x.size else wide(x)
    if x.size:
        by = seen.dtype.type(factor) if gain is None else gain
        # Chosen, not multiplied: an infinite element that is dropped must not leave a NaN.
        seen = np.where(keep[:, None], seen * by, seen.dtype.type(0)).reshape(x.shape)
    return like(seen if add is None else wide(add) + seen, x)


def _gpu(x, add, step, gain, *, draw, entries, inner, factor):
    import cupy

    out = cupy.empty(x.shape, x.dtype)
    if out.size:
        width = 4 * x.dtype.itemsize
        aligned = all(a is None or a.data.ptr % width == 0 for a in (x, add, out))
        low, high = _key(draw)
        kernel("dropout.cu", "dropout", x.dtype)(
            (min((x.size + 1023) // 1024, 65535),), (256,), x, add, step, gain, out, x.size,
            entries, inner, draw.threshold, low, high, draw.tensor, draw.kind, factor,
            int(aligned and x.size % 4 == 0),
        )  # fmt: skip
    return out


def _vjp(needs, out, x, add, step, gain, **static):
    def pull(g):
        dx = (_gpu if on_gpu(g) else _cpu)(g, None, step, gain, **static) if needs[0] else None
        return dx, g if needs[1] else None, None, None

    return pull


# Factors are dropped from too, and their gradients stay wide: they end in sums.
_dropout = Primitive("dropout", _cpu, _gpu, _vjp, keeps_wide=True)
