"""Adapters out of two checkpoints: what one was trained away from the other, layer by layer.

One layer is in memory at a time, beside the factors that were found. Changed norms become Norm
adapters. What has no place in an adapter file (biases beside low-rank factors, tensors that only
one of the two has) is listed with its size, never dropped in silence.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from ..adapters import Adapter, Biased, Full, Norm
from ..adapters.biased import BIAS
from ..arrays import Array, device_context, f32, f64, resolve_device, to_device
from ..errors import FileFormatError, MatchError
from ..extraction import Form, extract, relative_error
from ..layers import LayerShape
from ..norms import NormShape
from .adapter_file import cast_checked
from .atomic import require_other, require_place
from .change_report import ChangeReport, LayerChange
from .checkpoint import Checkpoint, open_checkpoint
from .merge import layer_shapes
from .names import container_of, part_of, tensors_of
from .placing import Params
from .rounding import MERGED_DTYPES, widened
from .safetensors import NUMPY, write
from .target import Name, dialect_named, module_names, spelled

NOTE = "lycoris_cupy.extracted"
_F16 = np.dtype(np.float16)


def extract_files(
    base_path: str | os.PathLike,
    tuned_path: str | os.PathLike,
    out_path: str | os.PathLike,
    form: Form,
    *,
    to: str = "lycoris",
    part: str | None = None,
    exclude: tuple[str, ...] = (),
    tolerance: float = 0.0,
    dtype: np.dtype = _F16,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> ChangeReport:
    """Write the adapter that leads from base to tuned, both as `open_checkpoint` takes them.

    to, part: the dialect of the names, and the part of a model for layers that do not tell theirs.
    exclude: patterns of layers to leave out. tolerance: layers whose change is at most this share
    of the weight count as equal. dtype: of the factors; the errors are of what is written.

    Raises MatchError if the two share no layer or none differs, FileFormatError for a dialect that
    cannot say it, for a value that is not finite, and for an out_path that base or tuned is read
    from.
    """
    device, dialect = resolve_device(device), dialect_named(to)
    if dialect.alpha != "tensor":
        raise FileFormatError(f"{dialect.name} has no alpha: extract first, and convert the result")
    require_place(out_path)
    with open_checkpoint(base_path) as base, open_checkpoint(tuned_path) as tuned:
        require_other(out_path, base.paths + tuned.paths)
        shapes, left_out = _common(base, tuned, exclude)
        found: dict[str, tuple[Adapter, Params]] = {}
        layers = []
        for i, (layer, shape) in enumerate(shapes.items()):
            if isinstance(shape, NormShape):
                made = _norm(base, tuned, layer, shape, tolerance, dtype)
            else:
                made = _layer(base, tuned, layer, shape, form, tolerance, dtype, device)
            made = _with_bias(base, tuned, layer, shape, made, dtype)
            if made is not None:
                found[layer] = made[0]
                layers.append(made[1])
            if progress is not None:
                progress(i + 1, len(shapes))
        if not found:
            raise MatchError(
                f"{tuned_path}: none of its {len(shapes)} layers differs from those of {base_path}"
            )
        left_out += _rest(base, tuned, shapes, exclude)
    names = module_names(dialect, {layer: _name(layer, part) for layer in found})
    tensors = {}
    for layer, (adapter, params) in found.items():
        saved = spelled(dialect, part_of(layer) or part, adapter.save(params))
        tensors |= {f"{names[layer]}.{word}": value for word, value in saved.items()}
        if adapter.saved_alpha is not None:
            tensors[f"{names[layer]}.alpha"] = np.array(adapter.saved_alpha, f32)
    write(out_path, tensors, _metadata(base_path, tuned_path, form, found))
    return ChangeReport(str(out_path), tuple(layers), tuple(left_out))


def _common(base: Checkpoint, tuned: Checkpoint, exclude) -> tuple[dict[str, LayerShape], list]:
    """The layers of both, and why others are not among them."""
    shapes, left_out = {}, []
    for layer, shape in layer_shapes(base).items():
        weight, _ = tensors_of(layer)
        if any(fnmatchcase(layer, pattern) for pattern in exclude):
            continue
        if weight not in tuned:
            left_out.append((weight, "only in the base"))
        elif tuned.shape(weight) != base.shape(weight):
            here, there = base.shape(weight), tuned.shape(weight)
            left_out.append((weight, f"has shape {there}, in the base {here}"))
        elif not {base.dtype(weight), tuned.dtype(weight)} <= set(MERGED_DTYPES):
            if _differs(base, tuned, weight):
                left_out.append((weight, f"differs, and is {base.dtype(weight)}, not a float"))
        else:
            shapes[layer] = shape
    left_out += [(name, "only in the tuned one") for name in tuned if name not in base]
    if not shapes:
        raise MatchError(
            f"{tuned.path}: shares no layer with {base.path}, by name and shape: are both in the "
            "names of the same program?"
        )
    return shapes, left_out


def _change(
    base: Checkpoint, tuned: Checkpoint, name: str, shape: LayerShape, tolerance: float, device: str
) -> Array | None:
    """tuned - base as (taps, IN, OUT), f64 on the CPU, f32 on a GPU; None where they are equal."""
    if base.dtype(name) == tuned.dtype(name) and not _differs(base, tuned, name):
        return None
    kept = f64 if device == "cpu" else f32
    before = widened(base[name]).astype(kept)
    change = widened(tuned[name]).astype(kept) - before
    size = float(np.linalg.norm(change.reshape(-1)))
    if not np.isfinite(size):
        raise FileFormatError(f"{name!r} differs by values that are NaN or infinite")
    if size <= tolerance * float(np.linalg.norm(before.reshape(-1))):
        return None
    flat = change.reshape(shape.outputs, shape.inputs, shape.taps)
    return to_device(to_device(flat, device).transpose(2, 1, 0), device)


def _layer(
    base, tuned, layer: str, shape: LayerShape, form: Form, tolerance: float, dtype, device: str
) -> tuple[tuple[Adapter, Params], LayerChange] | None:
    """((adapter, factors), report) of a layer; None where it is equal."""
    with device_context(device):
        change = _change(base, tuned, tensors_of(layer)[0], shape, tolerance, device)
        if change is None:
            return None
        adapter, wide = extract(shape, change, form)
        params = {n: cast_checked(v, f"{layer}: {n}", dtype) for n, v in wide.items()}
        size = float((change**2).sum()) ** 0.5
        error = relative_error(change, adapter, params)
    what = f"{adapter.algorithm} rank {adapter.rank}" if adapter.has_rank else adapter.algorithm
    if getattr(adapter, "tucker", False):
        what += " tucker"
    numbers = sum(value.size for value in params.values())
    return (adapter, params), LayerChange(layer, str(shape), what, error, numbers, size)


def _norm(
    base, tuned, layer: str, shape: NormShape, tolerance: float, dtype
) -> tuple[tuple[Adapter, Params], LayerChange] | None:
    """The same of a norm: the changes of its weight and bias themselves."""
    wide = {
        key: change.reshape(-1)
        for key, name in (("w_norm", f"{layer}.weight"), ("b_norm", f"{layer}.bias"))
        if name in base and name in tuned and base.shape(name) == tuned.shape(name)
        if (change := _change(base, tuned, name, shape, tolerance, "cpu")) is not None
    }
    if not wide:
        return None
    adapter = Norm(shape, weight="w_norm" in wide, bias="b_norm" in wide)
    params = {n: cast_checked(v, f"{layer}: {n}", dtype) for n, v in wide.items()}
    size, lost = (
        float(np.linalg.norm(np.concatenate([f(n) for n in wide])))
        for f in (lambda n: wide[n], lambda n: wide[n] - params[n].astype(f64))
    )
    numbers = sum(value.size for value in params.values())
    return (adapter, params), LayerChange(layer, str(shape), "norm", lost / size, numbers, size)


def _with_bias(
    base: Checkpoint, tuned: Checkpoint, layer: str, shape: LayerShape, made, dtype
) -> tuple[tuple[Adapter, Params], LayerChange] | None:
    """What was made of a layer, with the change of its bias beside it."""
    name = tensors_of(layer)[1]
    if isinstance(shape, NormShape) or name not in base or name not in tuned:
        return made
    change = _change(base, tuned, name, NormShape.of_channels(shape.outputs), 0.0, "cpu")
    if change is None:
        return made
    bias = cast_checked(change.reshape(-1), name, dtype)
    if made is None:  # the weight is as it was
        zero = np.zeros(shape.flame(shape.inputs, shape.outputs, True), dtype)
        made = (Full(shape), {"diff": zero}), LayerChange(layer, str(shape), "full", 0.0, 0, 0.0)
    (adapter, params), report = made
    if isinstance(adapter, Full):
        adapter, params = replace(adapter, bias=True), {**params, "diff_b": bias}
    else:
        adapter, params = Biased.over(adapter), {**params, BIAS: bias}
    report = replace(report, numbers=report.numbers + bias.size, notes=("with its bias",))
    return (adapter, params), report


def _rest(base: Checkpoint, tuned: Checkpoint, shapes, exclude) -> list[tuple[str, str]]:
    """Changed tensors that are of no layer: embeddings of other names, buffers."""
    seen = {name for layer in shapes for name in tensors_of(layer)}
    weights = {tensors_of(layer)[0] for layer in layer_shapes(base)}
    return [
        _unplaced(base, tuned, name)
        for name in base
        if name not in seen | weights
        and name in tuned
        and not any(fnmatchcase(name.rpartition(".")[0], pattern) for pattern in exclude)
        and _differs(base, tuned, name)
    ]


def _differs(base: Checkpoint, tuned: Checkpoint, name: str) -> bool:
    """Whether a tensor holds other numbers; other bytes, where it is no float."""
    if base.shape(name) != tuned.shape(name):
        return True
    if base.dtype(name) == tuned.dtype(name) or base.dtype(name) not in NUMPY:
        return not np.array_equal(base.stored(name).read(), tuned.stored(name).read())
    return not np.array_equal(widened(base[name]), widened(tuned[name]))


def _unplaced(base: Checkpoint, tuned: Checkpoint, name: str) -> tuple[str, str]:
    why = "differs, and has no place beside low-rank factors"
    floats = {base.dtype(name), tuned.dtype(name)} <= set(MERGED_DTYPES)
    if floats and base.shape(name) == tuned.shape(name):
        before = widened(base[name]).astype(f64).reshape(-1)
        whole = float(np.linalg.norm(before))
        change = float(np.linalg.norm(widened(tuned[name]).astype(f64).reshape(-1) - before))
        why += f" (by {change / whole:.2g} of its norm)" if whole else f" (by {change:.2g})"
    return name, why


def _name(layer: str, part: str | None) -> Name:
    container = container_of(layer) if part_of(layer) else ""
    return Name(part_of(layer) or part, layer[len(container) :], True)


def _metadata(base_path, tuned_path, form: Form, found) -> dict[str, str]:
    kinds = sorted({adapter.algorithm for adapter, _ in found.values()})
    note = {"base": Path(base_path).name, "tuned": Path(tuned_path).name, "form": form.kind}
    return {
        "ss_network_module": "lycoris.kohya",
        "ss_network_args": json.dumps({"algo": "+".join(kinds)}),
        NOTE: json.dumps(note),
    }
