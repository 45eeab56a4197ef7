"""One module of an adapter file to an adapter: the algorithm that its keys say, its alpha, its
factors.

Refused: keys of an algorithm that is not built, of two algorithms, or that are left over; factors
that are no floats or not finite; an alpha that is not one finite number, unless the algorithm never
reads it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ..adapters import ALGORITHMS, Adapter
from ..errors import DtypeError, FileFormatError, ShapeError
from ..layers import LayerShape
from .safetensors import TensorFile

FACTOR_DTYPES = ("BF16", "F16", "F32", "F64")

_F32_MAX = float(np.finfo(np.float32).max)

# Keys that mean something that is not built: to merge the rest of their module would be silently
# wrong.
_UNBUILT = {
    "DoRA (a magnitude beside the factors)": ("dora_scale", "lora_magnitude_vector"),
    "diag-OFT or BOFT": ("oft_blocks", "rescale", "oft_R.weight", "boft_R", "boft_s"),
    "(IA)^3": ("on_input", "weight", "ia3_l"),
    "Norm": ("w_norm", "b_norm"),
    "GLoRA": ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight"),
    "T-LoRA": ("lambda_layer", "q_layer.weight", "p_layer.weight"),
    "a trained scalar that was not folded into a factor": ("scalar",),
    "a LoRA of an embedding": ("lora_embedding_A", "lora_embedding_B"),
    "a tensor that replaces or reshapes the weight": ("set_weight", "reshape_weight"),
    "a change of the bias beside factors": ("lora_B.bias", "lora_up.bias"),
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
    unknown = sorted(suffixes - {"alpha"} - {key for kind in kinds for key in kind.keys})
    if unknown or not kinds:
        known = ", ".join(key for kind in ALGORITHMS.values() for key in kind.keys)
        what = f"unknown key {unknown[0]!r}" if unknown else "no factors beside alpha"
        raise FileFormatError(f"{what}, expected keys among {known}")
    return kinds[0]


def read_module(
    file: TensorFile, keys: Mapping[str, str], shape: LayerShape | None
) -> tuple[Adapter, dict[str, np.ndarray]]:
    """The adapter and its factors in Flame layout, dtype as in the file.

    keys: suffix to key. shape: of the layer it sits on, or None to take it from the factors as far
    as they tell.
    """
    kind = algorithm_of(set(keys))
    tensors = {
        suffix: _factor(file, key, suffix) for suffix, key in keys.items() if suffix != "alpha"
    }
    alpha = _alpha(file, keys["alpha"]) if "alpha" in keys else None
    adapter = kind.read(kind.guess_shape(tensors) if shape is None else shape, tensors, alpha)
    used = {factor.key for factor in adapter.factors().values()}
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


def checked_scale(adapter: Adapter) -> Adapter:
    """The adapter, if f32 holds its scale; FileFormatError otherwise."""
    if not abs(adapter.scale) <= _F32_MAX:
        raise FileFormatError(
            f"alpha / rank = {adapter.alpha:g} / {adapter.rank} is more than f32 holds"
        )
    return adapter


def _factor(file: TensorFile, key: str, suffix: str) -> np.ndarray:
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
    tensor = file[key]
    if tensor.size != 1:
        raise ShapeError(f"alpha has shape {tensor.shape}, expected one number")
    if tensor.dtype.kind in "bc":
        raise DtypeError(f"alpha has dtype {file.dtype(key)}, expected a float or an integer")
    return float(tensor.reshape(()).astype(np.float64))


def told(adapter: Adapter) -> str:
    """What `Adapter.guess_shape` could tell of the layer: flat columns may hold a kernel."""
    flat = any(factor.flat and factor.spatial for factor in adapter.factors().values())
    if flat and not adapter.shape.window.axes:
        return f"{adapter.shape.inputs} (taps included) -> {adapter.shape.outputs}"
    return str(adapter.shape)
