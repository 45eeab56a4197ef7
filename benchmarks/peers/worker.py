"""One process: every peer's adapters on one layer, a JSON line a cell on standard output.

    python -m benchmarks.peers.worker --job DIR/job.json [--seconds S]
    python -m benchmarks.peers.worker --job DIR/job.json --warm [--only ADAPTER]

A cell is {"shape", "adapter", "peer", "mode", "backend", "forward_us", "step_us", "timed", "ulp"};
one that fails, or for which no time is left, has "error" instead. --warm runs every cell once and
measures nothing: it fills the compilers' caches on disk.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.peers.worker")
    parser.add_argument("--job", required=True, help="job.json, as benchmarks.peers.job writes it")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no cell after this")
    parser.add_argument("--warm", action="store_true", help="run each cell once, measure nothing")
    parser.add_argument("--only", help="one adapter's name")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    # What libraries print must not come between the lines of JSON.
    out, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
    os.dup2(2, 1)
    worker = Worker(json.loads(Path(options.job).read_text()), deadline, options.warm)
    for row in worker.rows(options.only):
        print(json.dumps(row), file=out, flush=True)
    return 0


class Cell(NamedTuple):
    """A way of a peer to run an adapter. way: what its compiled and uncompiled forms share."""

    peer: str
    mode: str
    backend: str
    compiled: bool
    build: Callable
    way: str


class Worker:
    def __init__(self, told: dict, deadline: float, warm: bool):
        import torch

        from .layer import Job

        torch.backends.cudnn.benchmark = True
        self.job, self.deadline, self.warm = Job(told), deadline, warm
        self.versions = {
            name: _version(name) for name in ("torch", "triton", "lycoris-lora", "peft")
        }

    def rows(self, only: str | None = None):
        """The bare layer's row, then a row a cell.

        First what compiles nothing; then, since each takes seconds, the compiled form of the way
        that was the faster one for an adapter, for every adapter; then the other compiled forms.
        """
        if not self.warm:
            yield self._bare()
        names = [a["name"] for a in self.job.told["adapters"]]
        chosen = [i for i, name in enumerate(names) if only in (None, name)]
        later, last = [], []
        for index in chosen:
            step_us: dict[str, float] = {}
            for cell in self._cells(index, compiled=False):
                row = self._row(index, cell)
                step_us[cell.way] = row.get("step_us", float("inf"))
                yield row
            for cell in self._cells(index, compiled=True):
                favourite = step_us[cell.way] == min(step_us.values())
                (later if favourite else last).append((index, cell))
        for index, cell in [*later, *last]:
            yield self._row(index, cell)

    def _cells(self, index: int, compiled: bool):
        from . import lycoris_cells, peft_cells

        job = self.job
        for mode, bypass, backend, is_compiled in lycoris_cells.MODES:
            if is_compiled == compiled and not (backend == "auto" and job.device == "cpu"):
                name = lycoris_cells.backend_used(job.device) if backend == "auto" else backend
                build = functools.partial(lycoris_cells.build, job, index, bypass, backend)
                yield Cell(lycoris_cells.PEER, mode, name, compiled, build, f"bypass {bypass}")
        for mode, is_compiled in peft_cells.MODES:
            if is_compiled == compiled:
                build = functools.partial(peft_cells.build, job, index)
                yield Cell(peft_cells.PEER, mode, "torch", compiled, build, "peft")

    def _row(self, index: int, cell: Cell) -> dict:
        from . import lycoris_cells

        job = self.job
        row = {
            "shape": job.told["shape"],
            "adapter": job.told["adapters"][index]["name"],
            "peer": cell.peer,
            "mode": cell.mode,
            "backend": "inductor" if cell.compiled else cell.backend,
            "version": self.versions[cell.peer],
        }
        if time.monotonic() > self.deadline:
            return {**row, "error": "not measured: the time for this shape was spent"}
        start = time.monotonic()
        try:
            row.update(self._measured(index, cell))
        except Exception as error:  # a peer's failure is a result
            text = " ".join(str(error).split())[:300]
            row["error"] = f"{type(error).__name__}: {text}"
            traceback.print_exc()
        if cell.peer == lycoris_cells.PEER and (failed := lycoris_cells.tuned(job.device)):
            row["tuner_failed"] = failed
        row["seconds"] = time.monotonic() - start
        return row

    def _measured(self, index: int, cell: Cell) -> dict:
        import torch

        from .layer import Built
        from .torch_timing import measure

        built = cell.build()
        if cell.compiled:
            torch._dynamo.reset()
            built = Built(torch.compile(built.call, dynamic=False), built.params)
        runs = self.job.runs(built)
        if self.warm:
            for run in runs.values():
                run()
            return {}
        out = self.job.check(index, built, runs["step"])
        runs["forward"]()  # tuned and compiled for no_grad too, before the clock
        for label, run in runs.items():
            found = measure(run, self.job.device)
            out[f"{label}_us"] = found["us"]
            out["timed"] = found["timed"]
            if "not_captured" in found:
                out["not_captured"] = found["not_captured"]
        return out

    def _bare(self) -> dict:
        from .layer import Built
        from .torch_timing import measure

        runs = self.job.runs(Built(self.job.base(), {}))
        row = {"shape": self.job.told["shape"], "adapter": "none", "peer": "torch", "mode": "eager"}
        for label, run in runs.items():
            found = measure(run, self.job.device)
            row[f"{label}_us"], row["timed"] = found["us"], found["timed"]
        return {**row, "version": self.versions["torch"], "triton": self.versions["triton"]}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


if __name__ == "__main__":
    raise SystemExit(main())
