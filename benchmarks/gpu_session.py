"""One session on a GPU: the whole suite, then the benchmarks with the peers' columns, each within
its own time, and all that is worth keeping in one folder.

    python -m benchmarks.gpu_session OUT

The suite and all columns together take more than ten minutes; in two calls on one machine:

    python -m benchmarks.gpu_session OUT --stages suite --suite-seconds 560 --peer-seconds 300
    python -m benchmarks.gpu_session OUT --stages benchmarks --peer-seconds 300

where the first one also compiles the peers' kernels, beside the suite.

OUT gets at most eight files: suite.log, gpu-suite.json, benchmarks.log, benchmark.json (of
pytest-benchmark), layers.json (written row by row), table.md, chart.png. A stage that runs out of
time is ended, and what it has written counts. Prints a short summary last; exits 0 if every stage
passed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from .environment import ROOT

STAGES = ("suite", "benchmarks")
MOST_LOG = 8 << 20  # bytes; the end of a log is what tells
KEPT = 20.0  # seconds kept back for the table, the chart and the summary


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_session")
    parser.add_argument("out", type=Path, help="folder for what comes out")
    parser.add_argument("--stages", default=",".join(STAGES), help="of suite,benchmarks")
    parser.add_argument("--seconds", type=float, default=590, help="for everything (590)")
    parser.add_argument("--suite-seconds", type=float, default=240, help="for the suite (240)")
    parser.add_argument(
        "--peer-seconds", type=float, default=0, help="for the peers within the benchmarks (0)"
    )
    parser.add_argument("-k", default="", help="only benchmarks that match, as pytest's -k")
    options = parser.parse_args()
    stages = options.stages.split(",")
    if unknown := set(stages) - set(STAGES):
        parser.error(f"unknown stage {', '.join(unknown)}: use {', '.join(STAGES)}")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + options.seconds - KEPT
    lines, codes = [], []
    if "suite" in stages:
        seconds = min(options.suite_seconds, end - time.monotonic())
        warm = None
        if options.peer_seconds:
            # The suite times nothing, so the peers' kernels are compiled beside it.
            warm = _start([sys.executable, "-m", "benchmarks.peers.run", str(seconds)])
        codes.append(stage(_pytest("--require-gpu", "-q"), out / "suite.log", seconds))
        if warm is not None:
            _end(warm)
        lines.append(told("suite", codes[-1], out / "suite.log"))
        record = ROOT / "benchmarks" / "results" / "gpu-suite.json"
        if codes[-1] is not None and record.exists():
            shutil.copy(record, out)
    if "benchmarks" in stages:
        words = [
            "benchmarks", "--benchmark-enable", "-n", "0", "-q", "--benchmark-columns=median",
            "--results", str(out / "layers.json"),
            "--benchmark-json", str(out / "benchmark.json"),
            "--peer-seconds", str(options.peer_seconds),
            *(["-k", options.k] if options.k else []),
        ]  # fmt: skip
        codes.append(stage(_pytest(*words), out / "benchmarks.log", end - time.monotonic()))
        lines.append(told("benchmarks", codes[-1], out / "benchmarks.log"))
        lines += report(out)
    print("\n".join(["", *lines]))
    return int(any(codes) or None in codes)


def _pytest(*words: str) -> list[str]:
    return [sys.executable, "-m", "pytest", *words]


def stage(command: list[str], log: Path, seconds: float) -> int | None:
    """The command's exit status; None if it was ended after `seconds`."""
    with log.open("w") as file:
        process = _start(command, file)
        try:
            code = process.wait(max(seconds, 1.0))
        except subprocess.TimeoutExpired:
            _end(process)
            code = None
    _cut(log)
    return code


def _start(command: list[str], log=subprocess.DEVNULL) -> subprocess.Popen:
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )


def _end(process: subprocess.Popen) -> None:
    """With all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _cut(log: Path) -> None:
    data = log.read_bytes()
    if len(data) > MOST_LOG:
        log.write_bytes(b"(the beginning is left out)\n" + data[-MOST_LOG:])


def told(name: str, code: int | None, log: Path) -> str:
    """How a stage went: its status, the tests that failed, and its log's last line."""
    how = "ended: out of time" if code is None else f"exit status {code}"
    text = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    wrong = [line for line in text if line.startswith(("FAILED", "ERROR"))][:20]
    return "\n".join([f"{name}: {how}", *wrong, *text[-1:]])


def report(out: Path) -> list[str]:
    """Table and chart of what was measured, and the targets for the summary."""
    path = out / "layers.json"
    if not path.exists():
        return ["nothing was measured"]
    from .table import bare, full, head, optimizers, table, weights
    from .targets import targets

    data = json.loads(path.read_text())
    if not data["rows"]:
        return ["no layer was measured"]
    parts = [head(data), table(data), targets(data), bare(data), full(data), weights(data)]
    parts.append(optimizers(data))
    (out / "table.md").write_text("\n\n".join(part for part in parts if part) + "\n")
    lines = parts[:1] + [table(data), targets(data)]
    try:
        from .chart import draw

        draw(data, out / "chart.png")
    except ImportError as error:
        lines.append(f"no chart: {error} (the extra `plot`)")
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
