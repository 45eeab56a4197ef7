"""The command: the project's trainings and times, then torch's in a process of its own.

Every result is written at once, so that a run that is cut off keeps what it has.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from lycoris_cupy.arrays import dtype_name
from lycoris_cupy.demo.extra import NETWORK, network_files
from lycoris_cupy.demo.ncnn import Network, read_network
from lycoris_cupy.demo.photographs import bicubic, held_out
from lycoris_cupy.demo.picture import before_after
from lycoris_cupy.demo.upscaler import build_engine, upscale
from lycoris_cupy.errors import LycorisError

from ..environment import ROOT, environment
from ..results import Results
from .data import Task, decibels
from .methods import FINE_TUNING, METHODS
from .ours import file_bytes, tested, timed, trained
from .table import OURS, TARGETS, page

SECTIONS = ("runs", "timings")
READINGS = 50  # of the loss, a training


class Session:
    """What a call was asked for, and what it has found so far."""

    def __init__(self, options: argparse.Namespace, chosen: list[str], modes: list[str]):
        self.options, self.chosen, self.modes = options, chosen, modes
        self.deadline = time.monotonic() + options.seconds
        self.task = Task(options.steps, options.patches, rate_factor=options.rate_factor)
        self.log_every = max(1, self.task.steps // READINGS)
        self.network: Network = read_network(*network_files())
        self.base = build_engine(self.network, options.device)
        self.pictures = held_out(0)
        self.failed = False
        head = {
            **environment(),
            "cpu": {"name": cpu_name(), "cores": os.cpu_count()},
            "network": NETWORK,
            "task": dataclasses.asdict(self.task),
            "seeds": options.seeds,
            "dtype": dtype_name(self.base.dtype),
            "torch_backend": options.torch_backend,
            "log_every": self.log_every,
            "before": decibels(self.base, self.pictures),
        }
        path = options.out / "restoration.json"
        self.results = Results(path, head, SECTIONS)
        if options.again:
            self.results.data = _kept(path, head, options.again, [*chosen, FINE_TUNING])
        self.results.write()

    def add(self, section: str, row: dict, run: Callable[[], dict]) -> None:
        """A result, or why there is none; it is printed and kept at once."""
        if time.monotonic() > self.deadline:
            row["error"] = "not run: the time was spent"
        else:
            start = time.monotonic()
            try:
                row.update(run())
            except Exception as error:  # the others are worth having
                row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                traceback.print_exc()
            row["seconds"] = time.monotonic() - start
        self.keep(section, row)

    def keep(self, section: str, row: dict) -> None:
        self.failed |= "error" in row and row["side"] == OURS  # what torch cannot do is a result
        self.results.add(section, row)
        print(told(section, row), flush=True)


def run(options: argparse.Namespace, chosen: list[str], modes: list[str]) -> int:
    """0, or 1 if something failed or a target was missed. Raises LycorisError, OSError."""
    if options.torch and (missing := [m for m in ("torch", "lycoris") if not find_spec(m)]):
        raise LycorisError(
            f"--torch needs {', '.join(missing)}: install the extra with "
            'python -m pip install "lycoris_cupy[peer]"'
        )
    options.out.mkdir(parents=True, exist_ok=True)
    session = Session(options, chosen, modes)
    print(f"{NETWORK} on {session.base.device}, {session.task}", flush=True)
    if options.again != "torch":
        engines = _ours(session)
        if engines:
            draw(session, engines)
    if options.torch:
        _torch(session)
    data = session.results.data
    text = page(data)
    (options.out / "table.md").write_text(text, encoding="utf-8")
    print(f"\n{text}")
    missed = any(target.judged(data)[0] == "MISSED" for target in TARGETS)
    return int(missed or session.failed)


def _kept(path: Path, head: dict, side: str, again: list[str]) -> dict:
    """What an earlier call for the same task on the same GPU found, but for the rows of one side's
    methods that are run again. Raises LycorisError where there is none.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise LycorisError(f"--again keeps the results of {path}: {error}") from error
    for key in ("gpu", "task", "seeds", "dtype"):
        if found.get(key) != head[key]:
            raise LycorisError(
                f"--again: {path} was measured with {key} {found.get(key)}, not {head[key]}"
            )
    for name in SECTIONS:
        found[name] = [
            row
            for row in found[name]
            if row["method"] not in again or (row["side"] == OURS) != (side == "project")
        ]
    return found if side == "torch" else {**found, **head}


def _ours(session: Session) -> dict:
    """Trainings of every method, seed by seed, then the clocks. name -> engine of seed 0."""
    engines, options = {}, session.options
    for seed in range(options.seeds):
        for name in session.chosen:
            row = {"side": OURS, "method": name, "seed": seed}
            session.add("runs", row, functools.partial(_training, session, name, seed, engines))
    bases = [session.base] if session.base.device != "cpu" else []
    bases += [build_engine(session.network, "cpu")] if options.cpu_steps else []
    for base in bases:
        for name in session.chosen:
            clock = functools.partial(timed, base, METHODS[name], session.task, options.cpu_steps)
            session.add("timings", {"side": OURS, "method": name}, clock)
    return engines


def _training(session: Session, name: str, seed: int, engines: dict) -> dict:
    """One training and its test. The first seed's adapter is kept, as a file too."""
    engine, row = trained(session.base, METHODS[name], seed, session.task, session.log_every)
    row |= tested(engine, session.task, session.pictures)
    if seed == 0:
        engines[name] = engine
        path = session.options.out / f"{name.lower().replace(' ', '-')}.safetensors"
        row["file_bytes"] = file_bytes(engine, path, steps=str(session.task.steps))
    return row


def draw(session: Session, engines: dict) -> None:
    """crops.png: a row a photograph, a column a method."""
    lows, originals = zip(*session.pictures.values(), strict=True)
    columns = {"damaged": list(lows), "bicubic": [bicubic(low) for low in lows]}
    for label, engine in {"network": session.base, **engines}.items():
        columns[label] = [upscale(engine, low) for low in lows]
    before_after(session.options.out / "crops.png", {**columns, "original": list(originals)})


def _torch(session: Session) -> None:
    """Torch's rows, from a process of its own: two libraries in one would share a GPU's memory."""
    options = session.options
    job = options.out / "torch-task.json"
    job.write_text(
        json.dumps(
            {
                "task": dataclasses.asdict(session.task),
                "methods": session.chosen,
                "seeds": options.seeds,
                "device": session.base.device.split(":")[0],
                "dtype": dtype_name(session.base.dtype),
                "modes": session.modes,
                "torch_backend": options.torch_backend,
                "log_every": session.log_every,
            }
        )
    )
    command = torch_command(job.resolve(), session.deadline - time.monotonic())
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            row = json.loads(line)
            session.keep(row.pop("section"), row)
    if process.returncode:
        session.failed = True
        print(f"the process of torch ended with status {process.returncode}", flush=True)
    job.unlink()


def torch_command(job: Path, seconds: float) -> list[str]:
    side = [sys.executable, "-m", "benchmarks.restoration.torch_side"]
    return [*side, "--task", str(job), "--seconds", str(seconds)]


def told(section: str, row: dict) -> str:
    """A result in a line."""
    words = [row["side"], row["method"]]
    words += [str(row[key]) for key in ("way", "mode") if row.get(key)]
    if "error" in row:
        return f"{' '.join(words)}: {row['error']}"
    if section == "runs":
        mean = sum(row["decibels"].values()) / len(row["decibels"])
        figures = f"seed {row['seed']}, loss {row['loss']:.6f}, {mean:.2f} dB"
        return f"{' '.join(words)}: {figures}, {row['train_seconds']:.1f} s"
    device = f"{row['device_us'] / 1000:.3f} ms of the device, " if "device_us" in row else ""
    return f"{' '.join(words)}, {row['device']}: a step {device}{row['wall_us'] / 1000:.3f} ms"


def cpu_name() -> str:
    """What the system calls its processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
