"""MergeReport: what a merge changes, how strongly, where it goes, and what survives rounding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from .report import LoadReport
from .rounding import Survival

_WORST = 5  # tensors listed when a part of the change is lost


@dataclass(frozen=True)
class MergeReport:
    """adapters, strengths: one entry an adapter. layers: the strengths each changed layer gets.
    files: bytes of tensors of each file. changed: the tensors that are. dtypes: of all tensors of
    the base. survival: of each changed weight, once it is written.
    """

    adapters: tuple[LoadReport, ...]
    strengths: tuple[float, ...]
    layers: Mapping[str, tuple[float, ...]]
    files: Mapping[str, int]
    changed: tuple[str, ...]
    dtypes: Mapping[str, str]
    survival: Mapping[str, Survival]

    @property
    def nbytes(self) -> int:
        """Of all tensors of the result."""
        return sum(self.files.values())

    def adapter_lines(self) -> list[str]:
        """One line an adapter, and what of it was left out."""
        out = []
        for report, strength in zip(self.adapters, self.strengths, strict=True):
            out.append(f"{report.summary()}, at strength {strength:g}")
            out += [f"  left out: {entry}" for entry in report.unmatched]
        return out

    def plan_lines(self) -> list[str]:
        """What would be done: files, counts, strengths."""
        kinds = Counter(self.dtypes[name] for name in self.changed if name in self.dtypes)
        per_kind = ", ".join(f"{count} {dtype}" for dtype, count in kinds.items()) or "none"
        sums = Counter(self.layers.values())
        out = [
            f"{len(self.changed)} tensors would change ({per_kind}), "
            f"{len(self.dtypes) - sum(kinds.values())} pass bit for bit"
        ]
        for strengths, count in sums.most_common():
            names = " + ".join(f"{one:g}" for one in strengths)
            first = next(name for name, some in self.layers.items() if some == strengths)
            out.append(f"  {count} layers at strength {names}, the first is {first}")
        out += [f"  {name}: {size:,} bytes of tensors" for name, size in self.files.items()]
        return out

    def survival_lines(self) -> list[str]:
        """A line a dtype that lost some of the change, with its worst tensors."""
        out = []
        for dtype in dict.fromkeys(self.dtypes.get(name, "") for name in self.survival):
            mine = {n: s for n, s in self.survival.items() if self.dtypes.get(n) == dtype}
            total = Survival()
            for one in mine.values():
                total = total.plus(one)
            if total.error < 1e-3:
                continue
            out.append(f"rounded to {dtype}: {total}")
            if abs(total.share - 1) > 0.01:
                worst = sorted(mine, key=lambda name: mine[name].share)[:_WORST]
                out += [f"  {name}: {mine[name]}" for name in worst]
        return out
