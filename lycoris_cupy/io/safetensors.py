"""Safetensors files: `open_file` reads each tensor when it is asked for; `write` puts a whole file
in place, or none.

A file may be hostile: its header is checked by the rules of `header.py`, and then shown to the
safetensors library too; what either refuses is refused. Tensors are read as bytes here, as the
library's NumPy side knows no 8-bit floats.
"""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from ..errors import DtypeError, FileFormatError
from .header import BITS, MAX_HEADER, NUMPY, read_header, short

_NAMES = {dtype: name for name, dtype in NUMPY.items()}
_CHUNK = 16 << 20  # bytes a write: progress and Ctrl-C are noticed in between


class Stored(NamedTuple):
    """A tensor for `write` that is made when its turn comes: its bytes, or an array of them, from
    `read()`.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BITS[self.dtype] // 8


class TensorFile(Mapping[str, np.ndarray]):
    """An open file: a mapping from names to arrays, each read when it is asked for. A context
    manager.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if self.path.exists() and not self.path.is_file():
            raise FileFormatError(f"{path}: is not a regular file")
        self._handle = open(self.path, "rb")
        try:
            self._data, self._entries, self.metadata = read_header(self._handle, str(path))
            with safe_open(self.path, "np"):
                pass
        except SafetensorError as error:
            self.close()
            raise FileFormatError(f"{path}: {error}") from None
        except BaseException:
            self.close()
            raise

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        if entry.dtype not in NUMPY:
            raise FileFormatError(
                f"{self.path}: tensor {name!r} is packed {entry.dtype}, which has no array: unpack "
                "it first"
            )
        return self.raw(name).view(NUMPY[entry.dtype]).reshape(entry.shape)

    def raw(self, name: str) -> np.ndarray:
        """The tensor's bytes, (nbytes,) uint8, whatever its dtype."""
        entry = self._entries[name]
        self._handle.seek(self._data + entry.begin)
        out = np.fromfile(self._handle, np.uint8, entry.end - entry.begin)
        if out.size != entry.end - entry.begin:
            raise FileFormatError(
                f"{self.path}: tensor {name!r} has {entry.end - entry.begin} bytes, the file ends "
                f"after {out.size}"
            )
        return out

    def stored(self, name: str) -> Stored:
        """The tensor as `write` takes it, to pass it on bit for bit."""
        return Stored(self.dtype(name), self.shape(name), lambda: self.raw(name))

    def dtype(self, name: str) -> str:
        """The dtype as the file names it: 'BF16', 'F32', 'F8_E4M3', ..."""
        return self._entries[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries  # Mapping's own would read the tensor

    def __len__(self) -> int:
        return len(self._entries)

    def close(self) -> None:
        self._handle.close()

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_file(path: str | os.PathLike) -> TensorFile:
    """The file's header, checked. Raises FileFormatError, or OSError if it cannot be opened."""
    return TensorFile(path)


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A new file beside `path` that takes its place when the block ends well, and is gone when it
    does not.

    A crash, a full disk or a kill leaves the old file whole, or no file. Raises OSError before the
    block where it must.
    """
    target = Path(os.path.realpath(path))  # a link goes on pointing to the file
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "cannot be written: is a directory", str(path))
    beside = target.with_name(f".lycoris-{secrets.token_hex(6)}.tmp")
    try:
        handle = open(beside, "xb", buffering=0)
    except OSError as error:
        raise OSError(error.errno, f"cannot be written: {error.strerror}", str(path)) from None
    try:
        with handle:
            yield handle
            os.fsync(handle.fileno())
        if target.exists():
            shutil.copymode(target, beside)
        os.replace(beside, target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the new name is safe only when the directory is on the disk
        directory = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def write(
    path: str | os.PathLike,
    tensors: Mapping[str, np.ndarray | Stored],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """A file of these tensors, whole or not at all. Raises FileFormatError, DtypeError, or an
    OSError that says why.
    """
    with replacing(path) as handle:
        dump(handle, tensors, metadata)


def dump(
    handle: BinaryIO,
    tensors: Mapping[str, np.ndarray | Stored],
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """The bytes of a file, tensor after tensor. progress: called with the bytes written so far and
    in all.
    """
    stored = {name: _stored(name, tensor) for name, tensor in tensors.items()}
    # Wide dtypes first, otherwise in the order given: every tensor then starts at a multiple of its
    # item size.
    order = sorted(stored, key=lambda name: -BITS[stored[name].dtype])
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    if not all(isinstance(text, str) for pair in (metadata or {}).items() for text in pair):
        raise FileFormatError(f"metadata is {short(metadata)}, expected a mapping from str to str")
    end = 0
    for name in order:
        begin, end = end, end + stored[name].nbytes
        header[name] = {
            "dtype": stored[name].dtype,
            "shape": list(stored[name].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise FileFormatError(
            f"the header would have {len(text)} bytes, expected at most {MAX_HEADER}: shorten the "
            "metadata"
        )
    total, done = 8 + len(text) + end, 0
    free = shutil.disk_usage(os.path.dirname(handle.name)).free
    if free < total:
        raise OSError(
            errno.ENOSPC,
            f"cannot be written: {total} bytes are needed, {free} are free",
            os.path.dirname(handle.name),
        )
    for part in (len(text).to_bytes(8, "little") + text, *(stored[name] for name in order)):
        left = memoryview(part if isinstance(part, bytes) else _bytes(part).data)
        while left:
            try:
                count = handle.write(left[:_CHUNK])
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"cannot be written, {done} of {total} bytes done: {error.strerror}",
                    handle.name,
                ) from None
            left, done = left[count:], done + count
            if progress is not None:
                progress(done, total)


def _stored(name: str, tensor: np.ndarray | Stored) -> Stored:
    if not isinstance(name, str) or name == "__metadata__":
        raise FileFormatError(f"a tensor cannot be named {name!r}")
    if isinstance(tensor, Stored):
        return tensor
    little = tensor.dtype.newbyteorder("<")
    if little not in _NAMES:
        raise DtypeError(
            f"tensor {name!r} has dtype {tensor.dtype}, expected one of "
            f"{', '.join(map(str, _NAMES))}"
        )
    return Stored(_NAMES[little], tensor.shape, lambda: tensor.astype(little, copy=False))


def _bytes(stored: Stored) -> np.ndarray:
    array = np.ascontiguousarray(stored.read()).reshape(-1).view(np.uint8)
    assert array.size == stored.nbytes
    return array
