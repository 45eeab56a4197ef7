"""BOFT: outputs turned by a butterfly of block rotations, stage by stage mixing what lies further
apart.  Liu et al. 2024, arXiv 2311.06243.

    stage i, k = 2^i B / 2:   o = (2 a + t) k + j  stands at place  (a k + j) 2 + t,  t in 0, 1
                              v[places of block b] <- R[i, b] v[places of block b]
    weight'[t, i, o] = c[o] v[o],  starting from v = weight[t, i, :]

R is applied as it is, where Diag-OFT applies its transpose. Activations are turned where they have
fewer rows than the weight, the weight otherwise. File keys: oft_blocks (stages, blocks, B, B),
rescale (O, 1, *1), alpha.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from ..arrays import Array
from ..errors import LycorisError, ShapeError
from ..layers import Layer, LayerShape
from ..ops import elementwise
from ..ops.cayley import cayley, rotation_columns
from ..ops.elementwise import add, cast
from ..ops.magnitude import shifted
from ..ops.product import product
from ..ops.ranks import take_rows
from ..ops.scale_columns import scale_columns
from ..ops.shapes import reshape, transpose
from ..ops.window import Window
from .base import Adapter, Parameters
from .dora import nothing
from .factor import Factor, require
from .oft import BLOCKS, LYCORIS, Rotation, dialect_of


def power2_factorization(size: int, factor: int) -> int:
    """The largest even divisor B <= factor of size (any, if factor is negative) with size / B a
    power of two. Raises ShapeError if there is none.
    """
    most = size if factor < 0 else min(factor, size)
    for block in range(most - most % 2, 0, -2):
        if size % block == 0 and (size // block).bit_count() == 1:
            return block
    smallest = size // (size & -size) * 2
    advice = f"use {smallest} or more" if size % 2 == 0 else "an odd number has none"
    raise ShapeError(
        f"no even block size up to {factor} leaves a power of two of blocks of {size} outputs: "
        f"{advice}"
    )


@dataclass(frozen=True)
class BOFT(Rotation):
    """See Rotation. The stages are log2(blocks) + 1."""

    algorithm = "boft"
    keys = (BLOCKS, "rescale")
    marks = ()  # those of Diag-OFT, with another axis in its blocks

    def __post_init__(self):
        super().__post_init__()
        if self.dialect != LYCORIS:
            raise LycorisError(f"boft is known as {LYCORIS}, but dialect is {self.dialect!r}")
        if self.block_size % 2 or self.blocks.bit_count() != 1:
            raise ShapeError(
                f"{self.blocks} blocks of {self.block_size}: boft needs a power of two of blocks "
                "of an even size"
            )

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
        rule: str = "base",
    ) -> Adapter:
        """A new adapter. block_size: by default the largest up to `rank` that fits the outputs."""
        size = power2_factorization(shape.outputs, rank) if block_size is None else block_size
        return cls(shape, block_size=size, constraint=constraint, rescaled=rescaled, rule=rule)

    @property
    def stages(self) -> int:
        return self.blocks.bit_length()

    def factors(self) -> dict[str, Factor]:
        size = self.block_size
        return {
            "blocks": Factor(BLOCKS, plain=(self.stages, self.blocks, size, size)),
            **self.rescale_factor(),
        }

    def _turned(self, v: Array, p: Parameters, scale: Array) -> Array:
        """The change of v (rows, OUT), in its dtype, by the adapter at this strength.

        What the stages add is kept apart from v, so that it keeps its digits.
        """
        size, blocks, stages = self.block_size, self.blocks, self.stages
        a = reshape(p["blocks"], (stages * blocks, size, size))
        e = cayley(a, limit=self.limit)
        every = reshape(e, (stages, blocks * size * size))
        by_stage = scale if self.rule == "reference" else None
        window, change = Window(groups=blocks), None
        for stage in range(stages):
            one = take_rows(every, stage, stage + 1)
            columns = rotation_columns(reshape(one, (blocks, size, size)), turned=True)
            half = 2**stage * size // 2
            at = _placed(v if change is None else add(v, change), half)
            before = None if change is None else _placed(change, half)
            after = product(at, columns, window, add=before, scale=by_stage)
            change = _placed(after, half, back=True)
        assert change is not None
        return self._finished(v, change, p, scale)

    def _finished(self, v: Array, change: Array, p: Parameters, scale: Array) -> Array:
        """strength * (c * (v + change) - v), or c * (v + change) - v by the rule 'reference'."""
        c = self.rescale(p, scale)
        if c is not None:
            # c (v + change) - v = c change + (c - 1) v
            rest = scale_columns(v, shifted(c, nothing(scale) + 1, nothing(c)))
            change = scale_columns(change, c, add=rest)
        return change if self.rule == "reference" else elementwise.scale(change, scale)

    def delta_weight(self, weight: Array, p: Parameters, scale: Array) -> Array:
        weight = cast(weight, scale.dtype)
        rows = reshape(weight, (prod(weight.shape[:-1]), weight.shape[-1]))
        return reshape(self._turned(rows, p, scale), weight.shape)

    def costs(self) -> dict[str, int]:
        costs = super().costs()
        if self.shape.window.groups == 1:
            costs["outputs"] = costs["delta"] + self.stages * self.shape.outputs * self.block_size
        return costs

    def apply(
        self,
        change: Array | None,
        layer: Layer,
        x: Array,
        p: Parameters,
        scale: Array,
        columns: Array | None = None,
    ) -> Array:
        rows = prod(x.shape[:-1])
        # Stages mix outputs of all groups, which read other inputs each: only the weight may turn.
        if self.shape.window.groups > 1 or rows > self.shape.taps * self.shape.inputs:
            return super().apply(change, layer, x, p, scale)
        y = product(x, layer.matrix, layer.window)
        turned = self._turned(reshape(y, (prod(y.shape[:-1]), y.shape[-1])), p, scale)
        turned = reshape(turned, y.shape)
        return turned if change is None else add(change, turned)

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
    ) -> BOFT:
        require(tensors, BLOCKS)
        blocks = tensors[BLOCKS].shape
        if len(blocks) != 4:
            raise ShapeError(f"{BLOCKS} has shape {blocks}, expected (stages, blocks, B, B)")
        return cls(
            shape, block_size=blocks[2], constraint=alpha or 0.0, rescaled="rescale" in tensors,
            dialect=dialect_of(tensors, alpha, dialect, prefix, maker), rule=rule,
        )  # fmt: skip


def _placed(v: Array, half: int, *, back: bool = False) -> Array:
    """v (rows, OUT) with its columns in the places of a stage, or back where they were."""
    rows, outputs = v.shape
    pairs = (rows, outputs // (2 * half), *((half, 2) if back else (2, half)))
    return reshape(transpose(reshape(v, pairs), (0, 1, 3, 2)), v.shape)
