"""Safetensors files: `open_file` reads each tensor when it is asked for; `write` puts a whole file
in place, or none.

A file may be hostile: its header is checked by the rules of `header.py`, and then shown to the
safetensors library too; what either refuses is refused. Tensors are read as bytes here, as the
library's NumPy side knows no 8-bit floats.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from ..errors import DtypeError, FileFormatError
from .atomic import replacing
from .header import BITS, MAX_HEADER, NUMPY, read_header, short
from .output import Output, in_threads, require_room

_NAMES = {dtype: name for name, dtype in NUMPY.items()}


class Stored(NamedTuple):
    """A tensor for `write` that is made when its turn comes: its bytes, or an array of them, from
    `read()`. What that gives is written before the same thread asks for another.

    span: an open file and the offset in it where these very bytes stand, so that the system can
    copy them without our reading them.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    span: tuple[BinaryIO, int] | None = None

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
        self._lock = Lock()
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

    def raw(self, name: str, scratch: np.ndarray | None = None) -> np.ndarray:
        """The tensor's bytes, (nbytes,) uint8, whatever its dtype. scratch: uint8 memory to put
        them into, at its beginning; new memory otherwise.
        """
        entry = self._entries[name]
        size, offset = entry.end - entry.begin, self._data + entry.begin
        out = np.empty(size, np.uint8) if scratch is None else scratch[:size]
        view, done = memoryview(out), 0  # pyright: ignore[reportArgumentType]
        while done < size:
            count = self._read_some(view[done:], offset + done)
            if not count:
                raise FileFormatError(
                    f"{self.path}: tensor {name!r} has {size} bytes, the file ends after {done}"
                )
            done += count
        return out

    def _read_some(self, view: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._handle.fileno(), [view], offset)
        with self._lock:  # several threads may read: the position is the file's
            self._handle.seek(offset)
            return self._handle.readinto(view)  # pyright: ignore

    def stored(self, name: str) -> Stored:
        """The tensor as `write` takes it, to pass it on bit for bit."""
        span = (self._handle, self._data + self._entries[name].begin)
        return Stored(self.dtype(name), self.shape(name), lambda: self.raw(name), span)

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


def size_of(
    tensors: Mapping[str, np.ndarray | Stored], metadata: Mapping[str, str] | None = None
) -> int:
    """The bytes of the file that `write` would make of these; no tensor is read."""
    stored, _, header = _laid_out(tensors, metadata)
    return len(header) + sum(one.nbytes for one in stored.values())


def dump(
    handle: BinaryIO,
    tensors: Mapping[str, np.ndarray | Stored],
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    workers: int = 0,
) -> None:
    """The bytes of a file, tensor after tensor. progress: called with the bytes written so far and
    in all. workers: threads that each make a tensor, write it to its place and go on with the next;
    0 does so here.
    """
    stored, order, header = _laid_out(tensors, metadata)
    total = len(header) + sum(one.nbytes for one in stored.values())
    require_room(os.path.dirname(handle.name), total)
    out = Output(handle, total, progress)
    out.write(header, 0)
    tasks, offset = [], len(header)
    for name in order:
        tasks.append(partial(_put, out, stored[name], offset))
        offset += stored[name].nbytes
    in_threads(tasks, workers)


def _put(out: Output, one: Stored, offset: int) -> None:
    if one.span is None or not out.copy(*one.span, one.nbytes, offset):
        data = np.ascontiguousarray(one.read()).reshape(-1).view(np.uint8)
        assert data.size == one.nbytes
        out.write(data, offset)


def _laid_out(tensors, metadata) -> tuple[dict[str, Stored], list[str], bytes]:
    """The tensors, the order of their bytes, and the header."""
    stored = {name: _stored(name, tensor) for name, tensor in tensors.items()}
    # Wide dtypes first, otherwise in the order given: every tensor then starts at a multiple of its
    # item size.
    order = sorted(stored, key=lambda name: -BITS[stored[name].dtype])
    return stored, order, _header(stored, order, metadata)


def _header(stored, order, metadata) -> bytes:
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
    return len(text).to_bytes(8, "little") + text


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
