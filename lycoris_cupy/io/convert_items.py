"""The modules of a file on their way to another dialect: read, named, and with what may pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from ..adapters import Adapter, Rows
from ..errors import FileFormatError, MatchError
from .adapter_file import about
from .checkpoint import open_checkpoint
from .merge import layer_shapes
from .names import BaseNames
from .placing import Params, gather, place, read_alone
from .source import Module, Source
from .target import Name


@dataclass
class Item:
    """One adapter on its way. name: its layer. before, after: (adapter, factors) as read and as
    they will be written. alpha: the tensor as it stands in the file, where it still holds. raw: the
    tensors as they stand, where their words and shapes are those that any file has.
    """

    module: Module
    name: Name
    before: tuple[Adapter, Mapping[str, np.ndarray]]
    after: tuple[Adapter, Mapping[str, np.ndarray]]
    alpha: np.ndarray | None = None
    needed: int = 0
    notes: list[str] = field(default_factory=list)
    loss: float = 0.0
    placed: bool = False  # on a layer of the base
    raw: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def intact(self) -> bool:
        """Whether the file's own tensors say what is to be written."""
        same = self.after[0] == self.before[0] and self.after[1] is self.before[1]
        return same and bool(self.raw)


def read_items(source: Source, base, part: str | None) -> list[Item]:
    if base is None:
        items = []
        for module in source.modules:
            with about(f"module {module.name!r}"):
                adapter, params, _ = read_alone(source, module, None)
            items.append(_item(source, module, Name.of_module(module, part), adapter, params))
        return items
    with open_checkpoint(base) as file:
        shapes = layer_shapes(file)
    names, placed = BaseNames(shapes), []
    for module in source.modules:
        found = place(source, module, names, shapes)
        if not found:
            nearest = names.nearest(module.key)
            raise MatchError(
                f"module {module.name!r} matches no layer of {base}"
                + (f"; nearest layer: {nearest!r}" if nearest else "")
            )
        placed += found
    whole = {one.share.layer: one for one in placed}
    out = []
    for layer, (adapter, params) in gather(placed, shapes).items():
        one = whole[layer]
        name = Name.of_layer(layer, one.module, part)
        item = _item(source, one.module, name, adapter, params)
        item.placed, item.raw = True, {}  # in the shapes of the layer
        if one.share.of is not None or one.share.rows is not None:
            item.notes.append(
                "its rows of the fused module" if one.share.of else "several modules, fused"
            )
        out.append(item)
    return out


def _item(source: Source, module: Module, name: Name, adapter: Adapter, params: Params) -> Item:
    name = replace(name, own=adapter.prefix)
    item = Item(module, name, (adapter, params), (adapter, params))
    if "alpha" in module.keys and not isinstance(adapter, Rows):
        value = source.file[module.keys["alpha"]]
        if value.size == 1 and float(value.reshape(())) == adapter.alpha:
            item.alpha = value
    words = {factor.key for factor in adapter.factors().values()} | set(adapter.flags)
    keys = {word: key for word, key in module.keys.items() if word != "alpha"}
    # Other words, and PEFT's magnitudes, are other shapes too.
    if keys.keys() == words and not any(k.endswith("lora_magnitude_vector") for k in keys.values()):
        item.raw = {word: source.file[key] for word, key in keys.items()}
    return item


def left_out_of(source: Source, lossy: bool) -> list[str]:
    if source.unread and not lossy:
        first, *others = source.unread
        more = f" and {len(others)} more" if others else ""
        raise FileFormatError(f"{first}{more}; --lossy leaves what is not read out")
    return [entry.name for entry in source.unread]


def labels_of(items: list[Item]) -> list[str]:
    """What errors call the modules: a fused one that is taken apart stands for several layers."""
    named = [item.module.name for item in items]
    return [
        name if named.count(name) == 1 else f"{name} on {item.name.path}"
        for name, item in zip(named, items, strict=True)
    ]
