"""An optimizer's masters of one dtype and the state beside them, in flat buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..arrays import Array, bf16, f32, module_of, on_gpu, wide_dtype
from .flat import Layout
from .multi import Table
from .nested import Nested
from .rounding import rounded

DRAWN = 1 << 17  # random bits that NumPy draws at a time: their cost is in the number of calls


class Group:
    """masters: (length,) of f32, f64, or bf16 without anything wider. slots: state, wide; start
    makes it of the first values. Raw kernels find their way by `table`, NumPy by the layout.
    """

    def __init__(self, layout: Layout, dtype: np.dtype, parameters: Nested, start: Callable):
        arrays = layout.listed(parameters)
        xp = module_of(arrays[0])
        self.layout = layout
        self.wide = wide_dtype(dtype)
        self.masters = layout.fill(xp.empty(layout.length, dtype), parameters)
        self.slots: tuple[Array, ...] = start(self.masters.astype(self.wide))
        self.table: Any = Table(layout, arrays[0]) if on_gpu(arrays[0]) else None

    def state(self) -> list[Array]:
        return [self.masters, *self.slots]

    def blocks(
        self, wide: Array, grads: Nested, clip: Array | None = None
    ) -> Iterator[tuple[int, Array, Array, list[Array]]]:
        """(row, masters, gradients, slots) of every block, for NumPy. wide: the masters, wide.
        clip: what gradients are multiplied by.
        """
        for block in self.layout.blocks:
            g = block.gathered(grads, self.wide)
            g = g if clip is None else g * clip
            yield block.row, wide[block.own], g, [slot[block.own] for slot in self.slots]

    def squares(self, grads: Nested) -> float:
        """The sum of all gradients' squares, by NumPy."""
        found = (block.gathered(grads, self.wide) for block in self.layout.blocks)
        return sum(float((g * g).sum()) for g in found)

    def widened(self) -> Array:
        """The masters, wide: themselves, or a copy of those that are bf16."""
        return self.masters.astype(f32) if self.masters.dtype == bf16 else self.masters

    def keep(self, wide: Array, seed: int, clock: Array) -> None:
        """Round what `widened` gave, and a step changed, back into bf16."""
        if wide is not self.masters:
            for block in self.layout.cut(DRAWN):
                self.masters[block.own] = rounded(wide[block.own], block.bits(seed, clock))
