"""Diag-OFT: blocks of channels turned by learned rotations.  Qiu et al. 2023, arXiv 2306.07280.

    weight'[t, i, k B + m] = c[k B + m] * sum over n of weight[t, i, k B + n] * R[k, n, m]

The layer's own output is turned rather than its weight: y + s (y - bias) (R - I), one thin grouped
product beside the layer's. File keys: oft_blocks (blocks, B, B), rescale (O, 1, *1), alpha.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..arrays import Array
from ..errors import FileFormatError, ShapeError
from ..layers import Layer, LayerShape
from ..ops.cayley import cayley, rotation_columns
from ..ops.elementwise import cast
from ..ops.product import product
from ..ops.shapes import reshape
from ..ops.window import Window
from .base import Adapter, Parameters, Share, Turn
from .dora import nothing
from .factor import Factor, require
from .lokr import factorization
from .oft import BLOCKS, LYCORIS, Rotation, dialect_of


@dataclass(frozen=True)
class DiagOFT(Rotation):
    """See Rotation."""

    algorithm = "diag-oft"
    keys = (BLOCKS, "rescale")
    marks = keys  # BOFT has the same, and another axis in its blocks

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

    def _columns(self, p: Parameters, scale: Array) -> tuple[Array, Array | None]:
        """(columns of the grouped product that gives the change, wide; what to scale it by)."""
        e = cayley(p["blocks"], limit=self.limit)
        c = self.rescale(p, e)
        if self.rule == "base":
            return rotation_columns(e, c), scale
        return rotation_columns(e, c, scale), None

    def delta_weight(self, weight: Array, p: Parameters, scale: Array) -> Array:
        columns, scale_of_product = self._columns(p, scale)
        weight = cast(weight, columns.dtype)
        return product(weight, columns, Window(groups=self.blocks), scale=scale_of_product)

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
        turning, scale_of_product = self._columns(p, scale)
        window = layer.window.pointwise_like(self.blocks)
        return product(y, turning, window, add=change, scale=scale_of_product)

    def contribute(
        self, change: Array | None, layer: Layer, x: Array, p: Parameters, scale: Array
    ) -> tuple[Array | None, Share | Turn | None]:
        if self.route == "delta":
            return self.apply(change, layer, x, p, scale), None
        columns, factor = self._columns(p, scale)
        window = layer.window.pointwise_like(self.blocks)
        bias = None
        if layer.bias is not None:  # y has it, and it is not turned
            row = reshape(layer.bias, (1, layer.bias.shape[0]))
            minus = nothing(scale) - 1 if factor is None else -factor
            turned = product(row, columns, Window(groups=self.blocks), scale=minus)
            bias = reshape(turned, (layer.bias.shape[0],))

        def turn(y: Array, change: Array | None) -> Array:
            return product(y, columns, window, bias=bias, add=change, scale=factor)

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
