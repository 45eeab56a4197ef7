"""Adapter files at a lower rank, in the dialect they are in.

Modules whose rank stays pass bit for bit. A module that has no rank to lower is refused, or passes
as it is when that is asked for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from ..adapters import Adapter
from ..errors import FileFormatError, LycorisError
from ..ranks import RankRule
from ..resize import Resized, cut, resized
from .adapter_file import STALE, cast_checked
from .alpha import METADATA
from .atomic import require_other
from .change_report import ChangeReport, LayerChange
from .exact import fold_scale
from .modules import told
from .peft_output import write_folder
from .placing import read_alone
from .safetensors import NUMPY, Stored, write
from .source import Module, Source, files_read, open_source
from .target import spelled

NOTE = "lycoris_cupy.resized"
# What the metadata says of the ranks of before.
_RANKS = ("ss_network_dim", "ss_network_alpha", METADATA)


def resize_file(
    source: str | os.PathLike,
    out: str | os.PathLike,
    rule: RankRule | int,
    *,
    conv_rule: RankRule | int | None = None,
    keep_others: bool = False,
    dtype: np.dtype | None = None,
    alpha_from: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ChangeReport:
    """Write `source` with the rank of every module lowered by the rule.

    rule: a RankRule, or a number of first ranks to cut to (DyLoRA). conv_rule: for kernels larger
    than one; None for the same. keep_others: pass modules on that have no rank to lower. dtype: of
    new factors; None for those of the module. progress: called with the modules done and in all.

    Raises FileFormatError for a module that cannot be resized, naming it. The scale alpha / rank of
    each module stays, except where ranks are cut: there alpha does.
    """
    require_other(out, files_read(source))
    with open_source(source, alpha_from) as opened:
        if opened.unread:
            raise FileFormatError(f"{opened.path}: {opened.unread[0]}")
        tensors: dict[str, np.ndarray | Stored] = {}
        layers, adapters, changed = [], {}, False
        for i, module in enumerate(opened.modules):
            new, layer, adapter = _module(opened, module, rule, conv_rule, keep_others, dtype)
            changed = changed or adapter is not None
            tensors |= new
            layers.append(layer)
            adapters[module.name] = adapter
            if progress is not None:
                progress(i + 1, len(opened.modules))
        metadata = _metadata(opened.file.metadata, rule, changed)
        if changed and any(d.alpha == "configuration" for d in opened.dialects):
            _write_peft(opened, out, tensors, metadata, adapters)
        else:
            write(out, tensors, metadata)
    return ChangeReport(str(out), tuple(layers))


def _module(
    source: Source, module: Module, rule, conv_rule, keep_others: bool, dtype
) -> tuple[dict[str, np.ndarray | Stored], LayerChange, Adapter | None]:
    """Tensors, report, and the new adapter if it is one."""
    where = f"{source.path}: module {module.name!r}"
    try:
        before, params, _ = read_alone(source, module, None)
    except (FileFormatError, ValueError, TypeError) as error:
        raise type(error)(f"{where}: {error}") from None
    chosen = rule if conv_rule is None or before.shape.taps == 1 else conv_rule
    notes: tuple[str, ...] = ()
    try:
        if isinstance(chosen, int):
            found = cut(before, params, chosen)
        else:
            found = resized(before, params, chosen)
    except LycorisError as error:
        if not keep_others:
            raise FileFormatError(f"{where}: {error}; --keep-others passes it on") from None
        found, notes = Resized(before, params, 0.0), ("passed on as it is",)
    adapter = found.adapter
    if adapter is before:
        same: dict[str, np.ndarray | Stored] = {
            key: source.file.stored(key) for key in module.keys.values()
        }
        form = f"{before.algorithm} rank {before.rank}, as before"
        numbers = sum(value.size for value in params.values())
        return same, LayerChange(module.name, told(before), form, 0.0, numbers, notes=notes), None
    dialect, part = module.key.dialect, (module.key.parts or (None,))[0]
    wide = found.params
    if dialect.alpha == "folded":
        adapter, wide = fold_scale(adapter, wide)
    kind = dtype
    if kind is None:  # the widest that the module has
        names = {source.file.dtype(key) for s, key in module.keys.items() if s != "alpha"}
        kind = max((NUMPY[name] for name in names), key=lambda d: d.itemsize)
    saved = {k: cast_checked(v, k, kind) for k, v in adapter.save(wide).items()}
    out = {f"{module.name}.{word}": v for word, v in spelled(dialect, part, saved).items()}
    if dialect.alpha == "tensor" and adapter.saved_alpha is not None:
        out[f"{module.name}.alpha"] = np.array(adapter.saved_alpha, np.float32)
    form = f"{before.algorithm} rank {before.rank} -> {adapter.rank}"
    numbers = sum(value.size for value in saved.values())
    return out, LayerChange(module.name, told(before), form, found.error, numbers), adapter


def _write_peft(source: Source, out, tensors, metadata, adapters: Mapping) -> None:
    """PEFT's folder, whose configuration names ranks and alphas."""
    described = {}
    for module in source.modules:
        adapter = adapters[module.name]
        kept = read_alone(source, module, None)[0] if adapter is None else adapter
        described[module.key.path] = kept
    arrays = {n: source.file[n] if isinstance(t, Stored) else t for n, t in tensors.items()}
    write_folder(Path(out), arrays, {"format": "pt", **metadata}, described)


def _metadata(metadata: Mapping[str, str], rule: RankRule | int, changed: bool) -> dict[str, str]:
    gone = (*STALE, *_RANKS) if changed else STALE
    how = {"cut": rule} if isinstance(rule, int) else {rule.kind: rule.value, "most": rule.most}
    note = {NOTE: json.dumps({key: value for key, value in how.items() if value is not None})}
    return {key: value for key, value in metadata.items() if key not in gone} | note
