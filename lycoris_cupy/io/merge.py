"""Merging adapters into a checkpoint: weight' = weight + sum of strength * scale * change, rounded
once.

The checkpoint is streamed: one tensor of it is in memory at a time, what no adapter touches passes
bit for bit, and the result takes its name only when it is whole, so that it may replace the base
itself.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from ..adapters import Adapter
from ..arrays import f32, wide_dtype
from ..errors import DtypeError, FileFormatError, MatchError, ShapeError
from ..layers import LayerShape
from ..norms import NormShape
from .adapter_file import STALE, read_adapter
from .modules import FACTOR_DTYPES
from .report import LoadReport
from .safetensors import NUMPY, Stored, TensorFile, dump, open_file, replacing

NOTE = "lycoris_cupy.merged"
_Part = tuple[
    Adapter, dict[str, np.ndarray], float
]  # one adapter's share in one layer, at a strength


def merge_files(
    base_path: str | os.PathLike,
    adapters: Sequence[tuple[str | os.PathLike, float]],
    out_path: str | os.PathLike,
    *,
    strict: bool = True,
    progress: Callable[[int, int], None] | None = None,
    dora: str | None = None,
    rule: str = "base",
    dialect: str | None = None,
) -> list[LoadReport]:
    """Write the base with all adapters, each (path, strength), added; one report an adapter.

    dora, rule, dialect: as for `read_adapter`. Sums are f32, or f64 for an f64 base. progress:
    called with the bytes written and in all. A strength of 0 changes no bit, unless the rule is
    'reference'.
    Raises as `read_adapter` does, DtypeError for a layer that is no float, and FileFormatError for
    a sum that the base's dtype cannot hold. On any error, or a kill, the file at out_path is what
    it was.
    """
    for path, strength in adapters:
        if not math.isfinite(strength):
            raise FileFormatError(f"{path}: strength is {strength}, expected a finite number")
        if os.path.exists(out_path) and os.path.exists(path) and os.path.samefile(path, out_path):
            raise FileFormatError(
                f"{path}: the result would overwrite the adapter; choose another output"
            )
    with replacing(out_path) as handle, open_file(base_path) as base:
        read = partial(read_adapter, strict=strict, dora=dora, rule=rule, dialect=dialect)
        parts, reports = _read_all(base, adapters, read)
        tensors = {name: base.stored(name) for name in base}
        for layer, shares in parts.items():
            tensors |= _merged(base, layer, shares)
        dump(handle, tensors, _metadata(base, adapters), progress)
    return reports


def layer_shapes(base: TensorFile) -> dict[str, LayerShape]:
    """The layers of a checkpoint: each `<name>.weight` of two to five axes, groups unknown; one
    axis is taken for a norm's.
    """
    weights = (
        name for name in base if name.endswith(".weight") and 1 <= len(base.shape(name)) <= 5
    )
    # An axis of no extent makes no kernel; no adapter fits it either.
    return {
        n.removesuffix(".weight"): NormShape.of_channels(base.shape(n)[0])
        if len(base.shape(n)) == 1
        else LayerShape.of_file(base.shape(n))
        for n in weights
        if all(base.shape(n)[2:])
    }


def _read_all(base, adapters, read) -> tuple[dict[str, list[_Part]], list[LoadReport]]:
    shapes = layer_shapes(base)
    if not shapes:
        raise MatchError(
            f"{base.path}: has no tensor named <layer>.weight with one to five axes: not a "
            "checkpoint?"
        )
    files: dict[str, tuple] = {}  # an adapter may be named twice
    parts: dict[str, list[_Part]] = {}
    for path, strength in adapters:
        where = os.path.realpath(path)
        if where not in files:
            files[where] = read(path, shapes)
        for layer, (adapter, params) in files[where][0].items():
            _require_float(base, f"{layer}.weight")
            if not abs(strength * adapter.scale) <= float(np.finfo(np.float32).max):
                raise FileFormatError(
                    f"{path}: strength {strength:g} * scale {adapter.scale:g} is more than f32 "
                    "holds"
                )
            if strength * adapter.scale != 0 or adapter.rule == "reference":
                parts.setdefault(layer, []).append((adapter, params, strength))
    return parts, [files[os.path.realpath(path)][1] for path, _ in adapters]


def _merged(base: TensorFile, layer: str, shares: list[_Part]) -> dict[str, Stored]:
    weight, bias = f"{layer}.weight", f"{layer}.bias"
    out = {
        weight: Stored(
            base.dtype(weight), base.shape(weight), partial(_merge_weight, base, weight, shares)
        )
    }
    there = np.zeros(shares[0][0].shape.outputs, f32) if bias in base else None
    if any(adapter.delta_bias(params, there) is not None for adapter, params, _ in shares):
        outputs = shares[0][0].shape.outputs
        if bias in base:
            _require_float(base, bias)
            if base.shape(bias) != (outputs,):
                raise ShapeError(
                    f"{base.path}: {bias!r} has shape {base.shape(bias)}, expected ({outputs},)"
                )
        dtype = base.dtype(bias if bias in base else weight)
        out[bias] = Stored(
            dtype, (outputs,), partial(_merge_bias, base, bias, NUMPY[dtype], outputs, shares)
        )
    return out


@np.errstate(over="ignore", invalid="ignore")  # `_rounded` says it
def _merge_weight(base: TensorFile, name: str, shares: list[_Part]) -> np.ndarray:
    old = base[name]
    kept = _wide(old.dtype)
    total = old.astype(kept)
    outputs, inputs = (*total.shape, 1)[:2]
    matrix = total.reshape(outputs, inputs, -1)
    weight = np.ascontiguousarray(matrix.transpose(2, 1, 0))  # every change is one of the base
    for adapter, params, strength in shares:
        wide = adapter.canonical({key: value.astype(kept) for key, value in params.items()})
        change = adapter.delta_weight(weight, wide, np.array([strength * adapter.scale], kept))
        matrix += change.transpose(2, 1, 0)
    return _rounded(base, name, old, total)


@np.errstate(over="ignore", invalid="ignore")
def _merge_bias(
    base: TensorFile, name: str, dtype: np.dtype, outputs: int, shares: list[_Part]
) -> np.ndarray:
    old = base[name] if name in base else np.zeros(outputs, dtype)
    kept = _wide(dtype)
    total = old.astype(kept)
    for adapter, params, strength in shares:
        change = adapter.delta_bias(params, old.astype(kept) if name in base else None)
        if change is not None:
            total += np.asarray(strength * adapter.scale, kept) * change.astype(kept)
    return _rounded(base, name, old, total)


def _wide(dtype: np.dtype) -> np.dtype:
    return f32 if dtype == np.float16 else wide_dtype(dtype)


def _rounded(base: TensorFile, name: str, old: np.ndarray, total: np.ndarray) -> np.ndarray:
    out = total.astype(old.dtype)
    if (np.isfinite(old) & ~np.isfinite(out)).any():
        raise FileFormatError(
            f"{base.path}: the merged {name!r} has values that {base.dtype(name)} cannot hold: "
            "lower the strength, "
            "or merge into a base of a wider dtype"
        )
    return out


def _require_float(base: TensorFile, name: str) -> None:
    if base.dtype(name) not in FACTOR_DTYPES:
        raise DtypeError(
            f"{base.path}: {name!r} has dtype {base.dtype(name)}, and an adapter changes it; "
            "expected one of "
            f"{', '.join(FACTOR_DTYPES)}: merge into the checkpoint that this one was quantised "
            "from"
        )


def _metadata(
    base: TensorFile, adapters: Sequence[tuple[str | os.PathLike, float]]
) -> dict[str, str]:
    """The base's metadata, without hashes that are no longer true, and what was merged, appended to
    what was before.
    """
    before = base.metadata.get(NOTE, "[]")
    try:
        note = json.loads(before)
    except ValueError:
        note = before
    note = note if isinstance(note, list) else [note]
    note += [{"file": Path(path).name, "strength": strength} for path, strength in adapters]
    return {key: value for key, value in base.metadata.items() if key not in STALE} | {
        NOTE: json.dumps(note)
    }
