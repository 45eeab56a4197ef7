"""Rows: adapters of any algorithm side by side on rows of one layer's outputs.

    delta[t][:, rows_i] = scale * scale_i * delta_i[t]

For a layer that the base keeps fused (q, k and v in one weight) and a file keeps apart. Nothing is
approximated or multiplied out: each part takes its own route. It is no algorithm of files: every
part is saved under its own name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from ..arrays import Array
from ..errors import ShapeError
from ..layers import Layer, LayerShape
from ..ops.elementwise import add
from ..ops.extended import ready
from ..ops.join import Ranges, join_columns, take_columns
from ..svd import Svd, product_svd
from .base import Adapter, DropRanks, Parameters
from .biased import BIAS, Biased, without_bias
from .dora import KEY, DoRA
from .factor import Factor
from .full import Full
from .locon import LoCon
from .loha import LoHa
from .lokr import LoKr
from .tlora import TLoRA

# The factors on the output side, where any outputs can be taken alone.
_SIDES = {LoCon: ("up",), LoHa: ("w1_up", "w2_up"), Full: ("diff", "diff_b")}


class RowPart(NamedTuple):
    """An adapter of some rows. name: of the layer it was made for, in the file's naming."""

    name: str
    rows: Ranges
    adapter: Adapter


@dataclass(frozen=True)
class Rows(Adapter):
    """parts: adapters of distinct rows, their factors named `<part>.<factor>`. rank: the sum."""

    parts: tuple[RowPart, ...] = ()

    algorithm = "rows"
    keys = ()
    marks = ()

    def __post_init__(self):
        if self.shape.window.groups > 1:
            raise ShapeError(f"rows of a grouped convolution cannot be adapted; it is {self.shape}")
        if any(isinstance(part.adapter, TLoRA) for part in self.parts):
            raise ShapeError("tlora starts from a whole weight, not from rows of a fused one")
        end, last = 0, ""
        for (begin, stop), name in sorted((r, part.name) for part in self.parts for r in part.rows):
            if begin < end:
                raise ShapeError(f"{last!r} and {name!r} both change output {begin}; remove one")
            end, last = stop, name
        if end > self.shape.outputs:
            raise ShapeError(f"{last!r} changes output {end - 1} of {self.shape}")

    @classmethod
    def of(cls, shape: LayerShape, parts: Sequence[RowPart]) -> Rows:
        """Raises ShapeError where two parts change the same output."""
        return cls(shape, sum(part.adapter.rank for part in parts), None, tuple(parts))

    @property
    def scale(self) -> float:
        return 1.0

    @property
    def reads_weight(self) -> bool:  # pyright: ignore
        return any(part.adapter.reads_weight for part in self.parts)

    @property
    def scale_reason(self) -> str:
        return "each part has its own"

    def factors(self) -> dict[str, Factor]:
        return {
            f"{part.name}.{name}": factor
            for part in self.parts
            for name, factor in part.adapter.factors().items()
        }

    def joined(self, params: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Factors of all parts under this adapter's names."""
        return {
            f"{part.name}.{name}": value
            for part, own in zip(self.parts, params, strict=True)
            for name, value in own.items()
        }

    def split(self, p: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The factors of each part under its own names, and what dropout put beside them: the
        inverse of `joined`.
        """
        names = [(part.name, [*part.adapter.factors(), "mask"]) for part in self.parts]
        return [
            {name: p[f"{part}.{name}"] for name in own if f"{part}.{name}" in p}
            for part, own in names
        ]

    @property
    def rule(self) -> str:  # pyright: ignore
        return next((r for part in self.parts if (r := part.adapter.rule) != "base"), "base")

    @property
    def drops(self) -> str:  # pyright: ignore
        every = dict.fromkeys(part.adapter.drops for part in self.parts)
        return "" if "" in every else ", ".join(every)

    def drop_ranks(self, p: Parameters, drop: DropRanks) -> dict[str, Any]:
        split = zip(self.parts, self.split(p), strict=True)
        return self.joined(
            [
                part.adapter.drop_ranks(own, lambda w, axis, m, i=i: drop(w, axis, 2 * i + m))
                for i, (part, own) in enumerate(split)
            ]
        )

    def init(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return self.joined([part.adapter.init(rng) for part in self.parts])

    def delta_weight(self, weight: Array, p: Parameters, scale: Array) -> Array:
        return self._joined_columns(
            part.adapter.delta_weight(
                None if weight is None else take_columns(weight, part.rows),  # type: ignore
                own,
                scale * part.adapter.scale,
            )
            for part, own in zip(self.parts, self.split(p), strict=True)
        )

    def delta_bias(self, p: Parameters, bias: Array | None = None) -> Array | None:
        found = []
        for part, own in zip(self.parts, self.split(p), strict=True):
            its = None if bias is None else take_columns(bias, part.rows)
            change = part.adapter.delta_bias(own, its)
            if change is not None:
                found.append((part.rows, change))
        if not found:
            return None
        rows, changes = zip(*found, strict=True)
        return join_columns(changes, rows, self.shape.outputs)

    def svd(self, p: Mapping[str, np.ndarray], vectors: bool = True) -> Svd | None:
        downs, ups = [], []
        for part, own in zip(self.parts, self.split(p), strict=True):
            found = part.adapter.svd(own, True)
            if found is None or found.left is None or found.right is None:
                return None
            downs.append(found.left * (found.values * part.adapter.scale))
            ups.append(join_columns([found.right], [part.rows], self.shape.outputs))
        return product_svd(np.concatenate(downs, 1), np.concatenate(ups), vectors)

    def costs(self) -> dict[str, int]:
        return {"parts": sum(one.adapter.costs()[one.adapter.route] for one in self.parts)}

    def apply(
        self, change: Array | None, layer: Layer, x: Array, p: Parameters, scale: Array
    ) -> Array:
        own = self._joined_columns(
            ready(part.adapter.apply(None, _RowsOf(layer, part), x, q, scale * part.adapter.scale))
            for part, q in zip(self.parts, self.split(p), strict=True)
        )
        return own if change is None else add(change, own)

    def _joined_columns(self, changes) -> Array:
        return join_columns(list(changes), [part.rows for part in self.parts], self.shape.outputs)

    @classmethod
    def read(cls, shape, tensors, alpha) -> Rows:
        raise ShapeError("rows of a layer are read as the modules they are, not as one")

    @classmethod
    def guess_shape(cls, tensors) -> LayerShape:
        raise ShapeError("rows of a layer are read as the modules they are, not as one")


class _RowsOf(Layer):
    """Some rows of a layer, as an adapter sees them; the weight is copied only when asked for."""

    _layer: Layer
    _part: RowPart

    def __init__(self, layer: Layer, part: RowPart):
        # A frozen dataclass that computes what its parent stores.
        self.__dict__ |= {"_layer": layer, "_part": part, "window": layer.window}

    @property
    def weight(self) -> Array:
        return take_columns(self._layer.weight, self._part.rows)

    @property
    def bias(self) -> Array | None:
        whole = self._layer.bias
        return None if whole is None else take_columns(whole, self._part.rows)

    @property
    def shape(self) -> LayerShape:
        return self._part.adapter.shape


def row_unit(adapter: Adapter) -> int | None:
    """How many outputs `slice_rows` takes only together; None where it cannot take any apart."""
    if isinstance(adapter, LoKr):
        return adapter.split[1]
    if isinstance(adapter, DoRA):
        return row_unit(adapter.on) if adapter.axis == "output" else None
    return 1 if type(adapter) in _SIDES else None


def slice_rows(
    adapter: Adapter, params: Mapping[str, np.ndarray], begin: int, stop: int
) -> tuple[Adapter, dict[str, np.ndarray]]:
    """The part of an adapter that makes outputs begin to stop: for a base that keeps apart what the
    file has fused. Its input side is shared.

    Raises ShapeError for an algorithm whose outputs cannot be taken apart there.
    """
    shape, out = replace(adapter.shape, outputs=stop - begin), dict(params)
    if type(adapter) in _SIDES:
        for name in set(_SIDES[type(adapter)]) & set(params):
            out[name] = np.ascontiguousarray(params[name][..., begin:stop])
        return replace(adapter, shape=shape), out
    if isinstance(adapter, LoKr):
        _, columns, blocks, width = adapter.split
        if begin % columns == 0 and stop % columns == 0:
            name = "w1" if adapter.w1_rank is None else "w1_a"
            out[name] = params[name][begin // columns : stop // columns]
            split = ((stop - begin) // columns, columns, blocks, width)
            return replace(adapter, shape=shape, split=split), out
    if isinstance(adapter, Biased):
        own, out = slice_rows(adapter.on, without_bias(params), begin, stop)
        out[BIAS] = np.ascontiguousarray(params[BIAS][begin:stop])
        return Biased.over(own, adapter.scaled), out
    if isinstance(adapter, DoRA) and adapter.axis == "output":
        # The norm of an output is of its own row; one of an input couples all of them.
        own, out = slice_rows(
            adapter.on, {n: v for n, v in params.items() if n != KEY}, begin, stop
        )
        out[KEY] = np.ascontiguousarray(params[KEY][..., begin:stop])
        return replace(adapter, shape=own.shape, on=own), out
    raise ShapeError(
        f"{adapter.title} cannot be taken apart at outputs {begin}:{stop}, as the base has it; "
        "convert it to plain LoRA first (lycoris-cupy convert --algorithm lora)"
    )
