"""A checkpoint: one safetensors file, or shards with an index, read as one mapping.

Refused: an index that names a shard that is not there, a tensor that its shard does not hold, or a
path outside its folder; and a shard with a tensor that the index does not name, which would be
lost.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from ..errors import FileFormatError
from .header import NUMPY, short
from .safetensors import Stored, TensorFile, open_file

INDEX = ".safetensors.index.json"
# Other files of weights, which a merge does not change and must not pass on as if it had.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack")


class Checkpoint(Mapping[str, np.ndarray]):
    """An open checkpoint: names to arrays, each read when it is asked for. A context manager.

    shards: file name to open file. stem: what the names of the shards and of the index begin with;
    None for a single file. paths: those of the shards, and of the index. index_metadata: what the
    index says beside the names.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        index = _find_index(self.path)
        self.stem = None if index is None else index.name.removesuffix(INDEX)
        self.folder = self.path.parent if index is None else index.parent
        self.index_metadata: dict[str, Any] = {}
        wanted: dict[str, str] = {}
        if index is not None:
            wanted, self.index_metadata = _read_index(index)
        self.shards: dict[str, TensorFile] = {}
        with ExitStack() as opened:
            for name in dict.fromkeys(wanted.values()) if index else [self.path.name]:
                if index and not (self.folder / name).exists():
                    raise FileFormatError(
                        f"{index}: names the shard {name!r}, which is not beside it"
                    )
                self.shards[name] = opened.enter_context(open_file(self.folder / name))
            self._owner = {t: name for name, file in self.shards.items() for t in file}
            if index is not None:
                _require_same(index, wanted, self.shards)
            self._opened = opened.pop_all()
        self.paths = [file.path for file in self.shards.values()]
        self.paths += [] if index is None else [index]

    @property
    def metadata(self) -> dict[str, str]:
        """That of all shards; where two say different things, the first shard's."""
        out: dict[str, str] = {}
        for file in self.shards.values():
            out = file.metadata | out
        return out

    def shard_of(self, name: str) -> str:
        """The file name of the shard that holds this tensor."""
        return self._owner[name]

    def _file(self, name: str) -> TensorFile:
        return self.shards[self._owner[name]]

    def __getitem__(self, name: str) -> np.ndarray:
        return self._file(name)[name]

    def into(self, name: str, scratch: np.ndarray) -> np.ndarray:
        """The tensor in this uint8 memory, which the array then shares."""
        raw = self._file(name).raw(name, scratch)
        return raw.view(NUMPY[self.dtype(name)]).reshape(self.shape(name))

    def stored(self, name: str) -> Stored:
        """The tensor as `write` takes it, to pass it on bit for bit."""
        return self._file(name).stored(name)

    def dtype(self, name: str) -> str:
        """The dtype as the file names it: 'BF16', 'F32', 'F8_E4M3', ..."""
        return self._file(name).dtype(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file(name).shape(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._owner)

    def __contains__(self, name: object) -> bool:
        return name in self._owner  # Mapping's own would read the tensor

    def __len__(self) -> int:
        return len(self._owner)

    def dtypes(self) -> dict[str, str]:
        """The dtype of every tensor, by name."""
        return {name: self.dtype(name) for name in self}

    def copy_companions(self, folder: Path) -> None:
        """Copy what lies beside the shards and is no weight: configuration, tokenizer, licence."""
        for file in self.folder.iterdir():
            weights = file.suffix in _WEIGHTS or file.name.endswith(".index.json")
            if file.is_file() and not weights and not file.name.startswith("."):
                shutil.copy2(file, folder / file.name)

    def close(self) -> None:
        self._opened.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """path: a safetensors file, an index (`*.safetensors.index.json`), or a folder that holds one
    of the two. Raises FileFormatError, or OSError if a file cannot be opened.
    """
    return Checkpoint(path)


def _find_index(path: Path) -> Path | None:
    if not path.is_dir():
        return path if path.name.endswith(INDEX) else None
    found = sorted(path.glob("*" + INDEX))
    if len(found) == 1:
        return found[0]
    if found:
        raise FileFormatError(
            f"{path}: has several indices, {', '.join(one.name for one in found)}: name one"
        )
    files = len(list(path.glob("*.safetensors")))
    advice = f"but {files} safetensors files: name one of them" if files else "nor safetensors"
    raise FileFormatError(f"{path}: is a folder without a *{INDEX} {advice}")


def _read_index(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    try:
        index = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path}: is not JSON ({error})") from None
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names:
        raise FileFormatError(
            f"{path}: weight_map is {short(names)}, expected an object of tensor names to shards"
        )
    for tensor, shard in names.items():
        if not isinstance(shard, str) or PurePath(shard).name != shard or "\\" in shard:
            raise FileFormatError(
                f"{path}: tensor {tensor!r} is in {short(shard)}, expected the name of a file in "
                "the same folder"
            )
    more = index.get("metadata", {})
    return names, more if isinstance(more, dict) else {}


def _require_same(index: Path, wanted: dict[str, str], shards: dict[str, TensorFile]) -> None:
    for tensor, shard in wanted.items():
        if tensor not in shards[shard]:
            raise FileFormatError(
                f"{index}: says that {shard!r} holds {tensor!r}, but it does not: the shard is "
                "another file's, or the index is stale"
            )
    for shard, file in shards.items():
        for tensor in file:
            if wanted.get(tensor) != shard:
                where = f"in {wanted[tensor]!r}" if tensor in wanted else "nowhere"
                raise FileFormatError(
                    f"{index}: {shard!r} holds {tensor!r}, which the index says is {where}: it "
                    "would be lost"
                )
