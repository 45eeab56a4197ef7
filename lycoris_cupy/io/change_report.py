"""ChangeReport: what was made of each layer's change, and how far that is from it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerChange:
    """One layer. form: what it became. size: Frobenius norm of the change, None where it was not
    measured. error: relative to that. numbers: values stored for it.
    """

    layer: str
    shape: str
    form: str
    error: float
    numbers: int
    size: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChangeReport:
    """layers: what was written. left_out: names, each with the reason, of what was not."""

    out: str
    layers: tuple[LayerChange, ...]
    left_out: tuple[tuple[str, str], ...] = ()

    @property
    def error(self) -> float:
        """Relative Frobenius error over all layers together where sizes are known, else the largest
        of a layer.
        """
        sized = [(one.size, one.error) for one in self.layers if one.size is not None]
        if len(sized) < len(self.layers) or not sized:
            return max((one.error for one in self.layers), default=0.0)
        whole = math.fsum(size**2 for size, _ in sized)
        lost = math.fsum((size * error) ** 2 for size, error in sized)
        return math.sqrt(lost / whole) if whole else 0.0

    @property
    def numbers(self) -> int:
        """Values stored in all."""
        return sum(one.numbers for one in self.layers)

    def text(self) -> str:
        """A table of the layers, what was left out, and a line for all."""
        head = ["layer", "shape", "became", "error", "size", "values", ""]
        rows = [head]
        for one in self.layers:
            size = "" if one.size is None else f"{one.size:.3g}"
            rows.append(
                [one.layer, one.shape, one.form, f"{one.error:.3g}", size, f"{one.numbers:,}"]
                + ["; ".join(one.notes)]
            )
        columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
        widths = [max(map(len, column)) for column in columns]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in zip(*columns, strict=True)
        ]
        lines += [f"left out: {name}: {why}" for name, why in self.left_out]
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        """One line."""
        left = f", {len(self.left_out)} left out" if self.left_out else ""
        what = "error" if all(one.size is not None for one in self.layers) else "largest error"
        return (
            f"wrote {self.out}: {len(self.layers)} layers{left}, {self.numbers:,} values, {what} "
            f"{self.error:.3g}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"error": self.error, "numbers": self.numbers}
