"""A measurement's file: benchmarks/results/layers-<gpu>.json, written anew after every row, so that
a run that is cut off keeps what it has.

    environment fields; "ceilings"; "bare": a row a shape; "rows": a row a shape and adapter;
    "weights": a row a weight and adapter; "optimizers": a row a method, and torch's;
    "peers": a row a shape, adapter, peer and mode
"""

from __future__ import annotations

import json
import os
from pathlib import Path

FOLDER = Path(__file__).parent / "results"
SECTIONS = ("bare", "rows", "weights", "optimizers", "peers")


class Results:
    """path: None to keep nothing. head: what stands before the rows, which are in `sections`."""

    def __init__(self, path: Path | None, head: dict, sections: tuple[str, ...] = SECTIONS):
        self.path = path
        self.data = {**head, **{section: [] for section in sections}}

    def add(self, section: str, *rows: dict) -> None:
        self.data[section].extend(rows)
        self.write()

    def put(self, name: str, value) -> None:
        self.data[name] = value
        self.write()

    def write(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(_rounded(self.data), indent=1) + "\n")
        os.replace(beside, self.path)


def default_path(gpu: str) -> Path | None:
    """Where a run on this GPU is kept; None for the CPU, whose times nobody compares."""
    return FOLDER / f"layers-{gpu.lower().replace(' ', '-')}.json" if gpu else None


def _rounded(value):
    """Numbers to five figures: events tell no more."""
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
