"""The table of a measurement: python -m benchmarks.table [FILE of benchmarks/results]."""

from __future__ import annotations

import json
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    "LoRA r16",
    "LoHa r16",
    "LoKr factor 8",
    "LoKr factor 8 r16",
    "LoCon Tucker r16",
    "Full",
)


def table(data: dict) -> str:
    """Markdown: a row a layer, each adapter's forward; step as multiples of the bare layer's."""
    shapes = list(dict.fromkeys(row["shape"] for row in data["rows"]))
    by_cell = {(row["shape"], row["adapter"]): row for row in data["rows"]}
    lines = [
        "| layer | bare, us: forward; step | " + " | ".join(COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 2) + "|",
    ]
    for shape in shapes:
        first = next(row for row in data["rows"] if row["shape"] == shape)
        cells = [shape, f"{first['bare_forward_us']:.0f}; {first['bare_step_us']:.0f}"]
        for adapter in COLUMNS:
            row = by_cell.get((shape, adapter))
            cells.append(f"{row['forward_ratio']:.2f}; {row['step_ratio']:.2f}" if row else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    paths = [Path(p) for p in sys.argv[1:]] or sorted(RESULTS.glob("layers-*.json"))
    for path in paths:
        data = json.loads(path.read_text())
        print(f"{data['gpu']}, driver {data['driver']}, CuPy {data['cupy']}\n\n{table(data)}\n")
    return 0 if paths else 1


if __name__ == "__main__":
    raise SystemExit(main())
