"""The driver's own library, for what CuPy does not pass on."""

from __future__ import annotations

import ctypes
import functools

from .errors import KernelError


@functools.cache
def driver():
    """libcuda. Raises KernelError where there is none."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise KernelError(f"the driver's library cannot be loaded: {error}") from error
