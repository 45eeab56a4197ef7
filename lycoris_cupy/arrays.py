"""Arrays are plain ndarrays of NumPy or CuPy in bf16, f32 or f64; this file is the door between
dtypes and devices.

NumPy's bf16 (ml_dtypes) must not be computed with: a sum of 4096 ones is 256, einsum raises and `a
* 2.0` is f32. So every CPU implementation reads through `wide` and writes through `like`.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any

import ml_dtypes
import numpy as np

from .errors import DeviceError, DtypeError, ShapeError

bf16 = np.dtype(ml_dtypes.bfloat16)
f32 = np.dtype(np.float32)
f64 = np.dtype(np.float64)
DTYPES = {"bf16": bf16, "f32": f32, "f64": f64}
Array = Any  # numpy.ndarray or cupy.ndarray; CuPy may be absent


def dtype_name(dtype) -> str:
    """'bf16', 'f32' or 'f64', the suffix of kernel names; DtypeError for anything else."""
    for name, known in DTYPES.items():
        if dtype == known:
            return name
    raise DtypeError(f"dtype {np.dtype(dtype)} is not one of bf16, f32, f64; cast it first")


def dtype_of(dtype) -> np.dtype:
    """A dtype given as 'bf16', 'f32', 'f64' or as itself; DtypeError for any other."""
    known = DTYPES.get(dtype) if isinstance(dtype, str) else np.dtype(dtype)
    if known is None or known not in DTYPES.values():
        raise DtypeError(f"dtype {dtype!r} is not offered: use bf16, f32 or f64")
    return known


def on_gpu(array: Array) -> bool:
    """True for a CuPy array. The one question every dispatch asks."""
    return not isinstance(array, np.ndarray) and hasattr(type(array), "__cuda_array_interface__")


def module_of(array: Array):
    """The module whose functions take this array: numpy or cupy."""
    return sys.modules["cupy"] if on_gpu(array) else np


def wide_dtype(dtype) -> np.dtype:
    """The dtype that sums are kept in: f32 for bf16 and f32, f64 for f64."""
    return f64 if dtype == f64 else f32


def wide(array: np.ndarray) -> np.ndarray:
    """The same values in the dtype sums are kept in; no copy when they are in it already. CPU."""
    return array.astype(wide_dtype(array.dtype), copy=False)


def like(value: np.ndarray, array: np.ndarray) -> np.ndarray:
    """value rounded once to the dtype of array (nearest, ties to even). CPU."""
    return value.astype(array.dtype, copy=False)


def is_index(array: Array) -> bool:
    """True for whole numbers and booleans, which are not differentiated: tokens, classes, masks."""
    return np.dtype(array.dtype).kind in "iub"


def require_float(array: Array, name: str) -> None:
    """Raise DtypeError, saying how to cast, unless array is bf16, f32 or f64."""
    if array.dtype not in (bf16, f32, f64):
        raise DtypeError(
            f"{name} has dtype {array.dtype}, expected bf16, f32 or f64: cast it first, for "
            "example "
            f"{name}.astype(lycoris_cupy.bf16)"
        )


def require_same(name: str, array: Array, other_name: str, other: Array) -> None:
    """Raise unless both arrays have one dtype and lie on one kind of device."""
    if array.dtype != other.dtype:
        raise DtypeError(
            f"{name} is {array.dtype} but {other_name} is {other.dtype}: cast one of them"
        )
    if on_gpu(array) != on_gpu(other):
        where = {True: "on the GPU", False: "on the CPU"}
        raise DeviceError(
            f"{name} lies {where[on_gpu(array)]} but {other_name} {where[on_gpu(other)]}: "
            "move one with lycoris_cupy.to_device"
        )


def require_axes(array: Array, axes: int, name: str, meaning: str) -> None:
    """Raise ShapeError unless array has this many axes."""
    if array.ndim != axes:
        raise ShapeError(f"{name} has shape {tuple(array.shape)}, expected {axes} axes {meaning}")


def resolve_device(device: str = "auto") -> str:
    """'cpu' or 'cuda:<index>'. 'auto' takes the GPU if CuPy can use one; 'cuda' without one says
    exactly why not.
    """
    if device == "cpu":
        return "cpu"
    if (
        device != "auto"
        and device != "cuda"
        and not (device.startswith("cuda:") and device[5:].isdigit())
    ):
        raise DeviceError(
            f"device {device!r} is unknown: use 'auto', 'cpu', 'cuda' or 'cuda:<index>'"
        )
    reason = gpu_missing()
    if reason:
        if device == "auto":
            return "cpu"
        raise DeviceError(f"device {device!r} was asked for, but {reason}")
    import cupy

    count = cupy.cuda.runtime.getDeviceCount()
    index = int(device[5:]) if device.startswith("cuda:") else cupy.cuda.Device().id
    if index >= count:
        raise DeviceError(
            f"device {device!r} was asked for, but this machine has {count} GPU(s): cuda:0 to "
            f"cuda:{count - 1}"
        )
    return f"cuda:{index}"


def device_context(device: str):
    """A context in which new arrays go to 'cuda:<index>'; for 'cpu' it does nothing."""
    if device == "cpu":
        return nullcontext()
    import cupy

    return cupy.cuda.Device(int(device[5:]))


def gpu_missing() -> str:
    """Why no GPU can be used, as a clause for a sentence; empty when one can."""
    try:
        import cupy
    except ImportError as error:
        return (
            f"CuPy cannot be imported ({error}): install the extra cuda12 or cuda13 of lycoris_cupy"
        )
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # CuPy raises its own kinds for a missing driver, library or device
        text = str(error).strip().splitlines()
        why = text[0] if text else type(error).__name__
        return f"CuPy {cupy.__version__} finds no usable NVIDIA GPU ({why})"
    if count == 0:
        return f"CuPy {cupy.__version__} finds no NVIDIA GPU on this machine"
    capability = cupy.cuda.Device().compute_capability
    if int(capability) < 80:
        found = f"{capability[:-1]}.{capability[-1]}"
        return f"the GPU has compute capability {found}, and bf16 tensor cores need 8.0 or later"
    return ""


def to_device(array: Array, device: str) -> Array:
    """array on 'cpu' or 'cuda:<index>', C-contiguous; anything with __dlpack__ is taken. Copies
    only if it must.
    """
    if not isinstance(array, np.ndarray) and not on_gpu(array):
        array = _from_foreign(array)
    if device == "cpu":
        host: Array = array.get() if on_gpu(array) else array  # pyright: ignore
        return np.ascontiguousarray(host).reshape(host.shape)
    import cupy

    with device_context(device):
        return cupy.ascontiguousarray(cupy.asarray(array)).reshape(array.shape)


def _from_foreign(array):
    if not hasattr(array, "__dlpack__"):
        return np.asarray(array)
    if hasattr(array, "__dlpack_device__") and array.__dlpack_device__()[0] in (
        2,
        13,
    ):  # kDLCUDA, kDLCUDAManaged
        import cupy

        return cupy.from_dlpack(array)
    try:
        return np.from_dlpack(array)
    except (BufferError, RuntimeError, TypeError):  # NumPy's DLPack knows no bf16
        return _bf16_from_dlpack(array)


def _bf16_from_dlpack(array):
    # The producer's own view as 16-bit integers carries the bits; torch and jax both offer one.
    if not hasattr(array, "view"):
        raise DtypeError(
            f"{type(array).__name__} has a dtype that NumPy cannot take through DLPack: cast it to "
            "f32 first"
        )
    source = sys.modules.get(type(array).__module__.split(".")[0])
    bits = array.view(source.int16 if source is not None else np.int16)
    return np.from_dlpack(bits).view(bf16)
