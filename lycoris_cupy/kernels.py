"""Kernels: launchers of the `extern "C"` functions of cuda_src/. The .cu file is the signature.

The source is compiled for the exact device and loaded as a CuPy RawModule. A launch refuses a wrong
count, dtype, layout or number; it never synchronises and never reads a device value. Refused as
well: a define set that the .cu does not list, because the test suite compiles only those.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import numpy as np

from .arrays import DTYPES, bf16, dtype_name, f32, f64
from .cuda_source import Parameter, define_sets, expand, signatures
from .errors import KernelError
from .nvrtc import arch_of, binary

_SHARED = 48 * 1024  # static and dynamic; a block gets more only after its limit is raised


class _Refused(Exception):
    """What an argument is instead of what it should be; Kernel adds the names."""


def _pointer_of(dtype: np.dtype) -> Callable:
    array_type = None

    def convert(x):
        nonlocal array_type
        if x is None:
            return None  # a null pointer
        if type(x) is not array_type:
            if "cupy" not in sys.modules or not isinstance(x, sys.modules["cupy"].ndarray):
                raise _Refused(f"is {type(x).__name__}, expected a CuPy array of {dtype} or None")
            array_type = type(x)
        if x.dtype != dtype:
            raise _Refused(f"has dtype {x.dtype}, expected {dtype}")
        if not x.flags.c_contiguous:
            raise _Refused(f"of shape {x.shape} and strides {x.strides} is not C-contiguous")
        return x

    return convert


def _integer(scalar: type) -> Callable:
    low, high = int(np.iinfo(scalar).min), int(np.iinfo(scalar).max)

    def convert(x):
        try:
            value = x if type(x) is int else operator.index(x)
        except TypeError:
            raise _Refused(f"is {x!r}, expected an integer") from None
        if not low <= value <= high:
            raise _Refused(f"is {value}, which does not fit {scalar.__name__}")
        return scalar(value)

    return convert


def _floating(scalar: type) -> Callable:
    def convert(x):
        if not isinstance(x, (float, int, np.floating, np.integer)):
            raise _Refused(f"is {type(x).__name__}, expected a number")
        return scalar(x)

    return convert


def _struct(name: str) -> Callable:
    def convert(x):
        # CuPy passes a NumPy array of one element by value, byte by byte.
        if not isinstance(x, (np.ndarray, np.void)) or x.dtype.names is None or x.size != 1:
            raise _Refused(
                f"is {type(x).__name__}, expected one structured NumPy value laid out as {name}"
            )
        return x if isinstance(x, np.ndarray) else np.array(x)

    return convert


def converter(parameter: Parameter, dtype: str) -> Callable:
    """The function that checks an argument for this parameter and returns what CuPy passes on."""
    storage, wide = DTYPES[dtype], f64 if dtype == "f64" else f32
    kinds = {"T": storage, "A": wide, "bf16": bf16, "float": f32, "double": f64}
    kinds |= {
        "int": np.dtype(np.int32),
        "long long": np.dtype(np.int64),
        "unsigned int": np.dtype(np.uint32),
    }
    kinds |= {"unsigned": np.dtype(np.uint32), "unsigned char": np.dtype(np.uint8)}
    kind = kinds.get(parameter.type)
    if parameter.pointer:
        if kind is None:
            raise KernelError(f"kernel parameter '{parameter}': no array has this type")
        return _pointer_of(kind)
    if kind is None:
        return _struct(parameter.type)
    if kind.kind in "iu":
        return _integer(kind.type)
    if kind == bf16:
        raise KernelError(f"kernel parameter '{parameter}': pass numbers as A, not as bf16")
    return _floating(kind.type)


def _current_device() -> int:
    import cupy

    return cupy.cuda.runtime.getDevice()


_asked: ContextVar[list[Kernel] | None] = ContextVar("asked", default=None)


@contextlib.contextmanager
def asking() -> Iterator[list[Kernel]]:
    """The kernels that are called inside; they are not launched, so all results are garbage."""
    asked: list[Kernel] = []
    token = _asked.set(asked)
    try:
        yield asked
    finally:
        _asked.reset(token)


def compile_ahead(run: Callable[[], Any], workers: int | None = None) -> int:
    """Compile and load what run() calls, on the current device, in threads; how many were not
    loaded yet.
    """
    with asking() as asked:
        run()
    device = _current_device()
    needed = [k for k in dict.fromkeys(asked) if device not in k._loaded]
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda k: k.compile(device), needed))
    for k in needed:
        k.load()
    run()  # what CuPy compiles itself, and cuBLASLt's choices
    return len(needed)


class Kernel:
    """One `extern "C"` function for one storage dtype and define set; loaded on each device at its
    first launch there.
    """

    def __init__(
        self, file: str, op: str, dtype: str, defines: dict, parameters: tuple[Parameter, ...]
    ):
        self.file, self.op, self.dtype, self.defines = file, op, dtype, defines
        self.parameters = parameters
        self.name = f"{op}_{dtype}"
        self._converters = tuple(converter(p, dtype) for p in parameters)
        # device -> [launch function, RawKernel, dynamic shared memory it may use]
        self._loaded: dict[int, list] = {}

    def __call__(
        self, grid: tuple, block: tuple, *args, shared: int = 0, together: bool = False
    ) -> None:
        """Launch on the current stream and device, with `shared` bytes of dynamic shared memory.

        Arrays for pointers (None: a null pointer), numbers for scalars, one structured NumPy value
        for a struct. together: all blocks run at once, so that they may wait for each other (a
        cooperative launch); an error where the device has no room for all.
        """
        converters = self._converters
        if len(args) != len(converters):
            wanted = ", ".join(map(str, self.parameters))
            raise KernelError(
                f"kernel {self.name} got {len(args)} arguments, "
                f"expected {len(converters)}: {wanted}"
            )
        if min(grid) < 1 or min(block) < 1:  # CuPy would launch one block
            raise KernelError(
                f"kernel {self.name}: grid {grid} and block {block} must be at least 1 on each axis"
            )
        try:
            values = [convert(x) for convert, x in zip(converters, args, strict=True)]
        except _Refused:
            raise self._explained(args) from None
        asked = _asked.get()
        if asked is not None:
            asked.append(self)
            return
        device = _current_device()
        entry = self._loaded.get(device) or self._load(device)
        if shared > entry[2]:
            entry[1].max_dynamic_shared_size_bytes = entry[2] = shared
        entry[0](grid, block, values, shared, None, together)

    def load(self) -> None:
        """Compile and load on the current device, so that a stream capture finds it ready."""
        device = _current_device()
        if device not in self._loaded:
            self._load(device)

    def compile(self, device: int) -> None:
        """Make the machine code for a device and keep it on disk."""
        binary(*self._target(device))

    def _target(self, device: int) -> tuple:
        import cupy

        arch = arch_of(cupy.cuda.Device(device).compute_capability)
        return self.file, self.dtype, arch, tuple(sorted(self.defines.items()))

    def _load(self, device: int) -> list:
        import cupy

        target = self._target(device)
        try:
            raw = cupy.RawModule(path=binary(*target)).get_function(self.name)
            function = raw.kernel
        except cupy.cuda.driver.CUDADriverError:
            # The cached code is whole, but this driver refuses it: compile it anew, once.
            raw = cupy.RawModule(path=binary(*target, fresh=True)).get_function(self.name)
            function = raw.kernel
        self._loaded[device] = [function, raw, _SHARED - raw.shared_size_bytes]
        return self._loaded[device]

    def _explained(self, args) -> KernelError:
        for i, (convert, parameter, x) in enumerate(
            zip(self._converters, self.parameters, args, strict=True)
        ):
            try:
                convert(x)
            except _Refused as refused:
                return KernelError(f"kernel {self.name}: argument {i}, '{parameter}', {refused}")
        raise AssertionError("an argument was refused, then taken")

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(map(str, self.parameters))})"


def kernel(file: str, op: str, dtype, **defines) -> Kernel:
    """The launcher of NAME(op) in cuda_src/file for a storage dtype ('bf16', np.float32, ...) and a
    listed define set.
    """
    return _kernel(
        file,
        op,
        dtype if isinstance(dtype, str) else dtype_name(dtype),
        tuple(sorted(defines.items())),
    )


@functools.cache
def _kernel(file: str, op: str, dtype: str, defines: tuple) -> Kernel:
    source = expand(file)
    known = signatures(source)
    if op not in known:
        raise KernelError(f"{file} has no kernel {op!r}; it has {', '.join(known) or 'none'}")
    chosen = {name: str(value) for name, value in defines}
    listed = define_sets(source).get(dtype)
    if listed is None:
        raise KernelError(f"{file} is not made for {dtype}")
    if chosen not in listed:
        given = " ".join(f"{k}={v}" for k, v in chosen.items()) or "none"
        raise KernelError(
            f"{file} does not list the define set '{given}' for {dtype} in its '// variants' lines"
        )
    return Kernel(file, op, dtype, chosen, known[op])
