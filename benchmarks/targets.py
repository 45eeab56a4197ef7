"""The targets, and which of them a measurement meets.

A target says what must be reached and what is aimed at; its value is the worst over the rows it
speaks of, and what was not measured is not met.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .adapters import adapters, builders
from .shapes import SHAPES, WEIGHTS
from .table import CALLS, peer_best, peer_ratio

KINDS = {shape.name: shape for shape in SHAPES}
Value = tuple[float, str]  # the number, and where it was found


@dataclass(frozen=True)
class Target:
    """values(data): what was measured, each with its place. most: whether the bound is an upper
    one. must, aim: the bounds; aim is None where there is none. needs: how many values it takes.
    """

    what: str
    must: float
    aim: float | None
    values: Callable[[dict], Iterator[Value]]
    needs: int
    most: bool = True
    form: str = ".2f"

    def judged(self, data: dict) -> tuple[str, str, str]:
        """(mark, the worst value, where)."""
        found = list(self.values(data))
        if not found:
            return "not measured", "", ""
        worst, where = (max if self.most else min)(found)
        if not self._within(worst, self.must):
            mark = "MISSED"
        elif len(found) < self.needs:
            return f"{len(found)} of {self.needs} measured", format(worst, self.form), where
        else:
            mark = "aim met" if self._within(worst, self.aim) else "met"
        return mark, format(worst, self.form), where

    def _within(self, value: float, bound: float | None) -> bool:
        return bound is not None and (value <= bound if self.most else value >= bound)


def _is_big_linear(shape) -> bool:
    return shape.kind == "linear" and shape.positions >= 4608 and min(shape.weight) >= 3072


def _ratio(call: str, names: tuple[str, ...], chosen: Callable) -> tuple[Callable, int]:
    def values(data):
        for row in data["rows"]:
            shape = KINDS.get(row["shape"])
            if row["adapter"] in names and shape is not None and chosen(shape):
                yield row[f"{call}_ratio"], f"{row['shape']}, {row['adapter']}"

    return values, len(names) * sum(map(chosen, SHAPES))


def _costs() -> list[Target]:
    """The bounds on time over the bare layer's."""

    def linear(shape):
        return shape.kind == "linear"

    def k3(shape):
        return shape.kind == "conv k3"

    groups = [
        (
            "LoRA r16, r64, linear, 4608 tokens and more",
            ("LoRA r16", "LoRA r64"), _is_big_linear, (1.15, 1.06), (1.25, 1.12),
        ),
        (
            "LoCon r16, LoCon Tucker r16, 3x3",
            ("LoRA r16", "LoCon Tucker r16"), k3, (1.25, 1.10), (1.40, 1.20),
        ),
        (
            "LoKr factor 8, w2 full and factored, linear",
            ("LoKr factor 8", "LoKr factor 8 r16"), linear, (1.35, 1.17), (1.60, 1.30),
        ),
        (
            "LoKr factor 8, and its Tucker form, 3x3",
            ("LoKr factor 8", "LoKr Tucker factor 8 r16"), k3, (1.40, 1.20), (1.70, 1.35),
        ),
        (
            "LoHa r16, linear and convolution",
            ("LoHa r16",), lambda shape: True, (1.50, 1.25), (1.90, 1.50),
        ),
    ]  # fmt: skip
    out = []
    for what, names, chosen, *bounds in groups:
        for call, (must, aim) in zip(CALLS, bounds, strict=True):
            values, needs = _ratio(call, names, chosen)
            out.append(Target(f"{what}: {call} over bare", must, aim, values, needs))
    return out


def _own_convolution(data):
    """The project's bare convolution over cuDNN's."""
    for row in data.get("bare", []):
        times = row["times"]
        if "cudnn" in times and KINDS[row["shape"]].kind == "conv k3":
            own, cudnn = times["own"]["forward_us"], times["cudnn"]["forward_us"]
            yield own / cudnn, row["shape"]


_DESIGN_ROWS = ("LoRA r16", "LoHa r16", "LoKr factor 8", "LoCon Tucker r16")


def _over_peers(data):
    for row in data["rows"]:
        if row["adapter"] in _DESIGN_ROWS:
            ratios = peer_ratio(data, row)
            for call, peer in peer_best(data, row["shape"], row["adapter"]).items():
                place = f"{row['shape']}, {row['adapter']}, {call}: {peer['peer']}, {peer['mode']}"
                yield row[f"{call}_us"] / row[f"bare_{call}_us"] / ratios[call], place


def _wall(data):
    for row in data["rows"]:
        for call in CALLS:
            if f"{call}_warm_us" in row:  # a captured call, measured both ways
                place = f"{row['shape']}, {row['adapter']}, {call}"
                yield row[f"{call}_wall_us"] / row[f"{call}_us"], place


def _memory(data):
    for row in data["rows"]:
        if "step_bytes" in row:
            place = f"{row['shape']}, {row['adapter']}"
            yield row["step_bytes"] / row["step_bytes_allowed"], place


def _builders(data):
    for row in data.get("weights", []):
        if "copy_share" in row and row["ulp"].get("weight_mib", 0) >= 32:
            yield row["copy_share"], f"{row['shape']}, {row['adapter']}"


def _errors(data):
    for row in data["rows"]:
        for what, composed in row.get("ulp_composed", {}).items():
            place = f"{row['shape']}, {row['adapter']}, {what}"
            yield row["ulp"][what]["rms"] / composed["rms"], place


def _count(of: Callable) -> int:
    return sum(of(shape) for shape in SHAPES)


_ROWS = _count(lambda shape: len(adapters(shape.layer)))
_PEER_CELLS = len(CALLS) * _count(lambda s: len(set(_DESIGN_ROWS) & set(adapters(s.layer))))
_BUILDS = sum(len(builders(weight.layer)) for weight in WEIGHTS)


TARGETS = [
    *_costs(),
    Target("own bare 3x3 convolution over cuDNN's", 1.15, 1.00, _own_convolution, 3),
    Target("time over the peers' best mode", 1.0, None, _over_peers, _PEER_CELLS),
    Target("wall over device time, captured, many calls in a row", 1.10, None, _wall, 2 * _ROWS),
    Target("peak memory of a step over what is allowed", 1.0, None, _memory, _ROWS, form=".3f"),
    Target(
        "weight builders, share of the copy bandwidth",
        0.80, None, _builders, _BUILDS, most=False, form=".0%",
    ),
    Target(
        "error (rms ULP) over the plain composition's",
        1.0, None, _errors, 2 * _ROWS, form=".3f",
    ),
]  # fmt: skip


def targets(data: dict, chosen: Sequence[Target] = TARGETS) -> str:
    """Markdown: each target, the worst that was measured, where, and whether it is met."""
    lines = ["| target | must | aim | measured | worst at | |", "|---" * 6 + "|"]
    for target in chosen:
        mark, value, where = target.judged(data)
        bounds = [
            "" if bound is None else format(bound, ".0%" if target.form == ".0%" else ".2f")
            for bound in (target.must, target.aim)
        ]
        lines.append("| " + " | ".join([target.what, *bounds, value, where, mark]) + " |")
    return "\n".join(lines)
