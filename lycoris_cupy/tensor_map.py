"""Tensor maps: what Hopper's copy engine is told of an array, as a 128-byte value that kernels take
by value.

A matrix map copies boxes of rows, a pixel map the pixels that output positions read at one tap of a
convolution (im2col). Both write bf16 in rows of 64 values (128 bytes; a matrix map also of 16 or
32), swizzled, with zeros for what lies outside. Through the driver's own library; nothing is read
from the device.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import numpy as np

from .errors import KernelError

TENSOR_MAP = np.dtype([("words", np.uint64, 16)])  # struct TensorMap of hopper.cuh
ROW = 64  # bf16 values of a swizzled row
_BF16, _NO_INTERLEAVE, _PROMOTE_256, _ZEROS = 9, 0, 3, 0  # of the driver's enums
_SWIZZLE = {16: 1, 32: 2, ROW: 3}  # by the values of a row: 32, 64, 128 bytes
NOTHING = np.zeros((), TENSOR_MAP)  # for a term that is not there


@functools.lru_cache(maxsize=4096)
def matrix_map(address: int, shape: tuple[int, ...], box: tuple[int, ...]) -> np.ndarray:
    """Boxes of a C-contiguous bf16 array (stack, rows, columns) or (rows, columns) at a device
    address.

    shape, box: slowest axis first; a box is (1, rows, 64) or (rows, 64), or 16 or 32 instead of 64,
    with at most 256 rows. A row is a multiple of 16 bytes and the address too. Raises KernelError
    with what the driver was told.
    """
    dims = shape[::-1]
    strides = [2 * int(np.prod(dims[: i + 1], dtype=np.int64)) for i in range(len(dims) - 1)]
    out = np.zeros((), TENSOR_MAP)
    place, aligned = _aligned()
    status = _library().cuTensorMapEncodeTiled(
        place, _BF16, len(dims), ctypes.c_void_p(address),
        _array(ctypes.c_uint64, dims), _array(ctypes.c_uint64, strides),
        _array(ctypes.c_uint32, box[::-1]), _array(ctypes.c_uint32, [1] * len(dims)),
        _NO_INTERLEAVE, _SWIZZLE[box[-1]], _PROMOTE_256, _ZEROS,
    )  # fmt: skip
    _require(status, "matrix", address, shape, box)
    out["words"] = aligned
    return out


@functools.lru_cache(maxsize=4096)
def pixel_map(
    address: int,
    shape: tuple[int, ...],
    pixels: int,
    lower: tuple[int, ...],
    upper: tuple[int, ...],
    stride: tuple[int, ...],
) -> np.ndarray:
    """Columns of `pixels` pixels by 64 channels of a C-contiguous bf16 image (N, *space, C), two or
    three axes of space.

    lower, upper: the first position of a window, and the last relative to the last pixel, per axis
    of space; stride: from position to position. Raises KernelError with what the driver was told.
    """
    dims = shape[::-1]
    strides = [2 * int(np.prod(dims[: i + 1], dtype=np.int64)) for i in range(len(dims) - 1)]
    out = np.zeros((), TENSOR_MAP)
    place, aligned = _aligned()
    status = _library().cuTensorMapEncodeIm2col(
        place, _BF16, len(dims), ctypes.c_void_p(address),
        _array(ctypes.c_uint64, dims), _array(ctypes.c_uint64, strides),
        _array(ctypes.c_int, lower[::-1]), _array(ctypes.c_int, upper[::-1]),
        ROW, pixels, _array(ctypes.c_uint32, (1, *stride[::-1], 1)),
        _NO_INTERLEAVE, _SWIZZLE[ROW], _PROMOTE_256, _ZEROS,
    )  # fmt: skip
    _require(status, "pixel", address, shape, (pixels, lower, upper, stride))
    out["words"] = aligned
    return out


def _array(kind, values: Sequence[int]):
    return (kind * len(values))(*values)


def _aligned():
    """(address, values) of 128 bytes at a multiple of 64, as the driver wants them."""
    room = np.zeros(24, np.uint64)
    skip = -(room.ctypes.data // 8) % 8
    values = room[skip : skip + 16]
    return ctypes.c_void_p(values.ctypes.data), values


def _require(status: int, kind: str, *told) -> None:
    if status:
        raise KernelError(
            f"the driver refuses a {kind} map (error {status}) of {', '.join(map(str, told))}"
        )


@functools.cache
def _library():
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise KernelError(f"the driver's library cannot be loaded: {error}") from error
