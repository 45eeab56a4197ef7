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

from ..adapters import ALGORITHMS, Adapter, LoKr
from ..errors import DtypeError, FileFormatError, ShapeError
from ..layers import LayerShape
from ..ops.window import Window
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
    "PEFT's names for the factors": (
        "lora_A.weight",
        "lora_B.weight",
        "lora_A",
        "lora_B",
        "lora_embedding_A",
    ),
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
    adapter = kind.read(guess_shape(tensors) if shape is None else shape, tensors, alpha)
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
    if alpha is not None and not math.isfinite(alpha) and not _full_lokr(adapter):
        raise FileFormatError(f"alpha is {alpha}, expected a finite number")
    if not abs(adapter.scale) <= _F32_MAX:
        raise FileFormatError(f"alpha / rank = {alpha:g} / {adapter.rank} is more than f32 holds")
    return adapter, params


def scale_from(adapter: Adapter) -> str:
    """Where an adapter's scale comes from, in words."""
    if adapter.saved_alpha is None:
        return f"{adapter.algorithm} has no alpha: scale 1"
    if _full_lokr(adapter):
        return "both sides full: scale 1 whatever alpha says"
    if adapter.rank == 0:
        return "rank 0: scale 0"
    if adapter.alpha is None:
        return "no alpha in the file: scale 1"
    if adapter.alpha == 0:
        return "alpha 0 is read as rank: scale 1"
    return f"alpha / rank = {adapter.alpha:g} / {adapter.rank}"


def has_rank(adapter: Adapter) -> bool:
    """False for Full, and for a LoKr without a factored side."""
    return adapter.saved_alpha is not None and not _full_lokr(adapter)


def _full_lokr(adapter: Adapter) -> bool:
    return isinstance(adapter, LoKr) and adapter.w1_rank is None and adapter.w2_rank is None


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


def guess_shape(tensors: Mapping[str, np.ndarray]) -> LayerShape:
    """The layer that factors belong to, as far as they tell: flat columns stay flat, groups are
    unknown.

    What is missing or misshapen counts as 1 here, for `Adapter.read` to refuse by name.
    """

    def extents(key: str) -> tuple[int, int]:
        columns, rows, *_ = (*tensors[key].shape, 1, 1) if key in tensors else (1, 1)
        return columns, rows

    def kernel(*keys: str) -> tuple[int, ...]:
        return next((tensors[key].shape[2:] for key in keys if key in tensors), ())

    if "diff" in tensors:
        columns, rows = extents("diff")
        return LayerShape(Window.of(kernel("diff")), rows, columns)
    if "lora_up.weight" in tensors or "lora_down.weight" in tensors:
        space = kernel("lora_mid.weight", "lora_down.weight")
        return LayerShape(
            Window.of(space), extents("lora_down.weight")[1], extents("lora_up.weight")[0]
        )
    if "hada_w1_a" in tensors:
        columns = extents("hada_w1_a")["hada_t1" in tensors]
        return LayerShape(Window.of(kernel("hada_t1")), extents("hada_w1_b")[1], columns)
    w1 = "lokr_w1" if "lokr_w1" in tensors else "lokr_w1_a"
    blocks = extents("lokr_w1" if "lokr_w1" in tensors else "lokr_w1_b")[1]
    if "lokr_w2" in tensors:
        columns, width = extents("lokr_w2")
    else:
        columns, width = extents("lokr_w2_a")["lokr_t2" in tensors], extents("lokr_w2_b")[1]
    space = kernel("lokr_w2", "lokr_t2", "lokr_w2_b")
    return LayerShape(Window.of(space), blocks * width, extents(w1)[0] * columns)


def told(adapter: Adapter) -> str:
    """What `guess_shape` could tell of the layer: flat columns of a file may hold a kernel."""
    flat = any(factor.flat and factor.spatial for factor in adapter.factors().values())
    if flat and not adapter.shape.window.axes:
        return f"{adapter.shape.inputs} (taps included) -> {adapter.shape.outputs}"
    return str(adapter.shape)
