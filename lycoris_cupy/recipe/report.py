"""AddReport: what `Engine.add` put on which layers, what it passed over, and what that costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..arrays import dtype_name
from ..attachment import Attachment
from ..io.adapter_file import adapter_file_size
from ..io.report import plain
from ..layers import Layer
from .added import AddedLayer, added_layer, layer_size
from .layout import memory_lines, passed_over_lines, selector_line, size_text, table_lines
from .matching import Matching, Selected
from .memory import Memory, training_memory
from .recipe import Recipe


@dataclass(frozen=True, eq=False)
class AddReport(Sequence[str]):
    """A sequence of the names of the layers that got an adapter; `text()` has all there is to know.

    recipe: the table that makes the same again. skipped: (layer, shape, reason) of those that were
    meant, but that the algorithm cannot sit on. base_layers, base_parameters: of the whole network.
    file_bytes: of `Engine.save_adapter`, in the engine's dtype.
    """

    name: str
    recipe: Mapping[str, Any]
    rows: tuple[AddedLayer, ...]
    selected: tuple[Selected, ...]
    skipped: tuple[tuple[str, str, str], ...]
    base_layers: int
    base_parameters: int
    dtype: str
    file_bytes: int
    memory: Memory

    def __getitem__(self, index):  # pyright: ignore[reportIncompatibleMethodOverride]
        return list(self)[index]

    def __iter__(self) -> Iterator[str]:
        return (row.layer for row in self.rows)

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
        out = [self.summary(), "", *table_lines(self.rows, full), ""]
        out += [selector_line(one) for one in self.selected]
        if self.skipped:
            out += ["", "passed over:", *passed_over_lines(self.skipped, full)]
        return "\n".join([*out, "", *memory_lines(self.memory, activations)])

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


def report_of(
    name: str,
    recipe: Recipe,
    matching: Matching,
    layers: Mapping[str, Layer],
    attached: Attachment,
    dtype,
) -> AddReport:
    """Of adapters that were just attached."""
    return AddReport(
        name,
        recipe.table(),
        tuple(added_layer(n, adapter, layers[n]) for n, adapter in matching.adapters.items()),
        matching.selected,
        tuple((one.layer, str(one.shape), one.reason) for one in matching.skipped),
        len(layers),
        sum(map(layer_size, layers.values())),
        dtype_name(dtype),
        adapter_file_size(matching.adapters, dtype),
        training_memory(attached.parameters, attached.kept, dtype),
    )
