"""What Diag-OFT and BOFT share: rotations of blocks of channels, their files and their dialects.

    Q = A - A^T of each block        R = (I + Q) (I - Q)^-1        rescale: a factor for each output

A file does not say whose it is, and they differ in meaning:

    oft:lycoris   outputs are rotated; alpha is the constraint: |Q| over all blocks is at most alpha
                  times the outputs; 0 is no constraint; may hold `rescale`
    oft:kohya     the same, but alpha 0 holds Q at 0, and there is no rescale; prefix oft_unet_
    oft:peft      inputs are rotated, and other rules hold: see peft_oft.py

Strength by the rule 'base' is W + strength * (W' - W), by 'reference' what LyCORIS does: rotations
fade (BOFT: each stage for itself), rescale does not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..arrays import Array
from ..errors import FileFormatError, LycorisError, ShapeError
from ..layers import LayerShape
from ..ops.elementwise import cast
from ..ops.window import Window
from .base import RULES, Parameters
from .factor import Factor, extents
from .unranked import Unranked

LYCORIS, KOHYA, PEFT = DIALECTS = ("oft:lycoris", "oft:kohya", "oft:peft")
EXACT = "oft:peft-exact"  # PEFT's, turned by the exact transform instead of its series
READINGS = (*DIALECTS, EXACT)  # what a caller may say of a file
BLOCKS = "oft_blocks"  # how LyCORIS and kohya name them


@dataclass(frozen=True)
class Rotation(Unranked):
    """block_size: channels of a block. constraint: see above, 0 or more. rescaled: whether there is
    a factor for each output too. dialect: of DIALECTS. rule: of RULES, what strength means.
    """

    block_size: int = 1
    constraint: float = 0.0
    rescaled: bool = False
    dialect: str = LYCORIS
    rule: str = "base"

    told = ("dialect", "rule", "prefix", "maker")

    def __post_init__(self):
        for what, value, known in (
            ("dialect", self.dialect, DIALECTS),
            ("rule", self.rule, RULES),
        ):
            if value not in known:
                raise LycorisError(f"{what} is {value!r}, expected one of {', '.join(known)}")
        if not 0 <= self.constraint < math.inf:
            raise FileFormatError(f"constraint is {self.constraint}, expected 0 or more")
        if self.dialect == KOHYA and self.rescaled:
            raise FileFormatError(f"rescale has no place in {KOHYA}; dialect={LYCORIS!r} has one")
        if self.dialect == PEFT and self.constraint:
            raise LycorisError(f"{PEFT} has no constraint, but it is {self.constraint:g}")
        if self.block_size < 1 or self.turned_channels % self.block_size:
            fit = [b for b in range(2, 257) if self.turned_channels % b == 0]
            raise ShapeError(
                f"block size {self.block_size} does not divide the {self.turned_channels} "
                f"{'inputs' if self.on_input else 'outputs'} of {self.shape}: use one of "
                f"{', '.join(map(str, fit[:12])) or 'none'}"
            )

    @property
    def on_input(self) -> bool:
        """Whether inputs are rotated instead of outputs."""
        return self.dialect == PEFT

    @property
    def turned_channels(self) -> int:
        """The channels that are rotated; on the input side, with their taps."""
        if self.on_input:
            return self.shape.inputs * self.shape.taps
        return self.shape.outputs

    @property
    def blocks(self) -> int:
        return self.turned_channels // self.block_size

    @property
    def limit(self) -> float | None:
        """The most that the norm of Q may be, or None."""
        if self.dialect == PEFT or (self.dialect == LYCORIS and not self.constraint):
            return None
        return self.constraint * self.shape.outputs

    @property
    def scale_reason(self) -> str:
        limit = "" if self.limit is None else f", constraint {self.constraint:g}"
        return f"{self.dialect}, blocks of {self.block_size}{limit}"

    @property
    def prefix(self) -> str | None:
        return "oft_unet_" if self.dialect == KOHYA else None

    @property
    def saved_alpha(self) -> float | None:
        return None if self.dialect == PEFT else float(self.constraint)

    def rescale_factor(self, key: str = "rescale") -> dict[str, Factor]:
        """The factor of each output, if there is one: kept wide, as it is close to 1."""
        if not self.rescaled:
            return {}
        outputs = self.shape.outputs
        stored = (outputs, 1, *(1,) * self.shape.window.axes)[: max(2, 2 + self.shape.window.axes)]
        return {"rescale": Factor(key, plain=(outputs,), stored=stored, wide=True)}

    def init(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {
            name: np.full(self.flame_shape(factor), float(name == "rescale"), np.float32)
            for name, factor in self.factors().items()
        }

    def rescale(self, p: Parameters, like: Array) -> Array | None:
        """The factor of each output, (OUT,), in the dtype of `like`."""
        return cast(p["rescale"], like.dtype) if self.rescaled else None

    @classmethod
    def guess_shape(cls, tensors: Mapping[str, np.ndarray]) -> LayerShape:
        blocks = tensors[BLOCKS].shape if BLOCKS in tensors else (1, 1, 1)
        outputs = math.prod((*blocks, 1, 1, 1)[len(blocks) - 3 : len(blocks) - 1]) if blocks else 1
        if "rescale" in tensors:
            outputs = extents(tensors, "rescale")[0] if tensors["rescale"].ndim > 1 else outputs
            axes = min(max(tensors["rescale"].ndim - 2, 0), 3)
            return LayerShape(Window.of((1,) * axes), 0, outputs)
        return LayerShape(Window(), 0, outputs)


def dialect_of(
    tensors: Mapping[str, np.ndarray],
    alpha: float | None,
    told: str | None,
    prefix: str,
    maker: str,
) -> str:
    """Whose file this is: as told, or as the prefix, the keys and the network module of the
    metadata say, or where all readings agree.

    Raises FileFormatError, naming the readings, where they do not.
    """
    if told is not None:
        return told
    if prefix == "oft_unet_":
        return KOHYA
    if prefix == "lycoris_" or "rescale" in tensors or tensors[BLOCKS].ndim == 4:
        return LYCORIS
    if maker.startswith(("lycoris.", "networks.oft")):
        return LYCORIS if maker.startswith("lycoris.") else KOHYA
    if alpha is not None and alpha > 0:
        return LYCORIS  # kohya's reading is the same
    raise FileFormatError(
        f"{BLOCKS} with {'no alpha' if alpha is None else f'alpha {alpha:g}'} under {prefix!r} can "
        f"mean rotations without a constraint ({LYCORIS}) or none at all ({KOHYA}): say which with "
        f"dialect={LYCORIS!r} or dialect={KOHYA!r} (--dialect on the command line)"
    )
