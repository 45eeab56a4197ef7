"""OFT as PEFT has it: blocks of the inputs are turned, before the layer.

    x' = x R of each block,  Q = U - U^T        R = (I - Q) (I + Q)^-1
    or, as a series of five terms               R = I + 2 Q + 2 Q^2 + 2 Q^3 + Q^4

The two turn in opposite senses, so a file means nothing without the configuration beside it. On a
kernel over space PEFT turns patches of its input and folds them back, in an order that mixes
positions: that is no convolution of the same size, and no rotation at Q = 0 either. It is computed
as PEFT does, and cannot be merged. File key: oft_R.weight (blocks, B (B - 1) / 2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from ..arrays import Array, module_of
from ..errors import FileFormatError, LycorisError, ShapeError
from ..layers import Layer, LayerShape
from ..ops.cayley import cayley, rotation_columns
from ..ops.columns import expand_rows
from ..ops.elementwise import cast
from ..ops.product import product, product_dx
from ..ops.shapes import reshape, transpose
from ..ops.skew import block_size_of, cayley_series, skew_blocks
from ..ops.turn import turn_blocks
from ..ops.window import Window
from ..tape import value_of
from .base import Adapter, Parameters
from .factor import Factor, require_two_axes
from .oft import EXACT, PEFT, Rotation


@dataclass(frozen=True)
class PeftOFT(Rotation):
    """terms: of the series, or None for the exact transform. shared: one block turns all."""

    dialect: str = PEFT
    terms: int | None = 5
    shared: bool = False

    algorithm = "oft-peft"
    keys = ("oft_R.weight",)
    marks = keys
    drops = "blocks"  # what is left of one is Q = 0, the identity
    rank_axes = {"blocks": (0, 0)}
    told = ("rule", "dialect", "options")

    def __post_init__(self):
        super().__post_init__()
        if self.dialect != PEFT or self.rescaled:
            raise LycorisError(f"oft-peft is PEFT's: dialect {PEFT}, no rescale")
        if self.shape.window.groups > 1:
            raise ShapeError(f"PEFT's oft turns inputs of all groups at once: not on {self.shape}")
        if self.terms is not None and self.terms < 2:
            raise LycorisError(f"a series of {self.terms} terms turns nothing: expected 2 or more")

    @classmethod
    def create(
        cls,
        shape: LayerShape,
        rank: int = 4,
        alpha: float | None = None,
        *,
        block_size: int | None = None,
        terms: int | None = 5,
        shared: bool = False,
        rule: str = "base",
    ) -> Adapter:
        """A new adapter. block_size: by default the rank."""
        if shape.taps > 1:
            raise ShapeError(
                f"PEFT's oft changes {shape} even before it is trained: use diag-oft there"
            )
        size = rank if block_size is None else block_size
        return cls(shape, block_size=size, terms=terms, shared=shared, rule=rule)

    @property
    def scale_reason(self) -> str:
        how = "exact transform" if self.terms is None else f"series of {self.terms} terms"
        return f"{self.dialect}, {how}, blocks of {self.block_size}"

    @property
    def network_args(self) -> dict[str, object]:
        series = {} if self.terms is None else {"num_cayley_neumann_terms": self.terms}
        return {"use_cayley_neumann": self.terms is not None, **series}

    def factors(self) -> dict[str, Factor]:
        entries = self.block_size * (self.block_size - 1) // 2
        plain = (1 if self.shared else self.blocks, entries)
        return {"blocks": Factor("oft_R.weight", plain=plain)}

    def _rotation(self, p: Parameters) -> Array:
        """R - I of each block, wide."""
        q = skew_blocks(p["blocks"])
        e = cayley(q, factor=-0.5) if self.terms is None else cayley_series(q, self.terms)
        if not self.shared:
            return e
        one = reshape(e, (self.block_size**2,))
        every = expand_rows(one, (self.blocks, self.block_size**2))
        return reshape(every, (self.blocks, self.block_size, self.block_size))

    def delta_weight(self, weight: Array, p: Parameters, scale: Array) -> Array:
        if self.shape.taps > 1:
            raise LycorisError(
                f"PEFT's oft on {self.shape} mixes positions of its input: it is no change of the "
                "weight, and cannot be merged"
            )
        e = self._rotation(p)
        rows = transpose(cast(weight, e.dtype), (0, 2, 1))  # W' = R W turns the inputs of each row
        turned = turn_blocks(rows, rotation_columns(e, turned=True), scale=scale)
        return transpose(turned, (0, 2, 1))

    def costs(self) -> dict[str, int]:
        own = super().costs()["delta"]
        return {"inputs": own + self.turned_channels * self.block_size}

    def apply(
        self,
        change: Array | None,
        layer: Layer,
        x: Array,
        p: Parameters,
        scale: Array,
        columns: Array | None = None,
    ) -> Array:
        window = layer.window
        if self.shape.taps == 1:
            turned = turn_blocks(x, rotation_columns(self._rotation(p)))
            return product(turned, layer.matrix, window, add=change, scale=scale)
        folded = self._folded(x, p)
        change = product(x, layer.matrix, window, add=change, scale=-scale)
        return product(folded, layer.matrix, window, add=change, scale=scale)

    def _folded(self, x: Array, p: Parameters) -> Array:
        """PEFT's input of a convolution: patches turned, and laid where its `view` puts them."""
        inputs, taps = self.shape.inputs, self.shape.taps
        patches = Window.of(self.shape.window.kernel)
        xp = module_of(value_of(x))
        # Tap t of channel c is column c * taps + t of a patch.
        apart = xp.eye(inputs * taps, dtype=np.float32).reshape(inputs, taps, inputs * taps)
        apart = cast(xp.ascontiguousarray(apart.transpose(1, 0, 2)), x.dtype)
        seen = product(x, apart, patches)
        flat = reshape(seen, (prod(seen.shape[:-1]), seen.shape[-1]))
        flat = turn_blocks(flat, rotation_columns(self._rotation(p)), add=flat)
        samples, positions = x.shape[0], flat.shape[0] // max(x.shape[0], 1)
        mixed = transpose(reshape(flat, (samples, positions, inputs, taps)), (0, 2, 1, 3))
        mixed = reshape(mixed, (samples, inputs, taps, positions))
        mixed = reshape(transpose(mixed, (0, 3, 1, 2)), seen.shape)
        return product_dx(mixed, apart, patches, x.shape[1:-1])

    @classmethod
    def guess_shape(cls, tensors: Mapping[str, np.ndarray]) -> LayerShape:
        blocks, entries = (*tensors["oft_R.weight"].shape, 1, 1)[:2]
        return LayerShape(Window(), blocks * block_size_of(entries), 0)

    @classmethod
    def read(
        cls,
        shape: LayerShape,
        tensors: Mapping[str, np.ndarray],
        alpha: float | None,
        rule: str = "base",
        dialect: str | None = None,
        options: Mapping[str, object] | None = None,
    ) -> PeftOFT:
        """options: PEFT's configuration, or what `network_args` wrote."""
        require_two_axes(tensors, "oft_R.weight")
        if tensors["oft_R.weight"].ndim != 2:
            given = tuple(tensors["oft_R.weight"].shape)
            raise ShapeError(f"oft_R.weight has shape {given}, expected (blocks, entries)")
        blocks, entries = tensors["oft_R.weight"].shape
        size = block_size_of(entries)
        shared = blocks == 1 and shape.inputs * shape.taps > size
        terms = _terms(dialect, options or {})
        return cls(shape, block_size=size, terms=terms, shared=shared, rule=rule)


def _terms(dialect: str | None, options: Mapping[str, object]) -> int | None:
    """Of the series, None for the exact transform, as told or configured. Raises FileFormatError if
    neither says it.
    """
    if options.get("coft"):
        raise FileFormatError(
            "coft is set: PEFT projects the blocks in every forward, not supported"
        )
    if dialect is not None:
        if dialect not in (PEFT, EXACT):
            raise FileFormatError(f"oft_R.weight is PEFT's: dialect {PEFT} or {EXACT}")
        return 5 if dialect == PEFT else None
    series = options.get("use_cayley_neumann")
    if not isinstance(series, bool):
        raise FileFormatError(
            "oft_R.weight can turn by PEFT's series or by its exact transform, in opposite senses, "
            "and no adapter_config.json (use_cayley_neumann) says which: say "
            f"dialect={PEFT!r} or dialect={EXACT!r} (--dialect on the command line)"
        )
    if not series:
        return None
    terms = options.get("num_cayley_neumann_terms", 5)
    if not isinstance(terms, int) or terms < 2:
        raise FileFormatError(f"num_cayley_neumann_terms is {terms!r}, expected 2 or more")
    return terms
