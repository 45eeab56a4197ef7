"""AddReport: what `Engine.add` put on which layers, what it passed over, and what that costs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from ..adapters import Adapter
from ..arrays import Array, dtype_name
from ..attachment import Attachment
from ..io.adapter_file import adapter_file_size
from ..io.report import plain
from ..layers import Layer
from .matching import Matching, Selected
from .memory import Memory, training_memory

_ROWS = 40  # of a table in a short text
_UNITS = {"kB": 1, "MB": 10**3, "GB": 10**6, "TB": 10**9}  # in kB


class AddedLayer(NamedTuple):
    """rank, alpha: None where the algorithm has none. base_parameters: of the layer itself."""

    layer: str
    shape: str
    algorithm: str
    rank: int | None
    alpha: float | None
    scale: float
    parameters: int
    base_parameters: int


@dataclass(frozen=True, eq=False)
class AddReport(Sequence[str]):
    """A sequence of the names of the layers that got an adapter; `text()` has all there is to know.

    skipped: (layer, shape, reason) of those that were meant, but that the algorithm cannot sit on.
    base_layers, base_parameters: of the whole network. file_bytes: of `Engine.save_adapter`, in the
    engine's dtype.
    """

    name: str
    rows: tuple[AddedLayer, ...]
    selected: tuple[Selected, ...]
    skipped: tuple[tuple[str, str, str], ...]
    base_layers: int
    base_parameters: int
    dtype: str
    file_bytes: int
    memory: Memory

    def __getitem__(self, index):  # pyright: ignore[reportIncompatibleMethodOverride]
        return [row.layer for row in self.rows][index]

    def __len__(self) -> int:
        return len(self.rows)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return list(self) == list(other)

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    @property
    def parameters(self) -> int:
        return sum(row.parameters for row in self.rows)

    @property
    def share(self) -> float:
        """Parameters of the adapters / parameters of the network."""
        return self.parameters / max(self.base_parameters, 1)

    def summary(self) -> str:
        """One line: how many layers got what, and the size of it."""
        kinds = Counter(row.algorithm for row in self.rows)
        what = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        return (
            f"{self.name}: {len(self)} of {self.base_layers} layers ({what}); "
            f"{self.parameters:,} parameters, {self.share:.2%} of the network's "
            f"{self.base_parameters:,}; file {size_text(self.file_bytes)} in {self.dtype}"
        )

    def text(self, full: bool = False, activations: int | None = None) -> str:
        """The summary, a table of the layers, what each selector meant, what was passed over, and
        the memory that training takes.

        full: a row a layer; otherwise equal layers whose names differ in numbers share one.
        activations: bytes, as `activation_bytes` measures them.
        """
        out = [self.summary(), "", *_table(self.rows, full), ""]
        out += [_line(one) for one in self.selected]
        if self.skipped:
            out += ["", "passed over:", *_passed_over(self.skipped, full)]
        return "\n".join([*out, "", *self._memory(activations)])

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        out = asdict(self) | {"parameters": self.parameters, "share": self.share}
        for name in ("rows", "selected"):
            out[name] = [one._asdict() for one in getattr(self, name)]
        return plain(out | {"memory": self.memory._asdict()})

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        return f"<AddReport {self.summary()}>"

    def _memory(self, activations: int | None) -> list[str]:
        m = self.memory
        parts = {"factors": m.factors, "gradients": m.gradients, "masters": m.masters}
        parts |= {"constants of the weights": m.constants} if m.constants else {}
        parts |= {"activations": activations} if activations is not None else {}
        told = ", ".join(f"{name} {size_text(count)}" for name, count in parts.items())
        state = ", ".join(f"{name} {size_text(count)}" for name, count in m.states.items())
        lines = [f"training: {told}; optimizer's state: {state}"]
        if activations is None:
            lines.append("activations are not in it: recipe.activation_bytes(engine, *inputs)")
        return lines


def report_of(
    name: str, matching: Matching, layers: Mapping[str, Layer], attached: Attachment, dtype
) -> AddReport:
    """Of adapters that were just attached."""
    return AddReport(
        name,
        tuple(_row(n, adapter, layers[n]) for n, adapter in matching.adapters.items()),
        matching.selected,
        tuple((one.layer, str(one.shape), one.reason) for one in matching.skipped),
        len(layers),
        sum(map(_size, layers.values())),
        dtype_name(dtype),
        adapter_file_size(matching.adapters, dtype),
        training_memory(attached.parameters, attached.kept, dtype),
    )


def size_text(count: int) -> str:
    """Bytes in the unit that people read, a power of 1000."""
    unit = next((one for one in ("kB", "MB", "GB") if count < 999_950 * _UNITS[one]), "TB")
    return f"{count} B" if count < 1000 else f"{count / (1000 * _UNITS[unit]):.1f} {unit}"


def _row(name: str, adapter: Adapter, layer: Layer) -> AddedLayer:
    ranked = adapter.has_rank
    alpha = adapter.alpha or float(adapter.rank)
    return AddedLayer(
        name,
        str(adapter.shape),
        adapter.title,
        adapter.rank if ranked else None,
        alpha if ranked else None,
        adapter.reported_scale,
        sum(_count(adapter, name) for name in adapter.factors()),
        _size(layer),
    )


def _count(adapter: Adapter, name: str) -> int:
    out = 1
    for extent in adapter.factors()[name].canonical(adapter.shape):
        out *= extent
    return out


def _size(layer: Layer) -> int:
    arrays: list[Array | None] = [layer.weight, layer.bias]
    return sum(array.size for array in arrays if array is not None)


def _form(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _table(rows: tuple[AddedLayer, ...], full: bool) -> list[str]:
    groups: dict[tuple, list[AddedLayer]] = {}
    for row in rows:
        key = (row.layer if full else _form(row.layer), *row[1:])
        groups.setdefault(key, []).append(row)
    head = ["layer", "", "shape", "algorithm", "rank", "alpha", "scale", "parameters", "share"]
    cells = [head]
    for (form, *_), equal in groups.items():
        one, count = equal[0], len(equal)
        cells.append(
            [
                one.layer if count == 1 else form,
                "" if count == 1 else f"x {count}",
                one.shape,
                one.algorithm,
                "" if one.rank is None else str(one.rank),
                "" if one.alpha is None else f"{one.alpha:.6g}",
                f"{one.scale:.6g}",
                f"{count * one.parameters:,}",
                f"{one.parameters / max(one.base_parameters, 1):.1%}",
            ]
        )
    more = 0 if full else max(len(cells) - 1 - _ROWS, 0)
    cells = cells[: len(cells) - more]
    columns = [c for c in zip(*cells, strict=True) if any(c[1:])]
    widths = [max(map(len, column)) for column in columns]
    numbers = {"rank", "alpha", "scale", "parameters", "share"}
    lines = []
    for line in zip(*columns, strict=True):
        padded = [
            cell.rjust(w) if column[0] in numbers else cell.ljust(w)
            for cell, w, column in zip(line, widths, columns, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return lines + ([f"and {more} more rows: text(full=True) has all"] if more else [])


def _line(one: Selected) -> str:
    done = {"targets": "taken", "exclude": "left out", "override": "changed"}[one.role]
    layers = "1 layer" if one.matched == 1 else f"{one.matched} layers"
    return f"{one.role} {one.selector!r}: {layers}, {one.acts} {done}"


def _passed_over(skipped: tuple[tuple[str, str, str], ...], full: bool) -> list[str]:
    if full:
        return [f"  {layer}: {reason}" for layer, _, reason in skipped]
    groups: dict[tuple[str, str], list[str]] = {}
    for layer, _, reason in skipped:
        groups.setdefault((_form(layer), reason), []).append(layer)
    lines = [
        f"  {layers[0] if len(layers) == 1 else f'{form} x {len(layers)}'}: {reason}"
        for (form, reason), layers in groups.items()
    ]
    more = len(lines) - _ROWS
    return lines[:_ROWS] + ([f"  and {more} more: text(full=True) has all"] if more > 0 else [])
