"""The rules of a safetensors header: 8 bytes of its length, then JSON, then the tensors' bytes
without gaps.

Every broken rule is a FileFormatError that names the file, the tensor, what is and what was
expected. Nothing that the header claims is allocated or read before it is checked.
"""

from __future__ import annotations

import json
import math
import os
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from ..errors import FileFormatError

NUMPY = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "C64": np.complex64,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "BOOL": np.bool_,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz, "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
}  # fmt: skip
NUMPY = {name: np.dtype(kind) for name, kind in NUMPY.items()}
# F4 and F6 are packed: NumPy has no array of them, their bytes are only passed through.
BITS = {name: 8 * dtype.itemsize for name, dtype in NUMPY.items()} | {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
MAX_HEADER = 100_000_000  # bytes; the library's own limit
_MAX_AXES = 64  # NumPy's


# What people mistake for a safetensors file, by its first bytes; as the length of a header they are
# more than any file has.
_TORCH = "as torch.save writes: load it with torch and save it with safetensors.torch"
_OTHERS = {
    b"PK\x03\x04": f"a zip archive, {_TORCH}",
    b"\x80\x02": f"a pickle, {_TORCH}",
    b"version https://git-lfs": "a Git LFS pointer: git lfs pull gets the file itself",
    b"<!DOCTYPE html": "a web page: the download went wrong",
    b"<html": "a web page: the download went wrong",
    b"GGUF": "a GGUF file, which holds no adapter",
}


class Entry(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(handle: BinaryIO, path: str) -> tuple[int, dict[str, Entry], dict[str, str]]:
    """Where the data starts, the tensors in the order of their bytes, and the metadata."""
    size = os.fstat(handle.fileno()).st_size
    if size < 8:
        raise FileFormatError(
            f"{path}: has {size} bytes, expected at least the 8 of the header's length"
        )
    start = handle.read(8)
    length = int.from_bytes(start, "little")
    if length > size - 8:
        start += handle.read(24)
        for magic, what in _OTHERS.items():
            if start.lower().startswith(magic.lower()):
                raise FileFormatError(f"{path}: is {what}; expected a safetensors file")
        raise FileFormatError(
            f"{path}: the header claims {length} bytes, but only {size - 8} follow: truncated, or "
            "no safetensors file"
        )
    if length > MAX_HEADER:
        raise FileFormatError(
            f"{path}: the header has {length} bytes, expected at most {MAX_HEADER}"
        )
    header = _parse(handle.read(length), path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise FileFormatError(
            f"{path}: __metadata__ is {short(metadata)}, expected an object of strings"
        )
    room = size - 8 - length
    entries = {
        name: _entry(f"{path}: tensor {name!r}", form, room) for name, form in header.items()
    }
    entries = dict(sorted(entries.items(), key=lambda item: item[1][2:]))
    end, last = 0, ""
    for name, entry in entries.items():
        if entry.begin < end:
            raise FileFormatError(
                f"{path}: tensor {name!r} starts at byte {entry.begin}, inside {last!r}, which "
                f"ends at {end}"
            )
        if entry.begin > end:
            raise FileFormatError(
                f"{path}: bytes {end} to {entry.begin}, before tensor {name!r}, belong to no tensor"
            )
        end, last = entry.end, name
    if end != room:
        raise FileFormatError(f"{path}: {room - end} bytes follow the last tensor, expected none")
    return 8 + length, entries, metadata


def _parse(text: bytes, path: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = {}
        for key, value in pairs:
            if key in out:
                raise FileFormatError(f"{path}: the header names {key!r} twice")
            out[key] = value
        return out

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON number")

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
        json.dumps(header, ensure_ascii=False).encode("utf-8")  # half a surrogate pair is no text
    except FileFormatError:
        raise
    except (ValueError, RecursionError) as error:  # JSON, UTF-8, and numbers of thousands of digits
        raise FileFormatError(f"{path}: the header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise FileFormatError(f"{path}: the header is {short(header)}, expected a JSON object")
    return header


def _entry(where: str, form: Any, room: int) -> Entry:
    if not isinstance(form, dict) or not {"dtype", "shape", "data_offsets"} <= form.keys():
        raise FileFormatError(
            f"{where} is {short(form)}, expected an object with dtype, shape and data_offsets"
        )
    dtype, shape, offsets = form["dtype"], form["shape"], form["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise FileFormatError(
            f"{where} has dtype {short(dtype)}, expected one of {', '.join(BITS)}"
        )
    if not _counts(shape) or len(shape) > _MAX_AXES:
        raise FileFormatError(
            f"{where} has shape {short(shape)}, expected at most {_MAX_AXES} extents of 0 or more"
        )
    if not _counts(offsets) or len(offsets) != 2:
        raise FileFormatError(
            f"{where} has data_offsets {short(offsets)}, expected two byte counts of 0 or more"
        )
    begin, end = offsets
    if begin > end:
        raise FileFormatError(f"{where} has data_offsets {offsets}, which run backwards")
    if end > room:
        raise FileFormatError(
            f"{where} ends at byte {end}, but the file has only {room} bytes of data"
        )
    # A zero among the extents must not hide others that no array can have.
    if math.prod(n for n in shape if n) * BITS[dtype] > 2**63:
        raise FileFormatError(f"{where} has shape {short(shape)}, too large for any array")
    bits = math.prod(shape) * BITS[dtype]
    if bits != 8 * (end - begin):
        raise FileFormatError(
            f"{where} has {end - begin} bytes, expected {bits / 8:g} for {dtype} of shape {shape}"
        )
    return Entry(dtype, tuple(shape), begin, end)


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
