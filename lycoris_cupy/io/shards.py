"""Where the tensors of a checkpoint go: one file, the shards they came in, or shards of a given
size; and the index beside them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import FileFormatError
from .checkpoint import INDEX
from .safetensors import Stored

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
Shards = dict[str, dict[str, Stored]]  # file name to its tensors


def parse_size(text: str) -> int:
    """Bytes of '5GB', '500MB', '2GiB' or '123456'; 0 means one file. Raises FileFormatError."""
    form = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?|)b?", text.strip().lower())
    if not form:
        raise FileFormatError(
            f"size {text!r} is unknown: write 5GB, 500MB, 2GiB, or 0 for one file"
        )
    return int(float(form[1]) * _UNITS[form[2]])


def split(tensors: Mapping[str, Stored], size: int, stem: str) -> Shards:
    """Shards of at most `size` bytes of tensors each, in the given order; a larger tensor has its
    own.
    """
    groups: list[dict[str, Stored]] = [{}]
    room = size
    for name, tensor in tensors.items():
        if groups[-1] and tensor.nbytes > room:
            groups.append({})
            room = size
        groups[-1][name] = tensor
        room -= tensor.nbytes
    names = [f"{stem}-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
    return dict(zip(names, groups, strict=True))


def write_index(
    folder: str | os.PathLike, stem: str, shards: Shards, metadata: Mapping[str, Any]
) -> None:
    """The index that says which shard holds which tensor, and their bytes in all."""
    total = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors.values())
    index = {
        "metadata": {**metadata, "total_size": total},
        "weight_map": {t: shard for shard, tensors in shards.items() for t in tensors},
    }
    (Path(folder) / (stem + INDEX)).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
