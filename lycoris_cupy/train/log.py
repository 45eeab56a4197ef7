"""The log of a run: `log.jsonl`, a JSON object a line.

    {"step": 20, "seconds": 1.5, "loss": 0.0123, "grad_norm": 0.5, "lr": 0.001}
    {"step": 100, "seconds": 7.1, "validation": 0.0101}

step counts steps that are done. loss and grad_norm are means over the steps since the line before.
A validation that is no finite number is null.
"""

from __future__ import annotations

import json
from math import isfinite
from pathlib import Path
from typing import Any

from ..errors import FileFormatError
from ..io.atomic import replacing

NAME = "log.jsonl"


class Log:
    """Appends a line at once, so that whoever reads along sees it. A context manager.

    folder: None keeps the lines in memory alone. done: lines of later steps are dropped: what a run
    that goes on from there will write again.
    """

    def __init__(self, folder: Path | None, done: int = 0):
        self.lines: list[dict[str, Any]] = []
        self._handle = None
        if folder is None:
            return
        path = folder / NAME
        if done and path.exists():
            self.lines = [line for line in read_log(path) if line["step"] <= done]
        with replacing(path) as handle:
            handle.write(b"".join(map(_text, self.lines)))
        self._handle = open(path, "ab", buffering=0)

    def write(self, done: int, seconds: float, **values: float) -> None:
        told = {key: value if isfinite(value) else None for key, value in values.items()}
        self.lines.append({"step": done, "seconds": round(seconds, 3), **told})
        if self._handle is not None:
            self._handle.write(_text(self.lines[-1]))

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            self._handle.close()


def read_log(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's folder, or of its log. A last line that is not whole is left out: it is
    being written, or a kill has cut it.

    Raises FileFormatError, or OSError where there is no log.
    """
    path = run / NAME if run.is_dir() else run
    out = []
    for i, text in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            line = json.loads(text)
            if not isinstance(line, dict) or not isinstance(line.get("step"), int):
                raise ValueError("no object with a step")
        except ValueError as error:
            raise FileFormatError(f"{path}, line {i}: is no line of a log ({error})") from None
        out.append(line)
    return out


def _text(line: dict[str, Any]) -> bytes:
    return json.dumps(line).encode() + b"\n"
