"""Adapter files: `read_adapter` onto the layers of a base, `inspect_adapter` without one, and
`write_adapter`.

On disk: `<prefix><layer, dots made underscores>.<key>`, factors in torch's order, alpha as one f32.
In memory: an adapter and its factors in Flame layout, in the dtype of the file. Whatever a module
holds must be understood, strict or not; strict also asks that every module finds its layer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import ml_dtypes
import numpy as np

from ..adapters import Adapter, Rows
from ..arrays import Array, to_device, wide_dtype
from ..errors import DtypeError, FileFormatError, LycorisError, MatchError, ShapeError
from ..layers import LayerShape
from .keys import FOLDED_PREFIXES, OWNED
from .modules import FACTOR_DTYPES, told
from .names import HOMES, BaseNames, fold, part_of
from .placing import Loaded, Placed, gather, place, survey, told_rows
from .report import LayerReport, LoadReport, Unmatched
from .safetensors import NUMPY, TensorFile, size_of, write
from .source import Source, open_source

_LISTED = 20  # unmatched modules in an error; the report has all of them
# Hashes of the bytes of another file: false from the first change on.
STALE = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")


def read_adapter(
    source: str | os.PathLike | TensorFile,
    shapes: Mapping[str, LayerShape],
    *,
    strict: bool = True,
    dtype: np.dtype | None = None,
    alpha_from: str | None = None,
    rows: Mapping[str, tuple[str, int, int]] | None = None,
    dora: str | None = None,
    rule: str = "base",
    dialect: str | None = None,
    rank: int | None = None,
) -> tuple[Loaded, LoadReport]:
    """{layer: (adapter, factors)} and a report, for the layers named by `shapes`.

    source: a file of any dialect, or PEFT's folder. dtype: what the caller will round the factors
    to; only the report looks at it. alpha_from: 'tensor', 'metadata', 'configuration' or 'rank',
    the one source of alpha to believe; None takes the first that is there. dora: 'output' or
    'input', for magnitudes whose shape allows both. rule: what strength means, see `DoRA` and
    `Rotation`. dialect: of rotations whose file allows several readings, see `Rotation`. rank: cut
    every module to this rank; LoCon and DyLoRA only. rows: for
    layers that the base keeps fused and no table knows, name in the file -> (layer, first output,
    end).

    Raises FileFormatError, ShapeError or DtypeError for a module that is not understood or whose
    alpha is told in two ways, MatchError if no module finds its layer, if one could mean several,
    if two find one, or, when strict, if any finds none.
    """
    with open_source(source, alpha_from, dora, rule, dialect) as opened:
        names, placed, unmatched = BaseNames(shapes, rows), [], list(opened.unread)
        with about(opened.path):
            for module in opened.modules:
                found = place(opened, module, names, shapes)
                if not found:
                    nearest = names.nearest(module.key)
                    unmatched.append(Unmatched(module.name, "no layer has this name", nearest))
                placed += found
            if rank is not None:
                placed = [one.truncated(rank) for one in placed]
            out = gather(placed, shapes)
        layers = [layer_report(opened, one, dtype) for one in placed]
        report = LoadReport(
            opened.path, tuple(layers), tuple(unmatched), len(shapes), spoken(opened)
        )
    if not layers or (strict and unmatched):
        raise MatchError(_mismatch(report, strict))
    return out, report


def inspect_adapter(
    source: str | os.PathLike | TensorFile,
    *,
    alpha_from: str | None = None,
    dialect: str | None = None,
) -> LoadReport:
    """What a file holds, with no base: sizes are taken from the factors, and what is not understood
    is listed.
    """
    with open_source(source, alpha_from, dialect=dialect) as opened:
        placed, unmatched = survey(opened)
        layers = tuple(layer_report(opened, one, None) for one in placed)
        return LoadReport(opened.path, layers, tuple(unmatched), dialects=spoken(opened))


def write_adapter(
    path: str | os.PathLike,
    adapters: Mapping[str, tuple[Adapter, Mapping[str, Array]]],
    *,
    prefix: str = "lycoris_",
    dtype: np.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """A LyCORIS file of {layer: (adapter, factors in Flame layout)}; `read_adapter` gives the same
    back, bit for bit.

    dtype: of the factors in the file; None keeps theirs, and wide ones keep it always. metadata:
    added to what is known for certain; hashes of another file's bytes are left out. Raises
    MatchError for layers that would share a key, ShapeError or DtypeError for factors that do not
    fit the adapter, FileFormatError for values that readers would refuse.
    """
    if prefix not in FOLDED_PREFIXES:
        known = ", ".join(FOLDED_PREFIXES)
        raise MatchError(f"prefix {prefix!r} is none that a reader knows, expected one of {known}")
    if not adapters:
        raise MatchError("there is no adapter to write")
    tensors, layer_of = {}, {}
    for layer, name, adapter, params in _apart(adapters):
        module = (adapter.prefix or prefix) + fold(name)
        if prefix in OWNED and adapter.prefix != prefix:
            raise MatchError(
                f"prefix {prefix!r} would be read as another dialect than {adapter.algorithm} of "
                f"layer {layer!r} has: use another prefix"
            )
        if module in layer_of:
            raise MatchError(
                f"layers {layer_of[module]!r} and {layer!r} would both be saved as {module!r}: "
                "rename one"
            )
        layer_of[module] = layer
        with about(f"layer {layer!r}"):
            wide = {factor.key for factor in adapter.factors().values() if factor.wide}
            for key, tensor in adapter.save(_checked(adapter, params)).items():
                number, kept = key in adapter.flags, None if key in wide else dtype
                tensors[f"{module}.{key}"] = tensor if number else cast_checked(tensor, key, kept)
            alpha = adapter.saved_alpha
            if alpha is not None:
                tensors[f"{module}.alpha"] = cast_checked(
                    np.asarray(alpha, np.float64), "alpha", np.dtype(np.float32)
                )
    notes = _notes([adapter for _, _, adapter, _ in _apart(adapters)])
    notes |= {key: value for key, value in (metadata or {}).items() if key not in STALE}
    write(path, tensors, notes)


def adapter_file_size(adapters: Mapping[str, Adapter], dtype: np.dtype) -> int:
    """The bytes of the file that `write_adapter` makes of {layer: adapter}, factors of this dtype,
    without metadata of the caller's.
    """

    def one(dtype, shape: tuple[int, ...]) -> np.ndarray:
        return np.broadcast_to(np.zeros((), dtype), shape)

    tensors = {}
    for layer, adapter in adapters.items():
        module = (adapter.prefix or "lycoris_") + fold(layer)
        for factor in adapter.factors().values():
            kept = wide_dtype(dtype) if factor.wide else dtype
            tensors[f"{module}.{factor.key}"] = one(kept, factor.in_file(adapter.shape))
        tensors |= {f"{module}.{key}": one(np.int64, ()) for key in adapter.flags}
        if adapter.saved_alpha is not None:
            tensors[f"{module}.alpha"] = one(np.float32, ())
    return size_of(tensors, _notes(list(adapters.values())))


def _notes(apart: list[Adapter]) -> dict[str, str]:
    """What a file's metadata says for certain. What the layers do not agree on is left out: a
    reader would take it for all of them.
    """
    args: dict[str, object] = {"algo": "+".join(sorted({adapter.algorithm for adapter in apart}))}
    told: dict[str, list[object]] = {}
    for adapter in apart:
        for key, value in adapter.network_args.items():
            told.setdefault(key, []).append(value)
    args |= {key: same[0] for key, same in told.items() if same.count(same[0]) == len(same)}
    return {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps(args)}


def _apart(adapters) -> Iterator[tuple[str, str, Adapter, Mapping[str, Array]]]:
    """(layer, path to save under, adapter, factors): rows of a layer under their own names."""
    for layer, (adapter, params) in adapters.items():
        if not isinstance(adapter, Rows):
            yield layer, layer, adapter, params
            continue
        part = part_of(layer)
        home = HOMES[part] if part is not None and part.startswith("te") else ""
        for one, own in zip(adapter.parts, adapter.split(params), strict=True):
            yield layer, home + one.name, one.adapter, own


def spoken(source: Source) -> tuple[str, ...]:
    """The names of a file's dialects."""
    return tuple(dialect.name for dialect in source.dialects)


def layer_report(source: Source, placed: Placed, dtype: np.dtype | None) -> LayerReport:
    """What a report says of a module. dtype: what its factors will be rounded to, if at all."""
    adapter, layer = placed.adapter, placed.share.layer or None
    keys = placed.module.keys.items()
    others = ("alpha", *adapter.flags)
    stored = sorted({source.file.dtype(key) for suffix, key in keys if suffix not in others})
    where = f", alpha from {placed.alpha_from}" if placed.alpha_from else ""
    return LayerReport(
        module=placed.module.name,
        layer=layer,
        shape=str(adapter.shape) if layer is not None else told(adapter),
        algorithm=adapter.title,
        rank=adapter.rank if adapter.has_rank else None,
        alpha=adapter.alpha,
        scale=adapter.reported_scale,
        scale_from=adapter.scale_reason + where,
        dtype=", ".join(stored),
        rounded=dtype is not None and any(_rounds(NUMPY[name], dtype) for name in stored),
        parameters=sum(array.size for array in placed.params.values()),
        rows=told_rows(placed.share),
    )


def _rounds(source: np.dtype, target: np.dtype) -> bool:
    """Whether some values of source have no place in target."""
    have, want = ml_dtypes.finfo(source), ml_dtypes.finfo(target)
    return have.nmant > want.nmant or have.maxexp > want.maxexp


def _mismatch(report: LoadReport, strict: bool) -> str:
    count = len(report.unmatched)
    text = f"{report.path}: {count} of {count + len(report.layers)} modules match no layer"
    if not report.layers:
        text = f"{report.path}: nothing in the file matches any of the {report.base_layers} layers"
    for entry in report.unmatched[:_LISTED]:
        text += f"\n  {entry}"
    if count > _LISTED:
        text += f"\n  and {count - _LISTED} more"
    return text + ("\nstrict=False loads the others" if strict and report.layers else "")


def _checked(adapter: Adapter, params: Mapping[str, Array]) -> dict[str, np.ndarray]:
    forms = {name: adapter.flame_shape(factor) for name, factor in adapter.factors().items()}
    if params.keys() != forms.keys():
        raise ShapeError(f"has the factors {', '.join(params)}, expected {', '.join(forms)}")
    for name, form in forms.items():
        if tuple(params[name].shape) != form:
            raise ShapeError(
                f"{name} has shape {tuple(params[name].shape)}, expected {form} on {adapter.shape}"
            )
    return {name: to_device(params[name], "cpu") for name in forms}


def cast_checked(tensor: np.ndarray, key: str, dtype: np.dtype | None) -> np.ndarray:
    dtype = np.dtype(tensor.dtype if dtype is None else dtype)
    if dtype not in [NUMPY[name] for name in FACTOR_DTYPES]:
        raise DtypeError(f"{key} would be saved as {dtype}, expected bf16, f16, f32 or f64")
    with np.errstate(over="ignore"):  # said below
        out = tensor.astype(dtype, copy=False)
    if not np.isfinite(out).all():
        reason = f"more than {dtype} holds" if np.isfinite(tensor).all() else "NaN or infinite"
        raise FileFormatError(f"{key} has values that are {reason}: readers would refuse the file")
    return out


@contextmanager
def about(what: str) -> Iterator[None]:
    """Errors raised inside, with the thing they are about in front."""
    try:
        yield
    except LycorisError as error:
        raise type(error)(f"{what}: {error}") from None
