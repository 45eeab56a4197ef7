"""Stochastic rounding to bf16: a value goes up with the probability of the share that it has left.

So the mean of many roundings is the value, and steps far below bf16's 8 bits move it on average.
"""

from __future__ import annotations

import numpy as np

from ..arrays import Array, bf16, on_gpu
from ..errors import DtypeError
from ..kernels import kernel
from ..philox import random_bits


def round_stochastically(array: Array, seed: int, step: Array, tensor: int) -> Array:
    """bf16 of an f32 array, with the bits of `random_bits(array.shape, seed, step, tensor)`.

    A value of bf16 stays what it is, so do infinities; NaN stays NaN.
    """
    if array.dtype != np.float32:
        raise DtypeError(f"the array to round has dtype {array.dtype}, expected f32")
    if on_gpu(array):
        return _gpu(array, seed, step, tensor)
    return rounded(array, random_bits(array.shape, seed, step, tensor))


def rounded(array: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """bf16 of f32 with given random bits. NumPy."""
    bits = np.ascontiguousarray(array).view(np.uint32).reshape(array.shape)
    # The carry out of the 16 bits that go is the rounding; in a NaN it could reach the sign.
    up = (bits + (noise & np.uint32(0xFFFF))) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(array), quiet, up).astype(np.uint16).view(bf16)


def _gpu(array: Array, seed: int, step: Array, tensor: int) -> Array:
    import cupy

    out = cupy.empty(array.shape, bf16)
    if array.size:
        run = kernel("rounding.cu", "round_stochastically", bf16)
        blocks = -(-array.size // 1024)  # 256 threads, four values each
        arguments = (cupy.ascontiguousarray(array), out, array.size, step, tensor)
        run((blocks,), (256,), *arguments, seed & 0xFFFFFFFF, seed >> 32)
    return out
