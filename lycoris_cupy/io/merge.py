"""Merging adapters into a checkpoint: weight' = weight + sum of strength * scale * change, rounded
once.

The checkpoint may be larger than memory: a few tensors of it are in memory at a time, what no
adapter touches passes bit for bit, and the result takes its name only when it is whole, so that it
may replace the base itself. The adapters' factors are held in memory.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from threading import local

import numpy as np
from threadpoolctl import threadpool_limits

from ..arrays import f32, resolve_device
from ..errors import DtypeError, FileFormatError, MatchError, ShapeError
from ..layers import LayerShape
from ..norms import NormShape
from .adapter_file import STALE, read_adapter
from .atomic import new_folder, replacing, require_other, require_place
from .checkpoint import Checkpoint, open_checkpoint
from .merge_layer import Part, merge_into, merged_bias
from .merge_report import MergeReport
from .names import FUSED, tensors_of
from .output import require_room
from .report import LoadReport
from .rounding import MERGED_DTYPES, Survival
from .safetensors import NUMPY, Stored, dump
from .shards import Shards, split, write_index
from .source import files_read
from .strength import LayerStrength, require_used, strength_on

NOTE = "lycoris_cupy.merged"
# What stands beside an 8-bit weight that holds the quotient by a scale: a sum with it is wrong.
_SCALES = ("weight_scale", "scale_weight", "weight_scale_inv", "scale", "weight_scale_2")
_WORKERS = 2  # threads; a third only waits for its turn to write
_scratch = local()
Adapters = Sequence[tuple[str | os.PathLike, float]]
Read = list[tuple[str | os.PathLike, float, dict, LoadReport]]


def merge_files(
    base_path: str | os.PathLike,
    adapters: Adapters,
    out_path: str | os.PathLike,
    *,
    rules: Sequence[LayerStrength] = (),
    strict: bool = True,
    shard_size: int | None = None,
    device: str = "cpu",
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **reading,
) -> MergeReport:
    """Write the base with all adapters, each (path, strength), added.

    base_path: as `open_checkpoint` takes it. rules: strengths of some layers. shard_size: bytes of
    tensors a shard, 0 for one file, None for the shards of the base. Several shards make out_path a
    folder, with an index and the small files beside the base. device: where changes are computed.
    dry_run: everything is read and checked, nothing is written. progress: called with the bytes
    written and in all. reading: options of `read_adapter`, as alpha_from, dora, rule, dialect.

    Sums are f32, or f64 for an f64 base. A strength of 0 changes no bit, unless the rule is
    'reference'. Raises as `read_adapter`
    does, MatchError for a rule that fits nothing, DtypeError for a weight that cannot be summed,
    and FileFormatError for a sum that the base's dtype cannot hold. On any error, or a kill, what
    is at out_path is what it was.
    """
    device = resolve_device(device)
    require_place(out_path)
    _require_adapters(adapters, out_path)
    with open_checkpoint(base_path) as base:
        if base.stem is not None:  # a file alone may be replaced, one of several may not
            require_other(out_path, base.paths)
        read = _read_all(base, adapters, partial(read_adapter, strict=strict, **reading))
        require_used(rules, [(path, found) for path, _, found, _ in read])
        parts = _parts(base, read, rules)
        survival: dict[str, Survival] = {}
        changed = {
            name: tensor
            for layer, some in parts.items()
            for name, tensor in _merged(base, layer, some, survival, device).items()
        }
        shards = _placed(base, changed, shard_size)
        folder = len(shards) > 1 or (base.stem is not None and shard_size is None)
        if folder and os.fspath(out_path).endswith(".safetensors"):
            raise FileFormatError(
                f"{out_path}: the result has {len(shards)} shards and an index: name a folder, or "
                "ask for one file with shard size 0"
            )
        if not folder:
            shards = {Path(out_path).name: next(iter(shards.values()))}
        report = MergeReport(
            tuple(report for *_, report in read),
            tuple(strength for _, strength in adapters),
            {name: tuple(one.strength for one in some) for name, some in parts.items()},
            {name: sum(one.nbytes for one in some.values()) for name, some in shards.items()},
            tuple(changed),
            base.dtypes(),
            survival,
        )
        require_room(Path(os.path.realpath(out_path)).parent, report.nbytes)
        if not dry_run:
            note = _note(base, adapters, rules)
            options = note, progress, 1 if device != "cpu" else _WORKERS
            with threadpool_limits(1, "blas"):  # its threads wait by spinning, in the way of ours
                if folder:
                    _write_folder(base, shards, out_path, *options)
                else:
                    _write_file(base, shards, out_path, *options)
    return report


def scratch(size: int) -> np.ndarray:
    """Memory of this thread for one tensor, always the same: fresh pages cost more than sums."""
    memory = getattr(_scratch, "memory", None)
    if memory is None or memory.size < size:
        memory = _scratch.memory = np.empty(size, np.uint8)
    return memory


def layer_shapes(base: Checkpoint) -> dict[str, LayerShape]:
    """The layers of a checkpoint: each `<name>.weight` of two to five axes, groups unknown; one
    axis is taken for a norm's. A fused `in_proj_weight` is a layer of its own name.
    """
    weights = (
        name
        for name in base
        if name.endswith((".weight", FUSED)) and 1 <= len(base.shape(name)) <= 5
    )
    # An axis of no extent makes no kernel; no adapter fits it either.
    return {
        n.removesuffix(".weight"): NormShape.of_channels(base.shape(n)[0])
        if len(base.shape(n)) == 1
        else LayerShape.of_file(base.shape(n))
        for n in weights
        if all(base.shape(n)[2:])
    }


def _require_adapters(adapters: Adapters, out_path: str | os.PathLike) -> None:
    for path, strength in adapters:
        if not math.isfinite(strength):
            raise FileFormatError(f"{path}: strength is {strength}, expected a finite number")
        require_other(out_path, files_read(path))


def _read_all(base: Checkpoint, adapters: Adapters, read: Callable) -> Read:
    shapes = layer_shapes(base)
    if not shapes:
        raise MatchError(
            f"{base.path}: has no tensor named <layer>.weight with one to five axes: not a "
            "checkpoint?"
        )
    files: dict[str, tuple] = {}  # an adapter may be named twice
    for path, _ in adapters:
        where = os.path.realpath(path)
        if where not in files:
            files[where] = read(path, shapes)
    return [(path, strength, *files[os.path.realpath(path)]) for path, strength in adapters]


def _parts(base: Checkpoint, read: Read, rules: Sequence[LayerStrength]) -> dict[str, list[Part]]:
    """What each adapter does to each layer, without what has no strength."""
    parts: dict[str, list[Part]] = {}
    for path, own, found, _ in read:
        for layer, (adapter, params) in found.items():
            _require_float(base, tensors_of(layer)[0], layer)
            strength = strength_on(layer, path, own, rules)
            if not abs(strength * adapter.scale) <= float(np.finfo(np.float32).max):
                raise FileFormatError(
                    f"{path}: strength {strength:g} * scale {adapter.scale:g} is more than f32 "
                    "holds"
                )
            if strength * adapter.scale != 0 or adapter.rule == "reference":
                parts.setdefault(layer, []).append(Part(adapter, params, strength))
    return parts


def _merged(
    base: Checkpoint, layer: str, parts: list[Part], survival: dict[str, Survival], device: str
) -> dict[str, Stored]:
    """The changed tensors of a layer, made when they are written."""
    weight, bias = tensors_of(layer)

    def make_weight() -> np.ndarray:
        array = base.into(weight, scratch(base.stored(weight).nbytes))
        survival[weight] = merge_into(weight, array, parts, device)
        return array

    out = {weight: Stored(base.dtype(weight), base.shape(weight), make_weight)}
    outputs = parts[0].adapter.shape.outputs
    there = np.zeros(outputs, f32) if bias in base else None
    if any(adapter.delta_bias(params, there) is not None for adapter, params, _ in parts):
        if bias in base:
            _require_float(base, bias, layer)
            if base.shape(bias) != (outputs,):
                raise ShapeError(
                    f"{base.path}: {bias!r} has shape {base.shape(bias)}, expected ({outputs},)"
                )
        dtype = base.dtype(bias if bias in base else weight)
        out[bias] = Stored(
            dtype, (outputs,), partial(_make_bias, base, bias, NUMPY[dtype], outputs, parts)
        )
    return out


def _make_bias(base: Checkpoint, name, dtype: np.dtype, outputs: int, parts) -> np.ndarray:
    if name in base:
        return merged_bias(name, base[name], parts)
    return merged_bias(name, np.zeros(outputs, dtype), parts, new=True)


def _require_float(base: Checkpoint, name: str, layer: str) -> None:
    if base.dtype(name) not in MERGED_DTYPES:
        raise DtypeError(
            f"{base.path}: {name!r} has dtype {base.dtype(name)}, and an adapter changes it; "
            f"expected one of {', '.join(MERGED_DTYPES)}: merge into the checkpoint that this one "
            "was quantised from"
        )
    if base.dtype(name).startswith("F8"):
        for scale in _SCALES:
            if f"{layer}.{scale}" in base:
                raise DtypeError(
                    f"{base.path}: {name!r} is {base.dtype(name)} with a scale in "
                    f"'{layer}.{scale}', and an adapter changes it: merge into the checkpoint that "
                    "this one was quantised from"
                )


def _placed(base: Checkpoint, changed: Mapping[str, Stored], size: int | None) -> Shards:
    """All tensors of the result by file. A new bias goes where its weight is."""
    out: Shards = {name: {} for name in base.shards}
    for name in base:
        out[base.shard_of(name)][name] = changed.get(name) or base.stored(name)
    for name in changed:
        if name not in base:
            weight = name.removesuffix("bias") + "weight"
            out[base.shard_of(weight)][name] = changed[name]
    if size is None:
        return out
    everything = {name: tensor for some in out.values() for name, tensor in some.items()}
    stem = base.stem or "model"
    return split(everything, size, stem) if size else {f"{stem}.safetensors": everything}


def _write_file(base: Checkpoint, shards: Shards, out_path, note, progress, workers: int) -> None:
    with replacing(out_path) as handle:
        (tensors,) = shards.values()
        dump(handle, tensors, _kept(base.metadata) | note, progress, workers)


def _write_folder(base: Checkpoint, shards: Shards, out_path, note, progress, workers: int) -> None:
    total, before = sum(t.nbytes for some in shards.values() for t in some.values()), 0
    with new_folder(out_path) as folder:
        for name, tensors in shards.items():
            step = None if progress is None else partial(_shifted, progress, before, total)
            source = base.shards[name].metadata if name in base.shards else base.metadata
            with open(folder / name, "xb", buffering=0) as handle:
                dump(handle, tensors, _kept(source) | note, step, workers)
            before += sum(tensor.nbytes for tensor in tensors.values())
        write_index(folder, base.stem or "model", shards, base.index_metadata)
        if base.stem is not None:
            base.copy_companions(folder)


def _shifted(progress, before: int, total: int, done: int, _: int) -> None:
    progress(min(before + done, total), total)


def _kept(metadata: Mapping[str, str]) -> dict[str, str]:
    """Without hashes that are no longer true, and the note of before, which `_note` takes over."""
    return {key: value for key, value in metadata.items() if key not in (*STALE, NOTE)}


def _note(base: Checkpoint, adapters: Adapters, rules: Sequence[LayerStrength]) -> dict[str, str]:
    """What was merged, appended to what was before."""
    before = base.metadata.get(NOTE, "[]")
    try:
        note = json.loads(before)
    except ValueError:
        note = before
    note = note if isinstance(note, list) else [note]
    for path, strength in adapters:
        entry: dict = {"file": Path(path).name, "strength": strength}
        layers = {rule.pattern: rule.value for rule in rules if rule.concerns(path)}
        note.append(entry | ({"layers": layers} if layers else {}))
    return {NOTE: json.dumps(note)}
