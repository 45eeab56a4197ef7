"""The tables and the chart of a measurement.

python -m benchmarks.table [FILE ...]            times over the bare layer's, and the targets
python -m benchmarks.table --full [FILE ...]     every number of every row
python -m benchmarks.table --chart OUT.png [FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .results import FOLDER

# Of the short table; the others are in the full one.
COLUMNS = (
    "LoRA r16",
    "LoHa r16",
    "LoKr factor 8",
    "LoKr factor 8 r16",
    "LoCon Tucker r16",
    "Full",
    "LoRA r64",
)
CALLS = ("forward", "step")


def peer_best(data: dict, shape: str, adapter: str) -> dict[str, dict]:
    """call -> the peers' row that is the fastest for it, over all peers and modes."""
    rows = [
        row
        for row in data.get("peers", [])
        if (row["shape"], row["adapter"]) == (shape, adapter) and "error" not in row
    ]
    return {
        call: min(timed, key=lambda row: row[f"{call}_us"])
        for call in CALLS
        if (timed := [row for row in rows if f"{call}_us" in row])
    }


def peer_ratio(data: dict, row: dict) -> dict[str, float]:
    """call -> the best peer's time over the bare layer's of the same run, which a row of an earlier
    run brings along."""
    best = peer_best(data, row["shape"], row["adapter"])
    return {
        call: peer[f"{call}_us"] / peer.get(f"bare_{call}_us", row[f"bare_{call}_us"])
        for call, peer in best.items()
    }


def table(data: dict) -> str:
    """Markdown: a row a layer; each adapter's forward; step as multiples of the bare layer's, and
    beside them the same of the peers' best mode.
    """
    shapes = list(dict.fromkeys(row["shape"] for row in data["rows"]))
    by_cell = {(row["shape"], row["adapter"]): row for row in data["rows"]}
    columns = [c for c in COLUMNS if any(row["adapter"] == c for row in data["rows"])]
    measured = {r["adapter"] for r in data.get("peers", []) if "forward_us" in r}
    compared = measured.intersection(columns)
    head = ["layer", "bare, us: forward; step"]
    for column in columns:
        head += [column, "peers"] if column in compared else [column]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for shape in shapes:
        first = next(row for row in data["rows"] if row["shape"] == shape)
        cells = [shape, f"{first['bare_forward_us']:.0f}; {first['bare_step_us']:.0f}"]
        for column in columns:
            row = by_cell.get((shape, column))
            ours = {call: row[f"{call}_ratio"] for call in CALLS} if row else {}
            cells.append(_pair(ours))
            if column in compared:
                cells.append(_pair(peer_ratio(data, row) if row else {}))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _pair(ratios: dict[str, float]) -> str:
    return "; ".join(f"{ratios[c]:.2f}" if c in ratios else "-" for c in CALLS) if ratios else ""


FULL = {
    "layer": lambda r: r["shape"],
    "adapter": lambda r: r["adapter"],
    "route": lambda r: r["route"],
    "device us": lambda r: _calls(r, "{}_us", ".0f"),
    "over bare": lambda r: _calls(r, "{}_ratio", ".2f"),
    "plain composition": lambda r: _over(r, "plain_{}_us"),
    "roofline": lambda r: _calls(r, "{}_roofline", ".0%"),
    "wall us": lambda r: _calls(r, "{}_wall_us", ".0f"),
    "of engine.capture": lambda r: f"{r['capture_wall_us']:.0f}",
    "eager wall us": lambda r: _calls(r, "{}_eager_wall_us", ".0f"),
    "merged": lambda r: f"{r['merged_forward_us'] / r['bare_forward_us']:.2f}",
    "ULP y; dx; factors (rms)": lambda r: "; ".join(f"{e['rms']:.2f}" for e in r["ulp"].values()),
    "of the composition": lambda r: "; ".join(
        f"{e['rms']:.2f}" for e in r["ulp_composed"].values()
    ),
    "MiB of a step; bare; allowed": lambda r: "; ".join(
        f"{r[k] / 2**20:.0f}" for k in ("step_bytes", "bare_step_bytes", "step_bytes_allowed")
    ),
}


def full(data: dict) -> str:
    """Markdown: every row with all that was measured, forward; step where there are two."""
    lines = ["| " + " | ".join(FULL) + " |", "|---" * len(FULL) + "|"]
    for row in data["rows"]:
        cells = []
        for cell in FULL.values():
            try:
                cells.append(cell(row))
            except KeyError:  # an older file, or a number that this device has not
                cells.append("")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _calls(row, key: str, form: str) -> str:
    return "; ".join(format(row[key.format(call)], form) for call in CALLS)


def _over(row, key: str) -> str:
    return "; ".join(f"{row[key.format(c)] / row[f'bare_{c}_us']:.2f}" for c in CALLS)


def bare(data: dict) -> str:
    """Markdown: the bare layer by every library, forward; step in us, torch's eager layer too."""
    libraries = ("cublaslt", "cudnn", "own")
    lines = ["| bare layer, us | " + " | ".join((*libraries, "torch")) + " |", "|---" * 5 + "|"]
    for row in data.get("bare", []):
        times = [row["times"].get(library) for library in libraries]
        times += [r for r in data["peers"] if (r["shape"], r["adapter"]) == (row["shape"], "none")]
        cells = [row["shape"], *(_calls(t, "{}_us", ".0f") if t else "" for t in times)]
        cells += [""] * (5 - len(cells))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) if data.get("bare") else ""


def weights(data: dict) -> str:
    """Markdown: the weight builders."""
    lines = ["| weight | adapter | us | GB/s | of the copy's | ULP (max) |", "|---" * 6 + "|"]
    for row in data.get("weights", []):
        share = f"{row['copy_share']:.0%}" if "copy_share" in row else ""
        cells = (row["shape"], row["adapter"], f"{row['us']:.0f}", f"{row['gb_s']:.0f}", share)
        lines.append("| " + " | ".join((*cells, f"{row['ulp']['max']:.2f}")) + " |")
    return "\n".join(lines) if data.get("weights") else ""


def optimizers(data: dict) -> str:
    """Markdown: a step of each optimizer on all factors of an adapter; torch's with its copy to
    bf16.
    """
    names = ("optimizer", "device us", "eager, wall us", "GB/s", "of the copy's")
    lines = ["| " + " | ".join(names) + " |", "|---" * 5 + "|"]
    for row in data.get("optimizers", []):
        us = row.get("us", row.get("step_and_copy_us"))
        wall = row.get("wall_us", row.get("step_and_copy_wall_us"))
        cells = [row["optimizer"], f"{us:.0f}" if us else "", f"{wall:.0f}"]
        cells.append(f"{row['gb_s']:.0f}" if "gb_s" in row else "")
        cells.append(f"{row['copy_share']:.0%}" if "copy_share" in row else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) if data.get("optimizers") else ""


def head(data: dict) -> str:
    """The machine and the versions, in a line."""
    names = ("driver", "cupy", "cublaslt", "cudnn", "commit", "date")
    found = [f"{name} {data[name]}" for name in names if data.get(name)]
    peers = {f"{r['peer']} {r['version']}" for r in data.get("peers", []) if r.get("version")}
    if data.get("peers_at"):  # rows of an earlier run
        peers.add(f"peers of {data['peers_at']}")
    return ", ".join([data.get("gpu") or "CPU", *found, *sorted(peers)])


def main() -> int:
    from .targets import targets

    parser = argparse.ArgumentParser(prog="python -m benchmarks.table")
    parser.add_argument("files", nargs="*", type=Path, help="default: all of benchmarks/results")
    parser.add_argument("--full", action="store_true", help="every number of every row")
    parser.add_argument("--chart", type=Path, metavar="OUT.png", help="draw instead of printing")
    options = parser.parse_args()
    paths = options.files or sorted(FOLDER.glob("layers-*.json"))
    if not paths:
        parser.error(f"there are no results in {FOLDER}: run the benchmarks on a GPU first")
    for path in paths:
        if not path.is_file():
            parser.error(f"{path} is not a file")
    if options.chart:
        from .chart import draw

        if len(paths) > 1:
            parser.error(f"--chart draws one file, there are {len(paths)}: name one")
        draw(json.loads(paths[0].read_text()), options.chart)
        return 0
    for path in paths:
        data = json.loads(path.read_text())
        parts = [head(data), table(data), targets(data)]
        if options.full:
            more = (bare(data), full(data), weights(data), optimizers(data))
            parts[2:2] = [part for part in more if part]
        print("\n\n".join(parts) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
