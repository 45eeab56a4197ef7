"""What an adapter file would do: the size and the spectrum of each layer's change, and what looks
wrong, with a base or without one.

Nothing is refused: what is not understood is listed with the reason. Norms and singular values are
those of the change at strength 1, scale included, in f64, without building it where its factors
allow.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..adapters import Adapter
from ..layers import LayerShape
from ..svd import Svd, flat_rows, matrix_svd
from .adapter_file import layer_report, spoken
from .aliases import Rows
from .checkpoint import Checkpoint, open_checkpoint
from .merge import layer_shapes
from .names import BaseNames, fold, tensors_of
from .placing import Placed, survey
from .report import LayerReport, LoadReport, plain
from .safetensors import TensorFile
from .source import Source, open_source
from .suspicions import suspicions

KEPT = 64  # singular values of a layer in a report


@dataclass(frozen=True)
class Figures:
    """One layer. norm: |dW|, Frobenius, and spectrum: the largest singular values, falling; None
    where the change depends on a weight that is not there. relative: |dW| / |W| on the base.
    used: how many singular values are more than rounding. notes: what looks wrong.
    """

    layer: LayerReport
    norm: float | None
    relative: float | None
    effective_rank: float | None
    used: int | None
    spectrum: tuple[float, ...]
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The layer's report and its figures side by side."""
        own = {key: value for key, value in vars(self).items() if key != "layer"}
        return vars(self.layer) | own


@dataclass(frozen=True)
class Inspection:
    """report: what was read and what was not. figures: of report.layers, in their order."""

    report: LoadReport
    figures: tuple[Figures, ...]
    metadata: Mapping[str, str]
    base: str | None = None

    @property
    def suspicious(self) -> list[Figures]:
        return [one for one in self.figures if one.notes]

    def text(self) -> str:
        """The report's table with the figures, what looks wrong, and what was not read."""
        head = self.report.summary()
        table = self.report.table(
            {
                "|dW|": [_number(one.norm) for one in self.figures],
                "|dW|/|W|": [_number(one.relative) for one in self.figures],
                "eff. rank": [_number(one.effective_rank) for one in self.figures],
            }
        )
        out = [head, *(["", *table] if self.figures else [])]
        if self.suspicious:
            out += ["", "looks wrong:"]
            out += [f"  {one.layer.module}: {'; '.join(one.notes)}" for one in self.suspicious]
        if self.report.unmatched:
            out += ["", "not read:", *(f"  {entry}" for entry in self.report.unmatched)]
        return "\n".join(out)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        out = self.report.as_dict()
        out["layers"] = [plain(one.as_dict()) for one in self.figures]
        return out | {"base": self.base, "metadata": dict(self.metadata)}


def inspect_file(
    path: str | os.PathLike | TensorFile,
    base: str | os.PathLike | None = None,
    *,
    alpha_from: str | None = None,
    dialect: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Look at a file, or PEFT's folder, alone or on the layers of a base checkpoint.

    progress: called with the modules done and in all. Raises only where a file cannot be opened.
    """
    with open_source(path, alpha_from, dialect=dialect) as source:
        if base is None:
            return _inspect(source, None, {}, progress)
        with open_checkpoint(base) as file:
            return _inspect(source, file, layer_shapes(file), progress)


def _inspect(
    source: Source,
    base: Checkpoint | None,
    shapes: Mapping[str, LayerShape],
    progress: Callable[[int, int], None] | None,
) -> Inspection:
    names = None if base is None else BaseNames(shapes)
    found, unmatched = survey(source, names, shapes)
    placed = []
    for i, one in enumerate(found):
        placed.append((one, *_measured(base, one)))
        if progress is not None:
            progress(i + 1, len(found))
    layers = tuple(layer_report(source, one, None) for one, _, _ in placed)
    report = LoadReport(
        source.path,
        layers,
        tuple(unmatched),
        None if base is None else len(shapes),
        spoken(source),
    )
    twins = _twins([one for one, _, _ in placed])
    norms = sorted(svd.norm for _, svd, _ in placed if svd is not None and svd.norm)
    median = norms[len(norms) // 2] if norms else 0.0
    figures = []
    for (one, svd, weight), layer in zip(placed, layers, strict=True):
        relative = None if svd is None or not weight else svd.norm / weight
        notes = suspicions(one.adapter, one.params, svd, relative, median)
        figures.append(
            Figures(
                layer,
                None if svd is None else svd.norm,
                relative,
                None if svd is None else svd.effective_rank,
                None if svd is None else svd.rank,
                () if svd is None else tuple(svd.values[:KEPT].tolist()),
                tuple(notes + twins.get(id(one), [])),
            )
        )
    where = None if base is None else str(base.path)
    return Inspection(report, tuple(figures), source.file.metadata, where)


def _measured(base: Checkpoint | None, one: Placed) -> tuple[Svd | None, float | None]:
    """(spectrum of the change, norm of the weight it is put on), as far as they can be known."""
    weight = None if base is None else _weight(base, one)
    norm = None if weight is None else float(np.linalg.norm(weight))
    wide = {name: value.astype(np.float64) for name, value in one.params.items()}
    p = one.adapter.canonical(wide)
    found = one.adapter.svd(p, vectors=False)
    if found is not None:
        return found.scaled(one.adapter.scale), norm
    if weight is None:
        return None, norm
    return matrix_svd(flat_rows(_dense(one.adapter, weight, p)), vectors=False), norm


def _dense(adapter: Adapter, weight: np.ndarray, p: Mapping[str, np.ndarray]) -> np.ndarray:
    scale = np.array([adapter.scale])
    return adapter.delta_weight(weight, p, scale)


def _weight(base: Checkpoint, one: Placed) -> np.ndarray:
    """(taps, IN, OUT) in f64: the rows that the adapter changes."""
    array = base[tensors_of(one.share.layer)[0]].astype(np.float64)
    if one.share.rows is not None:
        array = np.concatenate([array[begin:stop] for begin, stop in one.share.rows])
    return np.ascontiguousarray(array.reshape(*array.shape[:2], -1).transpose(2, 1, 0))


def _twins(placed: list[Placed]) -> dict[int, list[str]]:
    """Notes on modules that change the same outputs of one layer."""
    out: dict[int, list[str]] = {}
    seen: dict[Any, list[Placed]] = {}
    for one in placed:
        key = one.module.key
        name = one.share.layer or (key.parts[:1] if key.parts else None, fold(key.path))
        for first in seen.setdefault(name, []):
            if _overlap(one.share.rows, first.share.rows):
                out.setdefault(id(one), []).append(f"the same layer as {first.module.name}")
                out.setdefault(id(first), []).append(f"the same layer as {one.module.name}")
        seen[name].append(one)
    return out


def _overlap(one: Rows | None, other: Rows | None) -> bool:
    if one is None or other is None:
        return True
    return any(a < d and c < b for a, b in one for c, d in other)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
