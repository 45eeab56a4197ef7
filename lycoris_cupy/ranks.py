"""RankRule: how many singular values to keep.

    rank N         N of them                             `fixed` of the reference
    threshold T    those above T                         strict
    ratio P        those above P times the largest       strict
    quantile P     those before the running sum reaches P times the sum of all; one fewer than is
                   needed to reach it, as the reference counts
    energy P       the fewest whose squares hold the share P of all squares
    error P        the fewest that leave out at most P of the Frobenius norm

At least 1, at most `most` and the sides of the matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .errors import LycorisError
from .svd import Svd

KINDS = ("rank", "threshold", "ratio", "quantile", "energy", "error")


@dataclass(frozen=True)
class RankRule:
    """kind: of KINDS. most: a cap whatever the rule says, or None. Raises LycorisError for a value
    out of place.
    """

    kind: str
    value: float
    most: int | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise LycorisError(f"rank rule {self.kind!r} is none of {', '.join(KINDS)}")
        value = self.value
        if self.kind == "rank" and not (value == int(value) and value >= 1):
            raise LycorisError(f"rank is {value:g}, expected a whole number of 1 or more")
        if self.kind == "threshold" and not 0 <= value < float("inf"):
            raise LycorisError(f"threshold is {value:g}, expected 0 or more")
        if self.kind not in ("rank", "threshold") and not 0 <= value <= 1:
            raise LycorisError(f"{self.kind} is {value:g}, expected a share between 0 and 1")
        if self.most is not None and self.most < 1:
            raise LycorisError(f"the largest rank is {self.most}, expected 1 or more")

    @property
    def needs_all(self) -> bool:
        """Whether the values that are left out count singly, not just by the sum of squares."""
        return self.kind == "quantile"

    @property
    def cap(self) -> int | None:
        """A rank that is never exceeded, or None."""
        caps = [self.most] if self.most is not None else []
        return min([*caps, int(self.value)]) if self.kind == "rank" else (caps or [None])[0]

    def choose(self, svd: Svd, norm: float | None = None) -> int:
        """The rank for these values, falling. norm: Frobenius norm of the whole matrix, where the
        values are only the largest of it.
        """
        values = svd.values
        if not values.size or not values[0]:
            return 1
        found = min(max(self._count(values, norm), 1), values.size)
        return found if self.most is None else min(found, self.most)

    def decided(self, svd: Svd, norm: float) -> bool:
        """Whether these largest values alone tell the rank."""
        if self.cap is not None and svd.values.size >= self.cap:
            return True
        return not self.needs_all and self._count(svd.values, norm) < svd.values.size

    def _count(self, values: np.ndarray, norm: float | None) -> int:
        if self.kind == "rank":
            return int(self.value)
        if self.kind == "threshold":
            return int((values > self.value).sum())
        if self.kind == "ratio":
            return int((values > self.value * values[0]).sum())
        if self.kind == "quantile":
            return int((np.cumsum(values) < self.value * values.sum()).sum())
        whole = float((values**2).sum()) if norm is None else norm**2
        kept = self.value if self.kind == "energy" else 1 - self.value**2
        # What rounding leaves of a sum of squares is not worth a singular value.
        reached = np.cumsum(values**2) >= (kept - 1e-12) * whole
        return int(np.argmax(reached)) + 1 if reached.any() else values.size + 1
