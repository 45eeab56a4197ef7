"""Modules of an adapter file onto the layers of a base: by name, then by the shapes that fit.

A module may change a whole layer, some rows of a layer that the base keeps fused, or several layers
that the base keeps apart. What could mean two things is refused with both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from ..adapters import Adapter, truncated
from ..adapters.rows import RowPart, Rows, slice_rows
from ..errors import LycorisError, MatchError, ShapeError
from ..layers import LayerShape
from .aliases import Share
from .modules import checked_scale, read_module
from .names import BaseNames
from .peft import read_own_words, scaled_by_configuration
from .report import Unmatched
from .source import Module, Source

Params = dict[str, np.ndarray]
Loaded = dict[str, tuple[Adapter, Params]]


@dataclass(frozen=True)
class Placed:
    """A module on one layer. rows: of the layer, or None for all. alpha_from: '' for its tensor."""

    module: Module
    share: Share
    adapter: Adapter
    params: Params
    alpha_from: str

    def truncated(self, rank: int) -> Placed:
        """The same, cut to a rank. Raises LycorisError, see `truncated`."""
        adapter, params = truncated(self.adapter, self.params, rank)
        return replace(self, adapter=adapter, params=params)


def read_alone(
    source: Source, module: Module, shape: LayerShape | None
) -> tuple[Adapter, Params, str]:
    """(adapter, factors, where alpha comes from) of a module on a layer of this shape, or none."""
    configuration = source.alphas.configuration
    own = read_own_words(source, module, shape)
    adapter, params = own or read_module(
        source.file,
        module.keys,
        shape,
        source.dora,
        source.rule,
        source.dialect,
        module.key.prefix,
        None if configuration is None else configuration.values,
    )
    if configuration is not None:
        params = scaled_by_configuration(adapter, params, configuration, module.key.path)
    if not adapter.has_rank or adapter.ignores_alpha:
        return adapter, params, ""
    tensor = adapter.alpha if "alpha" in module.keys else None
    alpha, where = source.alphas.find(
        module.name, module.key.path, tensor, adapter.rank, adapter.shape.taps > 1
    )
    if alpha != adapter.alpha:
        adapter = checked_scale(adapter.with_alpha(alpha))
    return adapter, params, where


def place(
    source: Source, module: Module, names: BaseNames, shapes: Mapping[str, LayerShape]
) -> list[Placed]:
    """The layers that a module changes; none if no name is like its own.

    Raises MatchError where several readings fit, ShapeError where the only one does not.
    """
    misfits: list[tuple[list[Share], LycorisError]] = []
    for readings in names.candidates(module.key):
        fits = []
        for shares in readings:
            try:
                fits.append(_read(source, module, shares, shapes))
            except ShapeError as error:
                misfits.append((shares, error))
        if len(fits) > 1:
            raise MatchError(
                f"module {module.name!r} could mean any of "
                f"{', '.join(_said(placed[0].share) for placed in fits)}: rename all but one"
            )
        if fits:
            return fits[0]
    where = f"module {module.name!r} on layer "
    distinct = {_said(shares[0]): error for shares, error in misfits}
    if len(distinct) == 1:
        ((layer, error),) = distinct.items()
        raise type(error)(f"{where}{layer}: {error}")
    if distinct:
        said = "; ".join(f"{layer}: {error}" for layer, error in distinct.items())
        raise MatchError(f"module {module.name!r} fits none of the layers of its name: {said}")
    return []


def _read(source, module: Module, shares: list[Share], shapes) -> list[Placed]:
    first = shares[0]
    shape = shapes[first.layer]
    if first.rows is not None:
        shape = replace(shape, outputs=sum(b - a for a, b in first.rows))
    elif first.of is not None:
        shape = replace(shape, outputs=sum(shapes[share.layer].outputs for share in shares))
    try:
        adapter, params, where = read_alone(source, module, shape)
    except (ShapeError, MatchError):
        raise
    except LycorisError as error:
        said = f"module {module.name!r} on layer {_said(first)}: {error}"
        raise type(error)(said) from None
    out = []
    for share in shares:
        mine = (adapter, params)
        if share.of is not None:
            mine = slice_rows(adapter, params, *share.of)
        out.append(Placed(module, share, *mine, where))
    return out


def survey(
    source: Source,
    names: BaseNames | None = None,
    shapes: Mapping[str, LayerShape] | None = None,
) -> tuple[list[Placed], list[Unmatched]]:
    """What can be read, on the layers of a base or on none, and what cannot, with the reason."""
    placed: list[Placed] = []
    unmatched = list(source.unread)
    for module in source.modules:
        try:
            if names is None or shapes is None:
                found = [Placed(module, Share(""), *read_alone(source, module, None))]
            else:
                found = place(source, module, names, shapes)
        except LycorisError as error:
            unmatched.append(Unmatched(module.name, str(error)))
        else:
            placed += found
            if not found and names is not None:
                nearest = names.nearest(module.key)
                unmatched.append(Unmatched(module.name, "no layer has this name", nearest))
    return placed, unmatched


def gather(placed: list[Placed], shapes: Mapping[str, LayerShape]) -> Loaded:
    """One adapter a layer: that of its module, or those of its rows side by side.

    Raises MatchError where two modules change the same rows.
    """
    by_layer: dict[str, list[Placed]] = {}
    for one in placed:
        by_layer.setdefault(one.share.layer, []).append(one)
    out = {}
    for layer, own in by_layer.items():
        whole = [one for one in own if one.share.rows is None]
        if len(own) > 1 and whole:
            first, second = sorted(own, key=lambda one: one is not whole[0])[:2]
            raise MatchError(
                f"duplicate layer after name folding: modules {first.module.name!r} and "
                f"{second.module.name!r} both mean {layer!r}; remove one"
            )
        if whole:
            out[layer] = whole[0].adapter, whole[0].params
            continue
        parts = tuple(
            RowPart(one.module.key.path, one.share.rows or (), one.adapter) for one in own
        )
        try:
            adapter = Rows.of(shapes[layer], parts)
        except ShapeError as error:
            raise MatchError(f"layer {layer!r}: {error}") from None
        out[layer] = adapter, adapter.joined([one.params for one in own])
    return out


def _said(share: Share) -> str:
    rows = "" if share.rows is None else f" rows {told_rows(share)}"
    return f"{share.layer!r}{rows}"


def told_rows(share: Share) -> str | None:
    """'0:3072' of a share of some rows, None of a whole layer."""
    if share.rows is None:
        return None
    return ", ".join(f"{a}:{b}" for a, b in share.rows)
