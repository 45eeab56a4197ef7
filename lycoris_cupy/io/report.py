"""LoadReport: what was loaded from an adapter file, at which scale and why, and what was not."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

_LISTED = 60  # entries of a list in a text


@dataclass(frozen=True)
class LayerReport:
    """One module of the file. layer: None where there is no base. rank, alpha: None where the
    algorithm has none. rows: of the layer, 'begin:end', where it is not all of them.
    """

    module: str
    layer: str | None
    shape: str
    algorithm: str
    rank: int | None
    alpha: float | None
    scale: float
    scale_from: str
    dtype: str
    rounded: bool
    parameters: int
    rows: str | None = None


@dataclass(frozen=True)
class Unmatched:
    """A module, or a key that belongs to none, that was not loaded. nearest: the layer with the
    most similar name.
    """

    name: str
    reason: str
    nearest: str | None = None

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}" + (
            f"; nearest layer: {self.nearest!r}" if self.nearest else ""
        )


@dataclass(frozen=True)
class LoadReport:
    """layers: what was read. base_layers: how many layers the base has, None where there is no
    base.
    """

    path: str
    layers: tuple[LayerReport, ...]
    unmatched: tuple[Unmatched, ...] = ()
    base_layers: int | None = None
    dialects: tuple[str, ...] = ()

    @property
    def coverage(self) -> float:
        """Modules read / modules in the file; 0 for an empty file."""
        return len(self.layers) / max(len(self.layers) + len(self.unmatched), 1)

    @property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    def summary(self) -> str:
        """One line: how much of the file was read, and how much of the base it touches."""
        kinds = Counter(layer.algorithm for layer in self.layers)
        what = f" ({', '.join(f'{n} {kind}' for kind, n in kinds.items())})" if kinds else ""
        modules = len(self.layers) + len(self.unmatched)
        line = f"{self.path}: {len(self.layers)} of {modules} modules read{what}"
        if self.base_layers is not None:
            line += f", on {len(self.layers)} of {self.base_layers} layers"
        names = f"; names as by {', '.join(self.dialects)}" if self.dialects else ""
        return f"{line}; {self.parameters:,} parameters{names}"

    def text(self) -> str:
        """The summary, a table of the layers, and what was not read."""
        out = [self.summary()]
        if self.layers:
            out += ["", *self.table({})]
        if self.unmatched:
            out += ["", "not read:", *listed(self.unmatched)]
        return "\n".join(out)

    __str__ = text

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values for JSON, which has no infinity: a LoKr's alpha may be 'inf'."""
        return plain(asdict(self) | {"coverage": self.coverage, "parameters": self.parameters})

    def table(self, more: Mapping[str, Sequence[str]]) -> list[str]:
        """Lines of a table of the layers. more: heading -> a cell a layer; empty columns are left
        out.
        """
        return _table(self.layers, more)


def _table(layers: tuple[LayerReport, ...], more: Mapping[str, Sequence[str]]) -> list[str]:
    head = ["module", "layer", "shape", "algorithm", "rank", "scale", "from", "dtype", "parameters"]
    rows = [head]
    for one in layers:
        dtype = one.dtype + (", gets rounded" if one.rounded else "")
        rank = "" if one.rank is None else str(one.rank)
        rows.append(
            [
                one.module,
                (one.layer or "") + (f" rows {one.rows}" if one.rows else ""),
                one.shape,
                one.algorithm,
                rank,
                f"{one.scale:.6g}",
                one.scale_from,
                dtype,
            ]
            + [f"{one.parameters:,}"]
        )
    columns = [*zip(*rows, strict=True), *((name, *cells) for name, cells in more.items())]
    columns = [column for column in columns if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    return [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in zip(*columns, strict=True)
    ]


def listed(entries: Sequence[object]) -> list[str]:
    """A line an entry, and how many more there are than people read."""
    lines = [f"  {entry}" for entry in entries[:_LISTED]]
    more = len(entries) - len(lines)
    return lines + ([f"  and {more} more (--json has all)"] if more else [])


def plain(value: Any) -> Any:
    """value for JSON: infinities and NaN as text."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
