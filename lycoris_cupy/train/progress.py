"""The bar of a run: loss, steps a second, and how long it will take."""

from __future__ import annotations

import sys
from typing import Any


class Progress:
    """A bar on a terminal; elsewhere a line every ten seconds. A context manager."""

    def __init__(self, name: str, steps: int, done: int, shown: bool):
        from tqdm import tqdm

        self._bar: Any = tqdm(
            desc=name,
            total=steps,
            initial=done,
            unit="step",
            file=sys.stderr,
            disable=not shown,
            mininterval=0.1 if sys.stderr.isatty() else 10.0,
            dynamic_ncols=True,
        )

    def step(self) -> None:
        self._bar.update()

    def tell(self, **values: float) -> None:
        """Shown behind the bar from now on."""
        self._bar.set_postfix({k: f"{v:.4g}" for k, v in values.items()}, refresh=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
