"""Launches that may begin while the kernel before them still ends: programmatic dependent launch
(CUDA's programming guide, section of that name), on Hopper and later.

Such a kernel waits by itself, `await_previous` of cuda_src/after.cuh, before it reads or writes
memory; until then it sets up barriers and indices in the shadow of the last blocks before it.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import numpy as np

from .driver import driver
from .errors import KernelError

_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16)]


class _Config(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


_ALLOWED = _Attribute(_SERIALIZATION, 0, (1,))


def waits(source: str, op: str) -> bool:
    """Whether a kernel of a source waits by itself for the one before it."""
    body = source.split(f"NAME({op})", 1)[1].split('extern "C"', 1)[0]
    return "await_previous();" in body


@functools.cache
def possible(device: int) -> bool:
    """Whether a device launches so."""
    import cupy

    return int(cupy.cuda.Device(device).compute_capability) >= 90


def launch(function: int, grid: tuple, block: tuple, values: Sequence, shared: int, stream: int):
    """Launch a CUfunction on a stream. values: as CuPy takes them; arrays, None, scalars, structs.
    Raises KernelError with the driver's number."""
    held = [_bytes_of(value) for value in values]
    parameters = (ctypes.c_void_p * len(held))(*(v.ctypes.data for v in held))
    config = _Config(
        (*grid, 1, 1)[:3], (*block, 1, 1)[:3], shared, stream, ctypes.pointer(_ALLOWED), 1
    )
    status = driver().cuLaunchKernelEx(
        ctypes.byref(config), ctypes.c_void_p(function), parameters, None
    )
    if status:
        raise KernelError(f"the driver refuses a launch (error {status}): grid {grid}, {block}")


def _bytes_of(value) -> np.ndarray:
    """An argument as it lies in memory."""
    if value is None:
        return np.zeros(1, np.uint64)
    if hasattr(value, "data") and hasattr(value.data, "ptr"):
        return np.array([value.data.ptr], np.uint64)
    return np.atleast_1d(np.asarray(value))
