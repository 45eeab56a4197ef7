"""A GPU that computes nothing and counts what is allocated: the host code of the GPU path runs on
it, with its plans for an H100, on a machine without one.

Arrays stand for device memory; nothing reads or writes their values. CuPy's pool gives each array a
multiple of 512 bytes, and so does this.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import types
from math import prod
from unittest import mock

import numpy as np

from lycoris_cupy import arrays, gemm, kernels, tensor_map

_UNIT = 512
_addresses = itertools.count(1 << 60, 1 << 34)  # where no array is; no two at one, ever


class Memory:
    """Bytes that arrays hold, and the most that they held at once since `begin`."""

    used = most = 0

    @classmethod
    def begin(cls) -> int:
        cls.most = cls.used
        return cls.used


class _Buffer:
    """The memory of an array, which its views share."""

    def __init__(self, size: int):
        self.size, self.ptr = -(-size // _UNIT) * _UNIT, next(_addresses)
        Memory.used += self.size
        Memory.most = max(Memory.most, Memory.used)

    def __del__(self):
        Memory.used -= self.size


class Array:
    """shadow: a NumPy array of one element, repeated, which has the shape and strides."""

    __cuda_array_interface__ = None  # what `on_gpu` asks for

    def __init__(self, shape, dtype, strides=None, buffer=None, offset: int = 0):
        self.shape = tuple(map(int, shape if isinstance(shape, (tuple, list)) else (shape,)))
        self.dtype, self.offset = np.dtype(dtype), offset
        self.size, self.ndim = prod(self.shape), len(self.shape)
        self.nbytes = self.size * self.dtype.itemsize
        self.strides = self._dense() if strides is None else tuple(strides)
        self.buffer = _Buffer(self.nbytes) if buffer is None else buffer

    def _dense(self):
        steps = itertools.accumulate((self.dtype.itemsize, *self.shape[:0:-1]), lambda a, b: a * b)
        return tuple(steps)[::-1] if self.shape else ()

    @property
    def data(self):
        return types.SimpleNamespace(ptr=self.buffer.ptr + self.offset, mem=self.buffer)

    @property
    def flags(self):
        pairs = zip(self.shape, self.strides, self._dense(), strict=True)
        dense = not self.size or all(n == 1 or a == b for n, a, b in pairs)
        return types.SimpleNamespace(c_contiguous=dense)

    def _view(self, shadow: np.ndarray, offset: int = 0) -> Array:
        return Array(shadow.shape, shadow.dtype, shadow.strides, self.buffer, self.offset + offset)

    def _shadow(self) -> np.ndarray:
        one = np.zeros(1, self.dtype)
        return np.lib.stride_tricks.as_strided(one, self.shape, self.strides)

    def reshape(self, *shape) -> Array:
        shape = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
        if -1 in shape:
            known = prod(n for n in shape if n != -1)
            shape = tuple(self.size // known if n == -1 else n for n in shape)
        assert prod(shape) == self.size, (self.shape, shape)
        if self.flags.c_contiguous:
            return Array(shape, self.dtype, None, self.buffer, self.offset)
        return Array(shape, self.dtype)

    def transpose(self, *axes) -> Array:
        return self._view(self._shadow().transpose(*axes))

    def view(self, dtype) -> Array:
        return self._view(self._shadow().view(dtype))

    def __getitem__(self, at) -> Array:
        shadow = self._shadow()
        part = shadow[at]
        return self._view(part, part.ctypes.data - shadow.ctypes.data)

    def __setitem__(self, at, value) -> None:
        pass

    def fill(self, value) -> None:
        pass

    def astype(self, dtype, copy: bool = True) -> Array:
        same = self.dtype == np.dtype(dtype) and not copy
        return self if same else Array(self.shape, dtype)

    def _made(self, other, dtype=None) -> Array:
        shape = np.broadcast_shapes(self.shape, getattr(other, "shape", ()))
        return Array(shape, np.result_type(self.dtype, getattr(other, "dtype", self.dtype)))

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = _made


class _Device:
    """The number says the compute capability: what is kept of a device by its number stays apart."""

    id = current = 0

    def __init__(self, number: int | None = None):
        self.id = _Device.current if number is None else number
        self.compute_capability = str(self.id - 900)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def _strided(a: Array, shape, strides) -> Array:
    return Array(shape, a.dtype, strides, a.buffer, a.offset)


def _cupy(attributes):
    out = types.ModuleType("cupy")
    runtime = types.SimpleNamespace(
        getDevice=lambda: _Device.current,
        getDeviceCount=lambda: _Device.current + 1,
        deviceGetAttribute=lambda what, device: attributes[what],
        streamIsCapturing=lambda stream: False,
    )
    out.cuda = types.SimpleNamespace(
        runtime=runtime,
        Device=_Device,
        get_current_stream=lambda: types.SimpleNamespace(ptr=0),
    )
    out.ndarray, out.empty, out.zeros = Array, Array, Array
    out.lib = types.SimpleNamespace(stride_tricks=types.SimpleNamespace(as_strided=_strided))
    out.asarray = lambda a: a if isinstance(a, Array) else Array(a.shape, a.dtype)
    out.ascontiguousarray = lambda a: a if a.flags.c_contiguous else Array(a.shape, a.dtype)
    return out


@contextlib.contextmanager
def dry_gpu(capability: int = 90, processors: int = 132, shared: int = 227 * 1024):
    """The name of a device that is there, inside: by default an H100. shared: bytes of shared
    memory that a block may have.
    """
    _Device.current = 900 + capability
    attributes = {16: processors, 97: shared}  # CUDA's numbers of them
    names = ("matmul", "matmul_desc_set_attribute")
    names += ("cuTensorMapEncodeTiled", "cuTensorMapEncodeIm2col")
    library = types.SimpleNamespace(**{name: lambda *args: 0 for name in names})
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(sys.modules, {"cupy": _cupy(attributes)}))
        for module, name, value in (
            (arrays, "gpu_missing", lambda: ""),
            (gemm, "library", lambda: library),
            (gemm, "describe", lambda *args: None),
            (gemm, "constants", lambda *args: (0, 0)),
            (gemm, "workspace", lambda *args: 0),
            (tensor_map, "_library", lambda: library),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        stack.enter_context(kernels.asking())  # kernels are not launched, their arguments checked
        yield f"cuda:{_Device.current}"
