"""Adapter files from any dialect to any other, and any algorithm to plain LoRA.

Factors that need no change pass bit for bit. What would lose something (a change that the target's
rank or dtype cannot hold, a key that it has no place for) is refused unless it is asked for, and
then its size is in the report. The result takes its name only when it is whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from ..adapters import Adapter, Biased, LoCon, Rows
from ..adapters.biased import without_bias
from ..errors import FileFormatError, MatchError
from .adapter_file import STALE, about, cast_checked, spoken
from .alpha import METADATA
from .atomic import require_other
from .conversion import Conversion, Converted
from .convert_items import Item, labels_of, left_out_of, read_items
from .dialects import Dialect
from .exact import EXACT, as_lora, cast_params, fold_scale, loss
from .modules import told
from .peft_output import write_folder
from .safetensors import write
from .source import Source, files_read, open_source
from .target import dialect_named, module_names, require_expressible, spelled

NOTE = "lycoris_cupy.converted"


def convert_file(
    source: str | os.PathLike,
    out: str | os.PathLike,
    to: str,
    *,
    base: str | os.PathLike | None = None,
    algorithm: str | None = None,
    rank: int | None = None,
    dtype: np.dtype | None = None,
    lossy: bool = False,
    part: str | None = None,
    only: str | None = None,
    alpha_from: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Write `source` (a file, or PEFT's folder) in the dialect `to`.

    base: the model it is for; the result then has that model's own layer names, its fused layers
    fused. algorithm: 'lora' makes every module plain LoRA. rank: at most this one. dtype: of the
    factors in the result. lossy: whether a loss is accepted. part: of modules that do not tell
    theirs. only: leave all other parts out. progress: called with the modules done and in all.

    Raises FileFormatError for a loss that is not accepted or a module that the dialect cannot say,
    MatchError for names that cannot be given, and what `read_adapter` raises.
    """
    dialect = dialect_named(to)
    if algorithm not in (None, "lora"):
        raise FileFormatError(f"algorithm {algorithm!r}: a module can be made 'lora', or kept")
    if rank is not None and (rank < 1 or algorithm is None):
        raise FileFormatError(f"rank {rank} must be at least 1, and goes with --algorithm lora")
    _require_new(dialect, out)
    require_other(out, files_read(source, base))
    with open_source(source, alpha_from) as opened, about(opened.path):
        left_out = left_out_of(opened, lossy)
        items = read_items(opened, base, part)
        if only is not None:
            left_out += [i.module.name for i in items if i.name.part != only]
            items = [item for item in items if item.name.part == only]
        if not items:
            raise MatchError("no module is left to convert")
        labels = labels_of(items)
        names = module_names(dialect, dict(zip(labels, (i.name for i in items), strict=True)))
        for i, item in enumerate(items):
            _rewrite(item, dialect, algorithm, rank, dtype)
            if progress is not None:
                progress(i + 1, len(items))
        _require_lossless(items, lossy)
        written = [names[label] for label in labels]
        _write(out, dialect, written, items, _metadata(opened, dialect, items))
        return Conversion(
            opened.path,
            str(out),
            spoken(opened),
            dialect.name,
            tuple(
                Converted(
                    item.module.name,
                    module,
                    item.before[0].algorithm,
                    item.after[0].algorithm,
                    item.before[0].rank,
                    item.after[0].rank,
                    item.loss,
                    tuple(item.notes),
                )
                for item, module in zip(items, written, strict=True)
            ),
            tuple(left_out),
        )


def _require_new(dialect: Dialect, out) -> None:
    if dialect.alpha == "configuration" and os.path.lexists(out):
        raise FileFormatError(
            f"{out}: is there already, and {dialect.name} is a folder: choose another"
        )


def _rewrite(item: Item, dialect: Dialect, algorithm, rank, dtype) -> None:
    adapter, params = item.before
    fused = isinstance(adapter, Rows)
    if fused and not all(type(part.adapter) is LoCon for part in adapter.parts) and not algorithm:
        kinds = ", ".join(sorted({part.adapter.algorithm for part in adapter.parts}))
        raise FileFormatError(
            f"module {item.module.name!r} is one of several ({kinds}) that the base has in one "
            "layer: --algorithm lora makes them one plain LoRA"
        )
    if algorithm or fused:
        _require_known_kernel(item)
        with about(f"module {item.module.name!r}"):
            adapter, params, item.needed = as_lora(adapter, params, rank)
        _note_size(item, adapter)
    if isinstance(adapter, Biased) and dialect.algorithms is not None:
        item.notes.append(f"the change of its bias has no place in {dialect.name}")
        item.loss = float("inf")
        adapter, params = adapter.on, without_bias(params)
    require_expressible(dialect, adapter, item.module.name)
    if dialect.alpha == "folded":
        adapter, params = fold_scale(adapter, params)
    params = cast_params(adapter, params, dtype)
    item.after = adapter, params
    if adapter != item.before[0]:
        item.alpha = None
    if item.loss == 0:
        item.loss = loss(item.before, item.after)


def _require_known_kernel(item: Item) -> None:
    """A file's flat columns may hold a kernel: only the layer tells how many taps it has."""
    adapter = item.before[0]
    if not item.placed and told(adapter) != str(adapter.shape):
        raise FileFormatError(
            f"module {item.module.name!r} ({adapter.algorithm}) may be of a linear layer or of a "
            "convolution: give the model it is for (--base), to make it plain LoRA"
        )


def _note_size(item: Item, adapter: Adapter) -> None:
    """Say where a LoRA is larger than the change that it holds."""
    shape = adapter.shape
    dense = shape.taps * shape.inputs * shape.outputs
    size = adapter.rank * (shape.taps * shape.inputs + shape.outputs)
    if size > dense and adapter != item.before[0]:
        item.notes.append(f"larger than the layer itself ({size:,} for {dense:,} values)")


def _require_lossless(items: list[Item], lossy: bool) -> None:
    worse = sorted((item for item in items if item.loss > EXACT), key=lambda item: -item.loss)
    if not worse or lossy:
        return
    first = worse[0]
    if first.loss == float("inf"):
        why = f"module {first.module.name!r}: {first.notes[0]}"
    else:
        exact = max(item.needed for item in items)
        why = f"module {first.module.name!r} loses {first.loss:.3g} of its change"
        if first.needed > first.after[0].rank:
            why += f" at rank {first.after[0].rank} (exact for all is {exact})"
    raise FileFormatError(
        f"{len(worse)} of {len(items)} modules would lose something; {why}: --lossy accepts that"
    )


def _tensors(item: Item, dialect: Dialect) -> dict[str, np.ndarray]:
    adapter, params = item.after
    out = item.raw if item.intact else adapter.save(params)
    out = {k: v if k in adapter.flags else cast_checked(v, k, None) for k, v in out.items()}
    out = spelled(dialect, item.name.part, out)
    if dialect.alpha == "tensor" and adapter.saved_alpha is not None:
        alpha = item.alpha
        out["alpha"] = np.array(adapter.saved_alpha, np.float32) if alpha is None else alpha
    return out


def _write(out, dialect: Dialect, names: list[str], items: list[Item], metadata) -> None:
    tensors = {
        f"{name}.{word}": tensor
        for name, item in zip(names, items, strict=True)
        for word, tensor in _tensors(item, dialect).items()
    }
    if dialect.alpha != "configuration":
        write(out, tensors, metadata)
        return
    prefix = dialect.prefix(None) or ""
    adapters = {n.removeprefix(prefix): i.after[0] for n, i in zip(names, items, strict=True)}
    write_folder(Path(out), tensors, metadata, adapters)


def _metadata(source: Source, dialect: Dialect, items: list[Item]) -> Mapping[str, str]:
    """The file's own, but for hashes of its bytes and for ranks and alphas that no longer hold."""
    out = {key: value for key, value in source.file.metadata.items() if key not in STALE}
    same = dialect.alpha == "tensor" and all(i.after[0] == i.before[0] for i in items)
    out.pop(METADATA, None)
    if not same:
        for key in ("ss_network_dim", "ss_network_alpha", "ss_network_args"):
            out.pop(key, None)
    if dialect.alpha == "configuration":
        out.setdefault("format", "pt")  # PEFT's reader asks for it
    elif any(item.after[0].told for item in items):
        # Readers ask whose rotations they are.
        out.setdefault("ss_network_module", "lycoris.kohya")
    note = {"from": "+".join(spoken(source)), "to": dialect.name}
    return out | {NOTE: json.dumps(note)}
