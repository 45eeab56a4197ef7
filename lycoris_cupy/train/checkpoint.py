"""Checkpoints: a folder each, `step-00000100`, that gets its name in one step when all is in it.

    adapter.safetensors   the adapter, as any program reads it: the average, if there is one
    state.safetensors     the exact masters, the optimizer's state, the average, the meter's sums;
                          its metadata: step, configuration, fingerprint of the base, random state

So adapter and state always belong together, after a kill at any moment too. `best-*` is the best by
validation; the highest step counts.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import FileFormatError
from ..io.atomic import new_folder
from ..io.safetensors import open_file, write
from .tree import packed, unpacked

ADAPTER, STATE = "adapter.safetensors", "state.safetensors"
VERSION = "1"
_NAMED = re.compile(r"(step|best)-(\d{8,})")
_LEFT = ".lycoris-*.tmp"  # of a kill while one was written


class Checkpoints:
    """The checkpoints in `folder`, which is made when the first one is written.

    keep: how many periodic ones stay; the oldest go.
    """

    def __init__(self, folder: Path, keep: int = 2):
        self.folder, self.keep = folder, keep

    def list(self, kind: str = "step") -> list[Path]:
        """Those of a kind, the oldest first."""
        found = []
        for path in self.folder.glob(f"{kind}-*"):
            match = _NAMED.fullmatch(path.name)
            if match and path.is_dir():
                found.append((int(match[2]), path))
        return [path for _, path in sorted(found)]

    def latest(self) -> Path | None:
        """The newest of both kinds."""
        every = [*self.list("best"), *self.list()]
        return max(every, key=lambda path: int(path.name.split("-")[1])) if every else None

    def save(
        self, step: int, state: dict[str, Any], save_adapter: Callable[[Path], None], kind="step"
    ) -> Path:
        """Write a checkpoint, then delete what is one too many of its kind."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{kind}-{step:08}"
        if not path.exists():  # else it is from before a resume, and holds the same
            with new_folder(path) as beside:
                save_adapter(beside / ADAPTER)
                arrays: dict = {}
                skeleton = packed(state, arrays, "state")
                write(beside / STATE, arrays, {"version": VERSION, "state": json.dumps(skeleton)})
        for old in self.list(kind)[: -self.keep if kind == "step" else -1]:
            shutil.rmtree(old)
        return path

    def sweep(self) -> None:
        """Delete what kills have left behind, here and in the run's own folder."""
        for path in self.folder.glob(_LEFT):
            shutil.rmtree(path)
        for path in self.folder.parent.glob(_LEFT):
            path.unlink()


def read_state(path: Path, device: str) -> dict[str, Any]:
    """The state in a checkpoint's folder, its arrays on a device. Raises FileFormatError."""
    file = path / STATE
    with open_file(file) as opened:
        version = opened.metadata.get("version")
        if version != VERSION or "state" not in opened.metadata:
            raise FileFormatError(
                f"{file}: has version {version!r}, expected {VERSION!r}: it is no state of "
                "training, or another version of lycoris_cupy wrote it"
            )
        try:
            return unpacked(json.loads(opened.metadata["state"]), opened, device)
        except (KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"{file}: the state in it is broken ({error})") from None
