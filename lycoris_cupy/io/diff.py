"""Two adapter files layer by layer: the same, changed and by how much, or only in one of them.

Layers are matched by what their names mean, whatever the dialects; with a base, by its layers. What
is compared is the change, scale included: factors that differ may make the same one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..errors import FileFormatError, LycorisError, MatchError
from .checkpoint import open_checkpoint
from .exact import EXACT, beside, loss
from .merge import layer_shapes
from .names import BaseNames, fold
from .placing import Placed, survey, told_rows
from .report import plain
from .source import Source, open_source
from .target import Name


@dataclass(frozen=True)
class LayerDiff:
    """One layer. what: 'same' (bit for bit), 'equal' (another way to make the same change),
    'changed', 'only in A', 'only in B', or 'not comparable'. by: |B - A| / |A| where changed.
    """

    layer: str
    what: str
    by: float | None = None
    detail: str = ""

    def __str__(self) -> str:
        by = "" if self.by is None else f" by {self.by:.3g}"
        return f"{self.layer}: {self.what}{by}" + (f"; {self.detail}" if self.detail else "")


@dataclass(frozen=True)
class Diff:
    """layers: those of A in its order, then those that only B has."""

    a: str
    b: str
    layers: tuple[LayerDiff, ...]
    unread: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        """Whether both files do the same."""
        return not self.unread and all(one.what in ("same", "equal") for one in self.layers)

    def count(self, what: str) -> int:
        return sum(one.what == what for one in self.layers)

    def text(self) -> str:
        """A line of counts, and a line a layer that differs, the largest change first."""
        kinds = dict.fromkeys(one.what for one in self.layers)
        head = ", ".join(f"{self.count(kind)} {kind}" for kind in kinds)
        rest = [one for one in self.layers if one.what not in ("same", "equal")]
        rest.sort(key=lambda one: (one.by is not None, -(one.by or 0.0)))
        lines = [f"{self.a} and {self.b}: {head or 'no layers'}", *(f"  {one}" for one in rest)]
        return "\n".join(lines + [f"  not read: {name}" for name in self.unread])

    def as_dict(self) -> dict[str, Any]:
        return plain(asdict(self) | {"same": self.same})


def diff_files(
    a: str | os.PathLike,
    b: str | os.PathLike,
    base: str | os.PathLike | None = None,
    *,
    alpha_from: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Diff:
    """Compare two adapters. base: the checkpoint both are for, which also tells the kernels that
    flat factors hide. Raises MatchError where a file names a layer twice.
    """
    with ExitStack() as stack:
        sources = [stack.enter_context(open_source(path, alpha_from)) for path in (a, b)]
        shapes = None
        if base is not None:
            with open_checkpoint(base) as file:
                shapes = layer_shapes(file)
        (first, unread_a), (second, unread_b) = (_layers(s, shapes) for s in sources)
        second = _renamed(first, second)
        layers = [*first, *(name for name in second if name not in first)]
        out = []
        for i, layer in enumerate(layers):
            said = ".".join(filter(None, layer))
            out.append(_compare(said, first.get(layer), second.get(layer)))
            if progress is not None:
                progress(i + 1, len(layers))
        return Diff(str(a), str(b), tuple(out), (*unread_a, *unread_b))


_Layer = tuple[str | None, str]  # part of a model, folded path


def _renamed(first: dict[_Layer, Placed], second: dict[_Layer, Placed]) -> dict[_Layer, Placed]:
    """second, its layers named as in first where only one of the files says the part."""
    free = {path: (part, path) for part, path in first if (part, path) not in second}
    out = {}
    for (part, path), one in second.items():
        twin = None if (part, path) in first else free.get(path)
        known = twin is not None and (twin[0] is None or part is None)
        out[twin if known and twin is not None else (part, path)] = one
    return out


def _layers(source: Source, shapes) -> tuple[dict[_Layer, Placed], list[str]]:
    placed, unmatched = survey(source, None if shapes is None else BaseNames(shapes), shapes)
    out: dict[_Layer, Placed] = {}
    for one in placed:
        name = Name.of_module(one.module, None)
        label = (None, one.share.layer) if one.share.layer else (name.part, fold(name.path))
        if one.share.rows is not None:
            label = (None, f"{one.share.layer} rows {told_rows(one.share)}")
        if label in out:
            raise MatchError(
                f"{source.path}: modules {out[label].module.name!r} and {one.module.name!r} both "
                f"mean {label[1]!r}; remove one"
            )
        out[label] = one
    return out, [f"{source.path}: {entry}" for entry in unmatched]


def _compare(layer: str, one: Placed | None, other: Placed | None) -> LayerDiff:
    if one is None or other is None:
        return LayerDiff(layer, "only in B" if one is None else "only in A")
    a, b = one.adapter, other.adapter
    detail = "" if _told(one) == _told(other) else f"{_told(one)} -> {_told(other)}"
    if a == b and _same_bits(one, other):
        return LayerDiff(layer, "same")
    if a.shape != b.shape:
        return LayerDiff(layer, "not comparable", None, f"{a.shape} and {b.shape}")
    try:
        by = loss((a, one.params), (b, other.params))
    except (LycorisError, FileFormatError) as error:
        return LayerDiff(layer, "not comparable", None, str(error))
    more = _beside((a, one.params), (b, other.params))
    by = max(by, *more.values()) if more else by
    details = [detail, *(f"{what} by {much:.3g}" for what, much in more.items())]
    what = "changed" if by > EXACT else "equal"
    return LayerDiff(layer, what, by, "; ".join(filter(None, details)))


def _beside(one, other) -> dict[str, float]:
    """What differs beside the change itself, by |B - A| / |A|; infinite where only one has it."""
    left, right = beside(one), beside(other)
    out = {}
    for what in (*left, *(name for name in right if name not in left)):
        if what not in left or what not in right:
            only = left.get(what, right.get(what))
            much = float("inf") if np.any(only) or what != "the bias" else 0.0
        else:
            whole = float(np.linalg.norm(left[what]))
            apart = float(np.linalg.norm(right[what] - left[what]))
            much = apart / whole if whole else (float("inf") if apart else 0.0)
        if much > EXACT:
            out[what] = much
    return out


def _told(one: Placed) -> str:
    rank = f" rank {one.adapter.rank}" if one.adapter.has_rank else ""
    return f"{one.adapter.algorithm}{rank}, scale {one.adapter.scale:g}"


def _same_bits(one: Placed, other: Placed) -> bool:
    return all(
        value.dtype == other.params[name].dtype and np.array_equal(value, other.params[name])
        for name, value in one.params.items()
    )
