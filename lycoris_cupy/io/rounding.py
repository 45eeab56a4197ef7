"""Between the dtypes of checkpoints and the dtype of sums: widening, one rounding, and how much of
a change survives it.

ml_dtypes converts bf16 as fast as memory allows, but an 8-bit float takes it 6 to 7 ns: those go
through tables here, in a third of the time, to the same bits.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import ml_dtypes
import numpy as np

from ..arrays import f32, f64

# What a merge can round to. F8_E8M0 has powers of two only, the FNUZ kinds another zero.
MERGED_DTYPES = ("BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2")


class Survival(NamedTuple):
    """How much of a change D is left when W + D is rounded, for one tensor or for a sum of them.

    asked: |D|^2. along: the inner product of D and the change that arrived. lost: the square of the
    distance between the two.
    """

    asked: float = 0.0
    along: float = 0.0
    lost: float = 0.0

    @property
    def share(self) -> float:
        """The part of the change that arrives in its own direction: 1 if all does."""
        return self.along / self.asked if self.asked else 1.0

    @property
    def error(self) -> float:
        """The distance of what arrives from what was asked, over the size of what was asked."""
        return float(np.sqrt(self.lost / self.asked)) if self.asked else 0.0

    def __str__(self) -> str:
        return f"{self.share:.1%} of the change survives, with a relative error of {self.error:.3g}"

    def plus(self, other: Survival) -> Survival:
        """That of both tensors together."""
        return Survival(*(a + b for a, b in zip(self, other, strict=True)))


def sum_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype that sums are kept in: f64 for f64, f32 for all others."""
    return f64 if dtype == f64 else f32


def widened(array: np.ndarray) -> np.ndarray:
    """The same values in the dtype of sums."""
    if array.dtype.itemsize == 1:
        return _wide_table(array.dtype)[array.view(np.uint8)]
    return array.astype(sum_dtype(array.dtype), copy=False)


def rounded(total: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Sums rounded once, to nearest, ties to even; beyond the largest value infinite or NaN."""
    if dtype.itemsize > 1 or total.dtype != f32:
        return total.astype(dtype)
    bits = total.view(np.uint32)
    # Rounded to odd first: 16 bits with the rest of the number as one sticky bit. They have more
    # than the two bits over an 8-bit float's that make the second rounding the only one.
    odd = (bits >> 16).astype(np.uint16)
    odd |= (bits & 0xFFFF) != 0
    return _narrow_table(dtype)[odd].view(dtype)


@cache
def _wide_table(dtype: np.dtype) -> np.ndarray:
    return np.arange(256, dtype=np.uint8).view(dtype).astype(f32)


@cache
def _narrow_table(dtype: np.dtype) -> np.ndarray:
    every = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    with np.errstate(invalid="ignore", over="ignore"):
        return every.astype(f32).astype(dtype).view(np.uint8)
