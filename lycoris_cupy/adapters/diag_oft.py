"""Diag-OFT: blocks of channels turned by learned rotations.  Qiu et al. 2023, arXiv 2306.07280.

    weight'[t, i, k B + m] = c[k B + m] * sum over n of weight[t, i, k B + n] * R[k, n, m]

The layer's own output is turned rather than its weight: y + s (y - bias) (R - I), one more pass
over it. File keys: oft_blocks (blocks, B, B), rescale (O, 1, *1), alpha.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..arrays import Array, module_of, wide_dtype
from ..errors import FileFormatError, ShapeError
from ..layers import Layer, LayerShape
from ..ops.cayley import cayley, rotation_columns
from ..ops.elementwise import add, cast, multiply
from ..ops.product import product
from ..ops.turn import turn_blocks
from ..tape import value_of
from .base import Adapter, DropRanks, Parameters, Share, Turn
from .factor import Factor, require
from .factorization import factorization
from .oft import BLOCKS, LYCORIS, Rotation, dialect_of


@dataclass(frozen=True)
class DiagOFT(Rotation):
    """See Rotation."""

    algorithm = "diag-oft"
    keys = (BLOCKS, "rescale")
    marks = keys  # BOFT has the same, and another axis in its blocks
    drops = "entries"

    @classmethod
    def create(
        cls,
        shape: LayerShape,
        rank: int = 4,
        alpha: float | None = None,
        *,
        block_size: int | None = None,
        constraint: float = 0.0,
        rescaled: bool = False,
        dialect: str = LYCORIS,
        rule: str = "base",
    ) -> Adapter:
        """A new adapter. block_size: by default the reference's, of `rank` and the outputs."""
        size = factorization(shape.outputs, rank)[0] if block_size is None else block_size
        return cls(
            shape, block_size=size, constraint=constraint, rescaled=rescaled, dialect=dialect,
            rule=rule,
        )  # fmt: skip

    def factors(self) -> dict[str, Factor]:
        size = self.block_size
        return {
            "blocks": Factor(BLOCKS, plain=(self.blocks, size, size)),
            **self.rescale_factor(),
        }

    def _matrices(self, p: Parameters, scale: Array) -> tuple[Array, Array | None]:
        """(what blocks of outputs are multiplied by to give the change, wide; its scale)."""
        e = cayley(p["blocks"], limit=self.limit)
        if "mask" in p:  # mask * (I + e) - I
            rest = (p["mask"] - 1) * module_of(p["mask"]).eye(self.block_size, dtype=e.dtype)
            e = add(multiply(e, p["mask"]), rest)
        c = self.rescale(p, e)
        if self.rule == "base":
            return rotation_columns(e, c), scale
        return rotation_columns(e, c, scale), None

    def delta_weight(self, weight: Array, p: Parameters, scale: Array) -> Array:
        matrices, factor = self._matrices(p, scale)
        return turn_blocks(cast(weight, matrices.dtype), matrices, scale=factor)

    def drop_ranks(self, p: Parameters, drop: DropRanks) -> dict[str, Array]:
        """With the mask of the entries of the rotations, what stays of them times 1 / (1 - p)."""
        blocks = value_of(p["blocks"])
        ones = module_of(blocks).ones(blocks.shape, wide_dtype(blocks.dtype))
        return {**p, "mask": drop(ones, None, 0)}

    @property
    def turns_outputs(self) -> bool:
        """Whether the outputs may be turned: not where a block mixes those of two groups, which
        read other inputs each.
        """
        groups = self.shape.window.groups
        return self.shape.outputs // groups % self.block_size == 0

    def costs(self) -> dict[str, int]:
        costs = super().costs()
        if self.turns_outputs:
            costs["outputs"] = self.shape.outputs * self.block_size
        return costs

    @property
    def route(self) -> str:
        # To build the change costs the layer's own product again, and in training a third one.
        return "outputs" if self.turns_outputs else "delta"

    def apply(
        self,
        change: Array | None,
        layer: Layer,
        x: Array,
        p: Parameters,
        scale: Array,
        columns: Array | None = None,
    ) -> Array:
        if self.route == "delta":
            return super().apply(change, layer, x, p, scale)
        y = product(x, layer.matrix, layer.window)
        matrices, factor = self._matrices(p, scale)
        return turn_blocks(y, matrices, add=change, scale=factor)

    def contribute(
        self, change: Array | None, layer: Layer, x: Array, p: Parameters, scale: Array
    ) -> tuple[Array | None, Share | Turn | None]:
        if self.route == "delta":
            return self.apply(change, layer, x, p, scale), None
        matrices, factor = self._matrices(p, scale)

        def turn(y: Array, total: Array) -> Array:
            return turn_blocks(y, matrices, bias=layer.bias, add=total, scale=factor)

        return change, turn

    @classmethod
    def read(
        cls,
        shape: LayerShape,
        tensors: Mapping[str, np.ndarray],
        alpha: float | None,
        dialect: str | None = None,
        rule: str = "base",
        prefix: str = "lycoris_",
        maker: str = "",
    ) -> DiagOFT:
        require(tensors, BLOCKS)
        blocks = tensors[BLOCKS].shape
        if len(blocks) != 3:
            raise ShapeError(f"{BLOCKS} has shape {blocks}, expected (blocks, B, B)")
        dialect = dialect_of(tensors, alpha, dialect, prefix, maker)
        if dialect != LYCORIS and alpha is None:
            raise FileFormatError(f"alpha is missing: in {dialect} it is the constraint")
        return cls(
            shape, block_size=blocks[1], constraint=alpha or 0.0, rescaled="rescale" in tensors,
            dialect=dialect, rule=rule,
        )  # fmt: skip
