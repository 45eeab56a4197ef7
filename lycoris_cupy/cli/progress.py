"""The progress bar of long commands."""

from __future__ import annotations

import sys
from typing import Any


class Bar:
    """A progress callable of (done, total): a bar on a terminal, elsewhere only when it takes long.

    what: said before the bar. unit: of done and total, 'B' for bytes. A context manager.
    """

    def __init__(self, what: str, unit: str = "layer"):
        self._what, self._unit = what, unit
        self._bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None:
            from tqdm import tqdm

            wait, often = (0.5, 0.1) if sys.stderr.isatty() else (10.0, 10.0)
            self._bar = tqdm(
                desc=self._what,
                total=total,
                unit=self._unit,
                unit_scale=self._unit == "B",
                file=sys.stderr,
                delay=wait,
                mininterval=often,
            )
        self._bar.update(done - self._bar.n)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
