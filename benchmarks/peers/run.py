"""Starting the peers' processes: many at once to fill the compilers' caches, then one a shape,
alone on the machine, to measure.

    python -m benchmarks.peers.run SECONDS      fills the caches
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from ..case import Case
from ..environment import ROOT, package
from ..shapes import SHAPES, Shape
from . import job

# What was compiled on this machine already, by versions, layer and adapter.
WARMED = Path(tempfile.gettempdir()) / "lycoris_cupy-peers-warmed.json"
GRACE = 15.0  # seconds beyond its own deadline after which a process is ended


def missing() -> str:
    """Which of the peers' packages are not installed; empty when all are."""
    modules = {"torch": "torch", "lycoris": "lycoris-lora", "peft": "peft"}
    lacking = [package for module, package in modules.items() if find_spec(module) is None]
    return ", ".join(lacking)


def warm(shapes: list[Shape], device: str, seconds: float) -> int:
    """Run every adapter of every shape once, as many processes at a time as there are cores less
    two, for at most `seconds`; what ran before on this machine is left out. Returns how many
    finished.

    Their tuner's choices are thrown away, since it timed beside others; what was compiled stays in
    the caches of Triton and torch.
    """
    deadline = time.monotonic() + seconds
    versions = " ".join(f"{p} {package(p)}" for p in ("torch", "triton", "lycoris-lora", "peft"))
    done_before = json.loads(WARMED.read_text()) if WARMED.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        tasks = []
        for i, shape in enumerate(shapes):
            told = job.describe(shape, device)
            path = Path(folder) / f"{i}.json"
            path.write_text(json.dumps(told))
            for adapter in told["adapters"]:
                mark = f"{versions}, {device}, {shape.name}, {adapter['name']}"
                if mark not in done_before:
                    tasks.append((path, adapter["name"], mark))
        lock = threading.Lock()
        # The important adapters of every shape before the others of any.
        tasks.sort(key=lambda task: job.MEASURED.index(task[1]))
        environment = {
            "LYCORIS_KERNEL_CACHE_DIR": folder,
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        }

        def run(task):
            left = deadline - time.monotonic()
            if left < 10:
                return False
            path, name, mark = task
            command = ["--job", str(path), "--warm", "--only", name, "--seconds", str(left - 5)]
            code = _start(command, environment, None, left)
            if code != 0 or time.monotonic() > deadline - 5:  # it left cells out
                return False
            with lock:
                done_before.append(mark)
                beside = WARMED.with_suffix(".part")
                beside.write_text(json.dumps(done_before))
                os.replace(beside, WARMED)
            return True

        with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 2)) as pool:
            return sum(pool.map(run, tasks))


def measure(case: Case, seconds: float, names=job.MEASURED, python: str = sys.executable):
    """The peers' rows for one case; a process that dies or hangs leaves the rows it has, and one
    that says so.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = job.write(case, Path(folder), names)
        lines = Path(folder) / "rows.jsonl"
        with lines.open("w") as out:
            command = ["--job", str(path), "--seconds", str(seconds)]
            # Their caches are warm: starting a pool of compilers would take longer than it saves.
            environment = {"LYCORIS_KERNEL_CACHE_DIR": folder, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
            code = _start(command, environment, out, seconds + GRACE, python)
        rows = [json.loads(line) for line in lines.read_text().splitlines() if _whole(line)]
    if code != 0:
        why = "ended: it took too long" if code is None else f"ended with status {code}"
        rows.append({"shape": case.shape.name, "adapter": "", "peer": "", "error": why})
    return rows


def _start(command, environment, out, seconds: float, python: str = sys.executable) -> int | None:
    """A worker's exit status; None if it was ended after `seconds`."""
    try:
        done = subprocess.run(
            [python, "-m", "benchmarks.peers.worker", *command],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=out or subprocess.DEVNULL,
            stderr=None if out else subprocess.DEVNULL,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return None
    return done.returncode


def main() -> int:
    seconds = float(sys.argv[1]) if len(sys.argv) == 2 else 0.0
    if seconds <= 0 or missing():
        lacking = f"; missing here: {missing()}" if missing() else ""
        print(f"usage: python -m benchmarks.peers.run SECONDS{lacking}", file=sys.stderr)
        return 2
    print(f"{warm(SHAPES, 'cuda:0', seconds)} adapters of layers compiled")
    return 0


def _whole(line: str) -> bool:
    return line.startswith("{") and line.endswith("}")


if __name__ == "__main__":
    raise SystemExit(main())
