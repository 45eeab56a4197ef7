"""BOFT as PEFT has it: blocks of the inputs turned, and each output of the layer rescaled.

    W' = s * (W R),  R = (I + Q) (I - Q)^-1,  Q = (A - A^T) / 2

in torch's order, (OUT, IN) with the taps of a kernel behind their input. The bias is not rescaled.
Files of one butterfly factor: PEFT makes more of them only where its CUDA extension is compiled,
and those are refused. File keys: boft_R (1, blocks, B, B), boft_s (O, 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..arrays import Array
from ..errors import LycorisError, ShapeError
from ..layers import LayerShape
from ..ops import elementwise
from ..ops.cayley import cayley, rotation_columns
from ..ops.elementwise import add, cast
from ..ops.magnitude import shifted
from ..ops.scale_columns import spread_columns
from ..ops.shapes import reshape, transpose
from ..ops.turn import turn_blocks
from ..ops.window import Window
from .base import Parameters
from .dora import nothing
from .factor import Factor, require
from .oft import PEFT, Rotation


@dataclass(frozen=True)
class PeftBOFT(Rotation):
    """See Rotation; always rescaled, with PEFT's name for it."""

    dialect: str = PEFT
    rescaled: bool = True

    algorithm = "boft-peft"
    keys = ("boft_R", "boft_s")
    marks = keys
    drops = "blocks"  # what is left of one is Q = 0, the identity
    rank_axes = {"blocks": (1, 0)}
    told = ("rule",)

    def __post_init__(self):
        super().__post_init__()
        if self.dialect != PEFT or not self.rescaled:
            raise LycorisError(f"boft-peft is PEFT's: dialect {PEFT}, always rescaled")
        if self.shape.window.groups > 1:
            raise ShapeError(f"PEFT's boft turns inputs of all groups at once: not on {self.shape}")

    def factors(self) -> dict[str, Factor]:
        size, outputs = self.block_size, self.shape.outputs
        stored = (1, outputs) if self.shape.window.axes else (outputs, 1)
        return {
            "blocks": Factor("boft_R", plain=(1, self.blocks, size, size)),
            "rescale": Factor("boft_s", plain=(outputs,), stored=stored, wide=True),
        }

    def delta_weight(self, weight: Array, p: Parameters, scale: Array) -> Array:
        taps, inputs, outputs = weight.shape
        e = cayley(reshape(p["blocks"], p["blocks"].shape[1:]), factor=0.5)
        c = self.rescale(p, e)
        assert c is not None
        rows = reshape(transpose(cast(weight, e.dtype), (2, 1, 0)), (outputs, inputs * taps))
        by = scale if self.rule == "reference" else None
        turned = turn_blocks(rows, rotation_columns(e), scale=by)
        turned = transpose(reshape(turned, (outputs, inputs, taps)), (2, 1, 0))
        # c (W + turned) - W
        rest = spread_columns(cast(weight, e.dtype), shifted(c, nothing(scale) + 1, nothing(c)))
        change = add(spread_columns(turned, c), rest)
        return change if self.rule == "reference" else elementwise.scale(change, scale)

    @classmethod
    def guess_shape(cls, tensors: Mapping[str, np.ndarray]) -> LayerShape:
        blocks = (*tensors["boft_R"].shape, 1, 1, 1)[1:3] if "boft_R" in tensors else (1, 1)
        scales = tensors["boft_s"].shape if "boft_s" in tensors else (1, 1)
        on_conv = len(scales) == 2 and scales[0] == 1 != scales[1]  # (1, O), of PEFT's Conv2d
        window = Window.of((1, 1)) if on_conv else Window()
        return LayerShape(window, blocks[0] * blocks[1], max(scales, default=1))

    @classmethod
    def read(
        cls,
        shape: LayerShape,
        tensors: Mapping[str, np.ndarray],
        alpha: float | None,
        rule: str = "base",
    ) -> PeftBOFT:
        require(tensors, *cls.keys)
        blocks = tensors["boft_R"].shape
        if len(blocks) != 4:
            raise ShapeError(f"boft_R has shape {blocks}, expected (1, blocks, B, B)")
        if blocks[0] != 1:
            raise ShapeError(
                f"boft_R has {blocks[0]} butterfly factors, expected 1: PEFT makes more only with "
                "its CUDA extension; merge it there and take the difference of the weights"
            )
        return cls(shape, block_size=blocks[2], rule=rule)
