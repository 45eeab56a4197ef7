"""Running sums and averages of arrays that come anew every time, kept in one flat buffer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..arrays import Array, module_of, on_gpu
from .flat import Layout
from .multi import Table
from .nested import Nested, Own, common_dtype


class Running:
    """Zeros in the wide dtype for arrays of these shapes. views: layer -> factor -> array. flat:
    all of them in one array, which nothing else is in.
    """

    def __init__(self, like: Nested):
        self._layout, self._dtype = Layout(like), common_dtype(like)
        some: Sequence[Array] = self._layout.listed(like)[:1] or [np.zeros(0)]
        self.flat = module_of(some[0]).zeros(self._layout.length, self._dtype)
        self._table = Table(self._layout, some[0]) if on_gpu(some[0]) else None
        self.views: Own = self._layout.nested(self.flat)

    def fill(self, nested: Nested) -> None:
        """Set to these values."""
        self._layout.fill(self.flat, nested)

    def clear(self) -> None:
        self.flat.fill(0)

    def copies(self, factor: float = 1.0) -> Own:
        """factor times the values, in new arrays."""
        return self._layout.nested(self.flat * factor)

    def add(self, nested: Nested, weight: float) -> None:
        """values += weight * nested."""
        self._approach(nested, weight, 0.0)

    def approach(self, nested: Nested, share: float) -> None:
        """values += share * (nested - values)."""
        self._approach(nested, share, 1.0)

    def _approach(self, nested: Nested, share: float, pull: float) -> None:
        arrays = self._layout.listed(nested)
        if self._table is not None:
            sources = self._table.sources(arrays, self._dtype)
            self._table.launch("approach", self._dtype, sources, self.flat, share, pull)
            return
        for spot, array in zip(self._layout.spots, arrays, strict=True):
            value, source = spot.of(self.flat), array.astype(self._dtype, copy=False)
            value += share * (source - value if pull else source)
