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
from contextlib import contextmanager, nullcontext

import ml_dtypes
import numpy as np

from ..adapters import Adapter
from ..arrays import Array, to_device
from ..errors import DtypeError, FileFormatError, LycorisError, MatchError, ShapeError
from ..layers import LayerShape
from .modules import FACTOR_DTYPES, read_module, told
from .names import PREFIXES, BaseNames, fold, foreign, split_key
from .report import LayerReport, LoadReport, Unmatched
from .safetensors import NUMPY, TensorFile, open_file, write

Loaded = dict[str, tuple[Adapter, dict[str, np.ndarray]]]
_LISTED = 20  # unmatched modules in an error; the report has all of them
# Hashes of the bytes of another file: false from the first change on.
STALE = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")


def read_adapter(
    source: str | os.PathLike | TensorFile,
    shapes: Mapping[str, LayerShape],
    *,
    strict: bool = True,
    dtype: np.dtype | None = None,
    dora: str | None = None,
    rule: str = "base",
) -> tuple[Loaded, LoadReport]:
    """{layer: (adapter, factors)} and a report, for the layers named by `shapes`.

    dtype: what the caller will round the factors to; only the report looks at it. dora: 'output' or
    'input', for magnitudes whose shape allows both. rule: what strength means, see `DoRA`. Raises
    FileFormatError, ShapeError or DtypeError for a module that is not understood, MatchError if no
    module finds its layer, if two find one, or, when strict, if any finds none.
    """
    with _opened(source) as file:
        modules, unmatched = _modules(file)
        names, out, owners, layers = BaseNames(shapes), {}, {}, []
        for module, keys in modules.items():
            with _about(str(file.path)):
                layer = names.resolve(module)
            if layer is None:
                unmatched.append(Unmatched(module, "no layer has this name", names.nearest(module)))
                continue
            if layer in owners:
                raise MatchError(
                    f"{file.path}: duplicate layer after name folding: modules {owners[layer]!r} "
                    f"and {module!r} "
                    f"both mean {layer!r}; remove one"
                )
            owners[layer] = module
            with _about(f"{file.path}: module {module!r} on layer {layer!r}"):
                adapter, params = read_module(file, keys, shapes[layer], dora, rule)
            out[layer] = adapter, params
            layers.append(_layer_report(file, keys, module, layer, adapter, params, dtype))
        report = LoadReport(str(file.path), tuple(layers), tuple(unmatched), len(shapes))
    if not layers or (strict and unmatched):
        raise MatchError(_mismatch(report, strict))
    return out, report


def inspect_adapter(source: str | os.PathLike | TensorFile) -> LoadReport:
    """What a file holds, with no base: sizes are taken from the factors, and what is not understood
    is listed.
    """
    with _opened(source) as file:
        modules, unmatched = _modules(file)
        layers = []
        for module, keys in modules.items():
            try:
                adapter, params = read_module(file, keys, None)
            except LycorisError as error:
                unmatched.append(Unmatched(module, str(error)))
            else:
                layers.append(_layer_report(file, keys, module, None, adapter, params, None))
        return LoadReport(str(file.path), tuple(layers), tuple(unmatched))


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
    if prefix not in PREFIXES:
        raise MatchError(
            f"prefix {prefix!r} is none that a reader knows, expected one of {', '.join(PREFIXES)}"
        )
    if not adapters:
        raise MatchError("there is no adapter to write")
    tensors, layer_of = {}, {}
    for layer, (adapter, params) in adapters.items():
        module = prefix + fold(layer)
        if module in layer_of:
            raise MatchError(
                f"layers {layer_of[module]!r} and {layer!r} would both be saved as {module!r}: "
                "rename one"
            )
        layer_of[module] = layer
        with _about(f"layer {layer!r}"):
            wide = {factor.key for factor in adapter.factors().values() if factor.wide}
            for key, tensor in adapter.save(_checked(adapter, params)).items():
                tensors[f"{module}.{key}"] = _cast(tensor, key, None if key in wide else dtype)
            alpha = adapter.saved_alpha
            if alpha is not None:
                tensors[f"{module}.alpha"] = _cast(
                    np.asarray(alpha, np.float64), "alpha", np.dtype(np.float32)
                )
    kinds = sorted({adapter.algorithm for adapter, _ in adapters.values()})
    args: dict[str, object] = {"algo": "+".join(kinds)}
    told = [item for adapter, _ in adapters.values() for item in adapter.network_args.items()]
    # What the layers do not agree on is left out: a reader would take it for all of them.
    args |= {key: value for key, value in told if all(v == value for k, v in told if k == key)}
    about = {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps(args)}
    about |= {key: value for key, value in (metadata or {}).items() if key not in STALE}
    write(path, tensors, about)


def _modules(file: TensorFile) -> tuple[dict[str, dict[str, str]], list[Unmatched]]:
    """{module: {suffix: key}}, and the keys that belong to none."""
    modules: dict[str, dict[str, str]] = {}
    unmatched = []
    for key in sorted(file):
        parts = split_key(key)
        if parts is None:
            unmatched.append(Unmatched(key, foreign(key)))
        else:
            modules.setdefault(parts[0], {})[parts[1]] = key
    return modules, unmatched


def _layer_report(file, keys, module, layer, adapter: Adapter, params, dtype) -> LayerReport:
    stored = sorted({file.dtype(key) for suffix, key in keys.items() if suffix != "alpha"})
    return LayerReport(
        module=module,
        layer=layer,
        shape=str(adapter.shape) if layer is not None else told(adapter),
        algorithm=adapter.title,
        rank=adapter.rank if adapter.has_rank else None,
        alpha=adapter.alpha,
        scale=adapter.reported_scale,
        scale_from=adapter.scale_reason,
        dtype=", ".join(stored),
        rounded=dtype is not None and any(_rounds(NUMPY[name], dtype) for name in stored),
        parameters=sum(array.size for array in params.values()),
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


def _cast(tensor: np.ndarray, key: str, dtype: np.dtype | None) -> np.ndarray:
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
def _opened(source: str | os.PathLike | TensorFile) -> Iterator[TensorFile]:
    with nullcontext(source) if isinstance(source, TensorFile) else open_file(source) as file:
        yield file


@contextmanager
def _about(what: str) -> Iterator[None]:
    """Errors raised inside, with the thing they are about in front."""
    try:
        yield
    except (FileFormatError, ShapeError, DtypeError, MatchError) as error:
        raise type(error)(f"{what}: {error}") from None
