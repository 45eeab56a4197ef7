"""Unranked: what the algorithms without a rank have in common: the scale is 1, and there is no
alpha.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..layers import LayerShape
from .base import Adapter


@dataclass(frozen=True)
class Unranked(Adapter):
    """rank: always 0."""

    rank: int = 0

    @classmethod
    def create(
        cls, shape: LayerShape, rank: int = 0, alpha: float | None = None, **options
    ) -> Adapter:
        """A new adapter; rank and alpha mean nothing to it."""
        return super().create(shape, 0, None, **options)

    @property
    def scale(self) -> float:
        return 1.0

    @property
    def scale_reason(self) -> str:
        return f"{self.algorithm} has no alpha: scale 1"

    @property
    def has_rank(self) -> bool:
        return False

    @property
    def saved_alpha(self) -> float | None:
        return None
