"""Stacked: an adapter that stands on another one and shares what is told of it (DoRA, Biased)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from ..arrays import Array
from ..layers import LayerShape
from .base import Adapter, DropRanks, Parameters


@dataclass(frozen=True)
class Stacked(Adapter):
    """on: the adapter under it, whose algorithm, rank and alpha these are. Its own scale is 1: that
    of `on` stands with the factors of `on`.
    """

    on: Adapter = None  # pyright: ignore

    marks = ()

    def with_alpha(self, alpha: float | None) -> Self:
        return replace(self, alpha=alpha, on=self.on.with_alpha(alpha))

    @property
    def algorithm(self) -> str:  # pyright: ignore
        return self.on.algorithm

    @property
    def rule(self) -> str:  # pyright: ignore
        return self.on.rule

    @property
    def drops(self) -> str:  # pyright: ignore
        return self.on.drops

    @property
    def scale(self) -> float:
        return 1.0

    @property
    def reported_scale(self) -> float:
        return self.on.reported_scale

    @property
    def scale_reason(self) -> str:
        return self.on.scale_reason

    @property
    def has_rank(self) -> bool:
        return self.on.has_rank

    @property
    def ignores_alpha(self) -> bool:
        return self.on.ignores_alpha

    @property
    def saved_alpha(self) -> float | None:
        return self.on.saved_alpha

    @property
    def network_args(self) -> dict[str, object]:
        return self.on.network_args

    def kept(self, weight: Array) -> dict[str, Array]:
        return self.on.kept(weight)

    def drop_ranks(self, p: Parameters, drop: DropRanks) -> dict[str, Array]:
        return self.on.drop_ranks(p, drop)

    def costs(self) -> dict[str, int]:
        return self.on.costs()

    @classmethod
    def read(cls, shape, tensors, alpha) -> Self:
        raise NotImplementedError("made by `over`, of the adapter that the other keys describe")

    @classmethod
    def guess_shape(cls, tensors) -> LayerShape:
        raise NotImplementedError("told by the keys of the adapter that it stands on")
