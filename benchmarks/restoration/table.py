"""The tables of a results file, and which targets it meets.

python -m benchmarks.restoration.table [FILE ...]    (default: all of benchmarks/results)

"gain" is over the untouched network. Means over seeds, and over the held-out photographs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from ..results import FOLDER
from ..targets import Target, targets
from .methods import FINE_TUNING, METHODS

OURS, TORCH = "lycoris_cupy", "torch"
GAIN = 3.0  # dB that every training must gain
SEEDS = 3


def runs(data: dict, side: str, method: str) -> list[dict]:
    """The trainings that ended, one a seed."""
    return [
        row
        for row in data["runs"]
        if (row["side"], row["method"]) == (side, method) and "error" not in row
    ]


def after(row: dict) -> float:
    """dB of a run, the mean over the photographs."""
    return fmean(row["decibels"].values())


def times(data: dict, side: str, method: str, device: str, mode: str = "") -> list[dict]:
    """Timings of a method's step; of one mode if it is given."""
    return [
        row
        for row in data["timings"]
        if (row["side"], row["method"], row.get("device")) == (side, method, device)
        and mode in ("", row["mode"])
    ]


def best(rows: list[dict], key: str) -> dict | None:
    return min(rows, key=lambda row: row[key]) if rows else None


def table(data: dict) -> str:
    """Markdown: a row a method of the project, and the fine-tuning in torch if it was run."""
    before = fmean(data["before"].values())
    tuned = runs(data, TORCH, FINE_TUNING) or runs(data, OURS, "Full")
    reference = fmean(map(after, tuned)) if tuned else None
    head = ["", "parameters", "file, KB", "dB before", "dB after", "gain", "to full fine-tuning"]
    head += ["CPU step, ms", "GPU step, ms: device; wall", "steps/s"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for side, method in [*((OURS, name) for name in METHODS), (TORCH, FINE_TUNING)]:
        found = runs(data, side, method)
        if not found:
            continue
        reached = fmean(map(after, found))
        size = found[0].get("file_bytes")
        cpu = best(times(data, side, method, "cpu"), "wall_us")
        gpu = best(times(data, side, method, "cuda"), "device_us")
        cells = [
            method if side == OURS else f"full {method}, torch",
            f"{found[0]['parameters']:,}",
            f"{size / 1000:.0f}" if size else "",
            f"{before:.2f}",
            f"{reached:.2f}",
            f"{reached - before:+.2f}",
            "" if reference is None else f"{reached - reference:+.2f}",
            f"{cpu['wall_us'] / 1000:.0f}" if cpu else "",
            f"{gpu['device_us'] / 1000:.2f}; {gpu['wall_us'] / 1000:.2f}" if gpu else "",
            f"{gpu['steps_per_second']:.0f}" if gpu else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def against_torch(data: dict) -> str:
    """Markdown: final losses and GPU steps of both sides; empty where torch was not run."""
    head = ["", "final loss * 1000", "of torch", "spread of seeds", "GPU step, ms: device; wall"]
    head += ["torch, CUDA graph", "torch, eager", "torch, compiled"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for method in METHODS:
        ours, theirs = (runs(data, side, method) for side in (OURS, TORCH))
        if not (ours and theirs):
            continue
        cells = [method, *(f"{1000 * fmean(r['loss'] for r in s):.4f}" for s in (ours, theirs))]
        cells += [f"{1000 * spread(ours, theirs):.4f}", _pair(times(data, OURS, method, "cuda"))]
        for mode in ("graph", "eager", "compiled"):
            cells.append(_pair(times(data, TORCH, method, "cuda", mode)))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) if len(lines) > 2 else ""


def spread(*sides: list[dict]) -> float:
    """The greatest distance of two seeds' final losses on one side."""
    losses = [[row["loss"] for row in side] for side in sides]
    return max(max(side) - min(side) for side in losses)


def _pair(rows: list[dict]) -> str:
    row = best(rows, "device_us")
    way = f" ({row['way']})" if row and row["way"] else ""
    return f"{row['device_us'] / 1000:.2f}; {row['wall_us'] / 1000:.2f}{way}" if row else ""


def _gains(data: dict) -> Iterator[tuple[float, str]]:
    before = fmean(data["before"].values())
    for method in METHODS:
        for row in runs(data, OURS, method):
            yield after(row) - before, f"{method}, seed {row['seed']}"


def _losses(data: dict) -> Iterator[tuple[float, str]]:
    for method in METHODS:
        ours, theirs = (runs(data, side, method) for side in (OURS, TORCH))
        if len(ours) > 1 and len(theirs) > 1:
            means = (fmean(row["loss"] for row in side) for side in (ours, theirs))
            mine, other = means
            yield abs(mine - other) / spread(ours, theirs), method


def _steps(key: str):
    def values(data: dict) -> Iterator[tuple[float, str]]:
        for method in METHODS:
            mine = best(times(data, OURS, method, "cuda"), key)
            other = best(times(data, TORCH, method, "cuda"), key)
            if mine and other:
                where = f"{method}, torch by {other['way']}, {other['mode']}"
                yield mine[key] / other[key], where

    return values


_EACH = len(METHODS)
TARGETS = [
    Target("gain on held-out photographs, dB", GAIN, None, _gains, SEEDS * _EACH, most=False),
    Target("distance of mean final losses over the seeds' spread", 1, None, _losses, _EACH),
    Target("GPU step over torch's fastest, device time", 1, None, _steps("device_us"), _EACH),
    Target("GPU step over torch's fastest, wall time", 1, None, _steps("wall_us"), _EACH),
]


def head(data: dict) -> str:
    """What was trained, where, and with what, in a paragraph."""
    task, cpu = data["task"], data["cpu"]
    words = (
        f"{data['gpu'] or 'no GPU'}; CPU {cpu['name']}, {cpu['cores']} cores. "
        f"{task['steps']} steps of {task['patches']} patches of {task['patch']} x {task['patch']} "
        f"pixels, {data['seeds']} seeds, {data['dtype']}."
    )
    versions = {row["version"]: row["lycoris_lora"] for row in data["runs"] if row["side"] == TORCH}
    for torch, lycoris in versions.items():
        words += f" torch {torch}, lycoris-lora {lycoris}, kernels '{data['torch_backend']}'."
    return words


def page(data: dict) -> str:
    """All of it."""
    parts = [head(data), table(data), against_torch(data), targets(data, TARGETS)]
    return "\n\n".join(part for part in parts if part) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.restoration.table")
    parser.add_argument("files", nargs="*", type=Path, help="default: all of benchmarks/results")
    options = parser.parse_args()
    paths = options.files or sorted(FOLDER.glob("restoration-*.json"))
    if not paths:
        parser.error(
            f"there are no results in {FOLDER}: run python -m benchmarks.restoration first"
        )
    for path in paths:
        if not path.is_file():
            parser.error(f"{path} is not a file")
        print(page(json.loads(path.read_text())))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
