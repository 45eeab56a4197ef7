"""Dropout of adapters in training, with random numbers that a seed and a step number give.

    dropout          each element of the adapter's part of the layer's output, what stays times
                     1 / (1 - p); GLoRA: of what it adds to the input, and of what to the output
    rank_dropout     what the algorithm's `drops` names: ranks (LoCon, GLoRA), outputs (LoHa, LoKr,
                     Full), channels (Norm), entries of the rotations (Diag-OFT, times 1 / (1 - p)),
                     blocks (PEFT's OFT and BOFT: those are not turned); the others have none
    rank_dropout_scale   divides that mask by its mean; nothing is left where all are dropped
    module_dropout   the whole change of a layer, which then gives what it gives without

One mask serves all samples of a batch. Of LyCORIS's two routes, which differ, its bypass is the
model, so that a dropped rank is a rank.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from ..arrays import Array
from ..errors import LycorisError
from ..layers import Layer
from ..ops.dropout import ELEMENTS, MODULE, RANKS, Draw, dropout, kept_gain
from .base import Adapter, Parameters, Share, Turn


@dataclass(frozen=True)
class Dropout:
    """Probabilities from 0 to below 1. seed: below 2^64; adapters with one seed and the same layers
    drop the same, so give each its own.
    """

    dropout: float = 0.0
    rank_dropout: float = 0.0
    rank_dropout_scale: bool = False
    module_dropout: float = 0.0
    seed: int = 0

    def __post_init__(self):
        for name in ("dropout", "rank_dropout", "module_dropout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
                raise LycorisError(f"{name} is {value!r}, expected a number from 0 to below 1")
        if self.rank_dropout_scale not in (True, False):
            raise LycorisError(
                f"rank_dropout_scale is {self.rank_dropout_scale!r}, expected True or False"
            )
        whole = isinstance(self.seed, (int, np.integer)) and not isinstance(self.seed, bool)
        if not whole or not 0 <= self.seed < 2**64:
            raise LycorisError(f"seed is {self.seed}, expected a whole number from 0 to 2^64 - 1")

    def __bool__(self) -> bool:
        """Whether anything is dropped."""
        return bool(self.dropout or self.rank_dropout or self.module_dropout)

    @classmethod
    def taken(cls, options: MutableMapping[str, Any], seed: int) -> Dropout:
        """What options say of dropout, which is taken out of them."""
        names = [field.name for field in fields(cls) if field.name != "seed"]
        return cls(**{name: options.pop(name) for name in names if name in options}, seed=seed)

    def refused(self, adapter: Adapter) -> dict[str, str]:
        """The knobs that have no meaning on this adapter: why."""
        what, out = adapter.title, {}
        turned = {"entries", "blocks"} & set(adapter.drops.split(", "))
        if self.dropout and not adapter.has_output:
            out["dropout"] = (
                f"{what} has no dropout: it changes two vectors, not an output; use rank_dropout"
            )
        if self.rank_dropout and not adapter.drops:
            out["rank_dropout"] = f"{what} has no rank_dropout; use dropout or module_dropout"
        if self.rank_dropout and self.rank_dropout_scale and turned:
            out["rank_dropout_scale"] = (
                f"{what} has no rank_dropout_scale: {turned.pop()} of a rotation have no mean that "
                "a scale would keep"
            )
        if self.module_dropout and adapter.rule != "base":
            out["module_dropout"] = (
                f"{what} has no module_dropout by rule {adapter.rule!r}: strength 0 leaves a "
                "change there; use rule='base'"
            )
        return out

    def over(self, adapters: Mapping[str, Adapter]) -> dict[str, Dropout]:
        """layer -> what is dropped there: the knobs that its algorithm has.

        Raises LycorisError, with the reason on the first layer, for a knob that no layer has.
        """
        refused = {layer: self.refused(adapter) for layer, adapter in adapters.items()}
        for first, why in refused.items():
            for knob, reason in why.items():
                if all(knob in other for other in refused.values()):
                    raise LycorisError(f"layer {first!r}: {reason}")
        return {layer: replace(self, **dict.fromkeys(why, 0)) for layer, why in refused.items()}


@dataclass(frozen=True)
class Dropped:
    """An adapter at one step of training, in the place of itself. tensor: the place of its layer's
    name among those of the seed. step: (1,) u32 on the device.
    """

    adapter: Adapter
    knobs: Dropout
    tensor: int
    step: Array

    def contribute(
        self, change: Array | None, layer: Layer, x: Array, p: Parameters, scale: Array
    ) -> tuple[Array | None, Share | Turn | None]:
        """See Adapter.contribute. Without `dropout` it takes the same routes as ever."""
        if self.knobs.rank_dropout:
            p = self.adapter.drop_ranks(p, self._rank)
        if self.knobs.module_dropout:
            # Times 0 or 1 on the device: strength 0 is the layer itself, and nothing is read back.
            scale = dropout(scale, self._draw(self.knobs.module_dropout, MODULE), self.step)
        if self.knobs.dropout:
            return self.adapter.apply_dropped(change, layer, x, p, scale, self._element), None
        return self.adapter.contribute(change, layer, x, p, scale)

    def _draw(self, probability: float, kind: int, part: int = 0) -> Draw:
        return Draw(probability, self.knobs.seed, self.tensor, kind + (part << 8))

    def _element(self, y: Array, add: Array | None, part: int = 0) -> Array:
        """add plus what is kept of each element of y, times 1 / (1 - p)."""
        draw = self._draw(self.knobs.dropout, ELEMENTS, part)
        return dropout(y, draw, self.step, gain=draw.inverse, add=add)

    def _rank(self, w: Array, axis: int | None, part: int = 0) -> Array:
        """What is kept of a factor along an axis; or (None) of each entry, times 1 / (1 - p)."""
        draw, gain = self._draw(self.knobs.rank_dropout, RANKS, part), 1.0
        if axis is None:
            gain = draw.inverse
        elif self.knobs.rank_dropout_scale:
            gain = kept_gain(w.shape[axis], draw, self.step, w.dtype)
        return dropout(w, draw, self.step, axis=axis, gain=gain)
