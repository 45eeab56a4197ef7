"""One module of an adapter file to an adapter: the algorithm that its keys say, its alpha, its
factors.

Refused: keys of an algorithm that is not built, of two algorithms, or that are left over; factors
that are no floats or not finite; an alpha that is not one finite number, unless the algorithm never
reads it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import numpy as np

from ..adapters import ALGORITHMS, BOFT, Adapter, Biased, DiagOFT, DoRA, DyLoRA, LoCon, SparseLoCon
from ..adapters.biased import BIAS
from ..adapters.biased import KEYS as BIASES
from ..adapters.dora import KEY as DORA
from ..adapters.dora import axis_of
from ..adapters.dylora import is_dylora
from ..adapters.oft import BLOCKS
from ..adapters.sparse import KEYS as SPARSE
from ..adapters.sparse import RESIDUAL, dense
from ..errors import DtypeError, FileFormatError, ShapeError
from ..layers import LayerShape
from .safetensors import TensorFile

PEFT_MAGNITUDE = "lora_magnitude_vector"
FACTOR_DTYPES = ("BF16", "F16", "F32", "F64")

_F32_MAX = float(np.finfo(np.float32).max)

# Keys that mean something that is not built: to merge the rest of their module would be silently
# wrong.
_UNBUILT = {
    "a Tucker core of GLoRA, which LyCORIS never writes": ("bm.weight",),
    "a trained scalar that was not folded into a factor": ("scalar",),
    "a LoRA of an embedding": ("lora_embedding_A", "lora_embedding_B"),
    "a tensor that replaces or reshapes the weight": ("set_weight", "reshape_weight"),
}


def algorithm_of(suffixes: set[str]) -> type[Adapter]:
    """The one algorithm these keys belong to. Raises FileFormatError, naming the others."""
    for what, keys in _UNBUILT.items():
        found = sorted(suffixes & set(keys))
        if found:
            raise FileFormatError(
                f"{', '.join(found)} is {what}, which is not supported: refusing to load the rest "
                "without it"
            )
    kinds = [kind for kind in ALGORITHMS.values() if suffixes & set(kind.marks)]
    if len(kinds) > 1:
        owned = "; ".join(
            f"{k.algorithm} ({', '.join(sorted(suffixes & set(k.marks)))})" for k in kinds
        )
        raise FileFormatError(f"has keys of several algorithms, expected one: {owned}")
    unknown = sorted(suffixes - {"alpha", DORA} - {key for kind in kinds for key in kind.keys})
    if unknown or not kinds:
        known = ", ".join(key for kind in ALGORITHMS.values() for key in kind.keys)
        what = f"unknown key {unknown[0]!r}" if unknown else "no factors beside alpha"
        raise FileFormatError(f"{what}, expected keys among {known}")
    if DORA in suffixes and not kinds[0].decomposable:
        able = ", ".join(kind.algorithm for kind in ALGORITHMS.values() if kind.decomposable)
        raise FileFormatError(f"{DORA} stands beside {kinds[0].algorithm}, expected one of {able}")
    return kinds[0]


def read_module(
    file: TensorFile,
    keys: Mapping[str, str],
    shape: LayerShape | None,
    dora: str | None = None,
    rule: str = "base",
    dialect: str | None = None,
    prefix: str = "lycoris_",
    options: Mapping[str, object] | None = None,
) -> tuple[Adapter, dict[str, np.ndarray]]:
    """The adapter and its factors in Flame layout, dtype as in the file.

    keys: suffix to key. shape: of the layer it sits on, or None to take it from the factors as far
    as they tell. dora: the axis of magnitudes whose shape allows both; by default what the metadata
    says. rule: what strength means, see `DoRA` and `Rotation`. dialect: of a rotation whose file
    allows several readings. prefix: of its keys. options: PEFT's configuration, if there is one.
    """
    bias = next((key for key in BIASES if key in keys), None)
    if bias is not None and "diff" not in keys and len(keys) > 1:
        # A change of the bias beside factors of the weight: `diff` has one of its own.
        rest = {suffix: key for suffix, key in keys.items() if suffix != bias}
        on, params = read_module(file, rest, shape, dora, rule, dialect, prefix)
        if not on.decomposable and not isinstance(on, (DoRA, SparseLoCon)):
            raise FileFormatError(f"{bias} stands beside {on.algorithm}, which it does not change")
        adapter = Biased.over(on, BIASES[bias])
        tensor = read_factor(file, keys[bias], bias)
        return adapter, {**params, BIAS: adapter.factors()[BIAS].read(tensor, adapter.shape)}
    if set(keys) & set(SPARSE):
        return _sparse(file, keys, read_module(file, _without(keys, SPARSE), shape))
    kind = algorithm_of(set(keys))
    tensors = {
        suffix: _number(file, key, suffix)
        if suffix in kind.flags
        else read_factor(file, key, suffix)
        for suffix, key in keys.items()
        if suffix != "alpha"
    }
    args = _arguments(file.metadata)
    kind = _refined(kind, tensors, str(args.get("algo", "")).split("+"))
    alpha = _alpha(file, keys["alpha"]) if "alpha" in keys else None
    if shape is not None and not kind.takes(shape):
        raise ShapeError(f"{kind.algorithm} does not sit on {shape}")
    given = {
        "dialect": dialect,
        "rule": rule,
        "prefix": prefix,
        "options": args if options is None else options,
        "maker": file.metadata.get("ss_network_module", ""),
    }
    shape = kind.guess_shape(tensors) if shape is None else shape
    adapter = kind.read(shape, tensors, alpha, **{name: given[name] for name in kind.told})
    if DORA in tensors:
        # PEFT's magnitudes are per output, whatever their shape could mean.
        peft = keys[DORA].endswith(PEFT_MAGNITUDE)
        axis = "output" if peft else dora or _told_axis(args)
        axis = axis_of(tensors[DORA].shape, adapter.shape, axis)
        adapter = DoRA.over(adapter, axis, rule)
    used = {factor.key for factor in adapter.factors().values()} | set(kind.flags)
    if used != set(tensors):
        odd, what = (
            (set(tensors) - used, "has no place")
            if set(tensors) - used
            else (used - set(tensors), "is missing")
        )
        raise FileFormatError(
            f"{', '.join(sorted(odd))} {what} beside {', '.join(sorted(set(tensors) - odd))}"
        )
    params = adapter.load(tensors)
    if alpha is not None and not math.isfinite(alpha) and not adapter.ignores_alpha:
        raise FileFormatError(f"alpha is {alpha}, expected a finite number")
    return checked_scale(adapter), params


def _sparse(file: TensorFile, keys: Mapping[str, str], on) -> tuple[Adapter, dict[str, np.ndarray]]:
    """A LoCon with the residual that extraction leaves beside it."""
    adapter, params = on
    missing = [key for key in SPARSE if key not in keys]
    if missing or type(adapter) is not LoCon:
        what = f"{missing[0]} is missing beside" if missing else "stands beside"
        raise FileFormatError(f"a sparse residual {what} {adapter.title}, expected locon")
    tensors = {
        "bias_values": read_factor(file, keys["bias_values"], "bias_values"),
        "bias_indices": file[keys["bias_indices"]],
    }
    return SparseLoCon.over(adapter), {**params, RESIDUAL: dense(tensors, adapter.shape)}


def _without(keys: Mapping[str, str], those: tuple[str, ...]) -> dict[str, str]:
    return {suffix: key for suffix, key in keys.items() if suffix not in those}


def checked_scale(adapter: Adapter) -> Adapter:
    """The adapter, if f32 holds its scale; FileFormatError otherwise."""
    if not abs(adapter.reported_scale) <= _F32_MAX:
        raise FileFormatError(
            f"alpha / rank = {adapter.alpha:g} / {adapter.rank} is more than f32 holds"
        )
    return adapter


def _refined(
    kind: type[Adapter], tensors: Mapping[str, np.ndarray], trained: list[str]
) -> type[Adapter]:
    """The algorithm, of those that share its keys. trained: what the metadata names."""
    if kind is DiagOFT and BLOCKS in tensors and tensors[BLOCKS].ndim == 4:
        return BOFT
    plain = kind is LoCon and set(tensors) == set(DyLoRA.keys)
    # Either reading computes the same; only a DyLoRA can be trained on at random ranks.
    return DyLoRA if plain and (is_dylora(tensors) or trained == [DyLoRA.algorithm]) else kind


def _arguments(metadata: Mapping[str, str]) -> dict[str, object]:
    """The trainer's arguments, empty if there are none that can be read."""
    try:
        args = json.loads(metadata.get("ss_network_args", "{}"))
    except ValueError:
        return {}
    return args if isinstance(args, dict) else {}


def _told_axis(args: Mapping[str, object]) -> str | None:
    """The axis of magnitudes that the trainer's arguments name, None if they do not."""
    value = str(args.get("wd_on_output")).lower()
    return {"true": "output", "false": "input"}.get(value)


def read_factor(file: TensorFile, key: str, suffix: str) -> np.ndarray:
    """One tensor of a file. Raises DtypeError or FileFormatError unless it holds finite floats."""
    if file.dtype(key) not in FACTOR_DTYPES:
        raise DtypeError(
            f"{suffix} has dtype {file.dtype(key)}, expected one of {', '.join(FACTOR_DTYPES)}: "
            "read it, cast it with .astype(numpy.float32), undo any scale it was stored with, and "
            "save it again"
        )
    tensor = file[key]
    bad = tensor.size - int(np.isfinite(tensor).sum())
    if bad:
        raise FileFormatError(
            f"{suffix} has {bad} values of {tensor.size} that are NaN or infinite"
        )
    return tensor


def _alpha(file: TensorFile, key: str) -> float:
    return float(_number(file, key, "alpha").reshape(()).astype(np.float64))


def _number(file: TensorFile, key: str, suffix: str) -> np.ndarray:
    tensor = file[key]
    if tensor.size != 1:
        raise ShapeError(f"{suffix} has shape {tensor.shape}, expected one number")
    if tensor.dtype.kind in "bc":
        raise DtypeError(f"{suffix} has dtype {file.dtype(key)}, expected a float or an integer")
    return tensor


def told(adapter: Adapter) -> str:
    """What `Adapter.guess_shape` could tell of the layer: flat columns may hold a kernel, and a
    side of 0 is unknown.
    """
    if not adapter.shape.inputs:
        return f"{adapter.shape.outputs} outputs"
    if not adapter.shape.outputs:
        return f"{adapter.shape.inputs} inputs"
    flat = any(factor.flat and factor.spatial for factor in adapter.factors().values())
    if flat and not adapter.shape.window.axes:
        return f"{adapter.shape.inputs} (taps included) -> {adapter.shape.outputs}"
    return str(adapter.shape)
