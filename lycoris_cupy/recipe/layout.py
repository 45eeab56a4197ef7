"""The text of a report: its table and its lists."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .added import AddedLayer
from .matching import Selected
from .memory import Memory

_ROWS = 40  # of a table in a short text
_UNITS = {"kB": 1, "MB": 10**3, "GB": 10**6, "TB": 10**9}  # in kB


def _form(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _common(names: list[str]) -> str:
    """One name for names of one form: # stands where their numbers differ."""
    parts = zip(*(re.split(r"(\d+)", name) for name in names), strict=True)
    return "".join(same[0] if len(set(same)) == 1 else "#" for same in parts)


def table_lines(rows: Sequence[AddedLayer], full: bool) -> list[str]:
    """A row for each form of name and all else equal, or (full) for each layer."""
    groups: dict[tuple, list[AddedLayer]] = {}
    for row in rows:
        key = (row.layer if full else _form(row.layer), *row[1:])
        groups.setdefault(key, []).append(row)
    head = ["layer", "", "shape", "algorithm", "rank", "alpha", "scale", "parameters", "share", ""]
    cells = [head]
    for equal in groups.values():
        one, count = equal[0], len(equal)
        cells.append(
            [
                _common([row.layer for row in equal]),
                "" if count == 1 else f"x {count}",
                one.shape,
                one.algorithm,
                "" if one.rank is None else str(one.rank),
                "" if one.alpha is None else f"{one.alpha:.6g}",
                f"{one.scale:.6g}",
                f"{count * one.parameters:,}",
                f"{one.parameters / max(one.base_parameters, 1):.1%}",
                one.note,
            ]
        )
    more = 0 if full else max(len(cells) - 1 - _ROWS, 0)
    cells = cells[: len(cells) - more]
    columns = [c for c in zip(*cells, strict=True) if any(c[1:])]
    widths = [max(map(len, column)) for column in columns]
    numbers = {"rank", "alpha", "scale", "parameters", "share"}
    lines = []
    for line in zip(*columns, strict=True):
        padded = [
            cell.rjust(w) if column[0] in numbers else cell.ljust(w)
            for cell, w, column in zip(line, widths, columns, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return lines + ([f"and {more} more rows: text(full=True) has all"] if more else [])


def selector_line(one: Selected) -> str:
    """What a selector meant and did."""
    done = {"targets": "taken", "exclude": "left out", "override": "changed"}[one.role]
    layers = "1 layer" if one.matched == 1 else f"{one.matched} layers"
    return f"{one.role} {one.selector!r}: {layers}, {one.acts} {done}"


def passed_over_lines(skipped: Sequence[tuple[str, str, str]], full: bool) -> list[str]:
    """(layer, shape, reason), those of one form and reason together."""
    if full:
        return [f"  {layer}: {reason}" for layer, _, reason in skipped]
    groups: dict[tuple[str, str], list[str]] = {}
    for layer, _, reason in skipped:
        groups.setdefault((_form(layer), reason), []).append(layer)
    lines = [
        f"  {_common(layers)}{f' x {len(layers)}' if len(layers) > 1 else ''}: {reason}"
        for (_, reason), layers in groups.items()
    ]
    more = len(lines) - _ROWS
    return lines[:_ROWS] + ([f"  and {more} more: text(full=True) has all"] if more > 0 else [])


def memory_lines(m: Memory, activations: int | None) -> list[str]:
    """What training takes."""
    parts = {"factors": m.factors, "gradients": m.gradients, "masters": m.masters}
    parts |= {"constants of the weights": m.constants} if m.constants else {}
    parts |= {"activations": activations} if activations is not None else {}
    told = ", ".join(f"{name} {size_text(count)}" for name, count in parts.items())
    state = ", ".join(f"{name} {size_text(count)}" for name, count in m.states.items())
    lines = [f"training: {told}; optimizer's state: {state}"]
    if activations is None:
        lines.append("activations are not in it: recipe.activation_bytes(engine, *inputs)")
    return lines


def size_text(count: int) -> str:
    """Bytes in the unit that people read, a power of 1000."""
    unit = next((one for one in ("kB", "MB", "GB") if count < 999_950 * _UNITS[one]), "TB")
    return f"{count} B" if count < 1000 else f"{count / (1000 * _UNITS[unit]):.1f} {unit}"
