"""Conversion: what a conversion wrote, module by module, and what it lost."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from .exact import EXACT


@dataclass(frozen=True)
class Converted:
    """One module. loss: |D' - D| / |D| of its change; infinite where a part has no place."""

    module: str
    written: str
    algorithm: str
    to_algorithm: str
    rank: int
    to_rank: int
    loss: float
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        what = f"{self.algorithm} rank {self.rank} -> {self.to_algorithm} rank {self.to_rank}"
        lost = "exact" if self.loss == 0 else f"loses {self.loss:.3g}"
        if 0 < self.loss <= EXACT:
            lost = f"exact within the rounding of f32 ({self.loss:.1g})"
        return "; ".join([f"{self.module} -> {self.written}: {what}, {lost}", *self.notes])


@dataclass(frozen=True)
class Conversion:
    """modules: what was written. left_out: modules and keys that were not."""

    path: str
    out: str
    dialects: tuple[str, ...]
    to: str
    modules: tuple[Converted, ...]
    left_out: tuple[str, ...] = ()

    @property
    def loss(self) -> float:
        """The largest of a module."""
        return max((module.loss for module in self.modules), default=0.0)

    def summary(self) -> str:
        """One line: how many modules, and the loss."""
        worse = [module for module in self.modules if module.loss > EXACT]
        lost = "nothing lost"
        if worse:
            lost = f"{len(worse)} modules lose up to {self.loss:.3g} of their change"
        left = f"; {len(self.left_out)} left out" if self.left_out else ""
        return (
            f"{self.path} ({', '.join(self.dialects)}) -> {self.out} ({self.to}): "
            f"{len(self.modules)} modules, {lost}{left}"
        )

    def text(self) -> str:
        """The summary, modules that changed in more than their names, and what was left out."""
        changed = [
            module
            for module in self.modules
            if module.loss
            or module.notes
            or module.algorithm != module.to_algorithm
            or module.rank != module.to_rank
        ]
        return "\n".join(
            [self.summary(), *(f"  {module}" for module in changed)]
            + [f"  left out: {name}" for name in self.left_out]
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, which has no infinity."""
        out = asdict(self)
        for module in out["modules"]:
            if not math.isfinite(module["loss"]):
                module["loss"] = None
        return out
