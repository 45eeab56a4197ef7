"""The README's table of what works on what, made of ALGORITHMS and of the tables that the tests run
over: nothing in it is typed by hand.

    python -m tests.support_table            print it
    python -m tests.support_table --write    put it into README.md, between its two markers
"""

from __future__ import annotations

import sys
from pathlib import Path

from lycoris_cupy import ALGORITHMS
from tests import test_dora, test_norm, test_rotations
from tests.cases import KINDS, PAIRS, adapters_for

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- support table: begin -->", "<!-- support table: end -->"

# Each column, and the kinds of layers that stand for it.
COLUMNS = {
    "Linear": ("linear", "linear odd"),
    "Conv 1x1": ("conv1x1",),
    "Conv spatial": ("conv3x3", "conv3x3 stride", "conv3x2 dilation"),
    "Conv Tucker": ("conv3x3", "conv3x3 stride", "conv3x2 dilation"),
    "Conv1d, Conv3d": ("conv1d", "conv3d"),
    "groups, depthwise": ("groups 4", "groups stride", "depthwise", "depthwise 1d"),
    "LayerNorm, GroupNorm": tuple(test_norm.KINDS),
}
TUCKER, NORMS = "Conv Tucker", "LayerNorm, GroupNorm"
ALL = "LFTMS"
LEGEND = (
    "L load, F forward, T train (gradients of the input and of every factor), M merge (`merged()`, "
    "and into a checkpoint file), S save. A dash: the algorithm has no such form. Made by "
    "`python -m tests.support_table` from `ALGORITHMS` and the tests' own tables of cases."
)


def covered() -> dict[tuple[str, str], dict[str, str]]:
    """(row, column) -> {kind of layer: what is tested there, of LFTMS}."""
    out: dict[tuple[str, str], dict[str, str]] = {}

    def mark(row: str, kind: str, tucker: bool, letters: str = ALL) -> None:
        for column, kinds in COLUMNS.items():
            if kind in kinds and (column == TUCKER) == tucker:
                out.setdefault((row, column), {})[kind] = letters

    # test_law.py (F, T, M) and test_adapter_file.py (L, S) run over all of these.
    for kind, name in PAIRS:
        mark(adapters_for(kind.shape)[name].algorithm, kind.name, "tucker" in name)
    for kind, name, _ in test_dora.FORMS:
        on = adapters_for(kind.shape)[name].algorithm
        mark(f"{on} with dora", kind.name, "tucker" in name)
    for name in test_norm.KINDS:
        mark("norm", name, False)
    for algorithm, kind in test_rotations.NOT_MERGED:
        mark(algorithm, kind, False, "LFTS")
    return out


def rows() -> list[str]:
    """Every algorithm, and DoRA after each that carries it."""
    out = []
    for name, kind in ALGORITHMS.items():
        out += [name, f"{name} with dora"] if kind.decomposable else [name]
    return out


def cell(found: dict[str, str]) -> str:
    """What holds on every kind that is tested; a dash where none is."""
    letters = [set(value) for value in found.values()]
    return "".join(x for x in ALL if all(x in one for one in letters)) if letters else "-"


def table() -> str:
    """Markdown, with the legend under it."""
    found = covered()
    lines = [
        "| | " + " | ".join(COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for row in rows():
        cells = (cell(found.get((row, column), {})) for column in COLUMNS)
        lines.append(f"| `{row}` | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", LEGEND])


def untested() -> list[str]:
    """Kinds of layers that no column shows."""
    shown = {kind for kinds in COLUMNS.values() for kind in kinds}
    return [kind.name for kind in KINDS if kind.name not in shown]


def placed(text: str) -> str:
    """The text of a README with the table between its markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"README.md: expected one {BEGIN!r} and one {END!r}")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


def main(arguments: list[str]) -> int:
    if arguments == ["--write"]:
        README.write_text(placed(README.read_text()))
    elif arguments:
        raise SystemExit("usage: python -m tests.support_table [--write]")
    else:
        print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
