"""Recipe: which layers get which adapters, as one value that a file, a command line and
`Engine.add` share.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..adapters import Dropout, Option
from ..errors import FileFormatError, LycorisError
from ..layers import LayerShape
from ..norms import NormShape
from .presets import PRESETS
from .reference import translated, truth
from .selectors import known, matches
from .statement import Statement, statements

_DEFAULT = "locon"
_SELECTION = ("targets", "preset", "exclude", "train_norm", "override")
_DROPOUT = {
    "dropout": Option("dropout", "float", 0.0),
    "rank_dropout": Option("rank_dropout", "float", 0.0),
    "rank_dropout_scale": Option("rank_dropout_scale", "bool", False),
    "module_dropout": Option("module_dropout", "float", 0.0),
}


@dataclass(frozen=True)
class Recipe:
    """said: of all layers. targets, exclude: selectors, see `selectors`; by default every layer.
    preset: one of PRESETS, instead of targets. train_norm: put `norm` on the norms among them.
    override: selector -> what is said of those layers alone, over what was said before it.
    dropout: what `Dropout` takes, of all layers.
    """

    said: Statement
    targets: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    preset: str | None = None
    train_norm: bool = False
    override: Mapping[str, Statement] = field(default_factory=dict)
    dropout: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_table(cls, table: Mapping[str, Any], where: str = "") -> Recipe:
        """From names and values, as a table of TOML holds them, in this project's words or
        LyCORIS's (docs/recipes.md has both).

        where: what the table is, for errors. Raises LycorisError for a name or value that is not
        known, and for one thing said twice.
        """
        try:
            return cls._read(table)
        except LycorisError as error:
            if not where:
                raise
            raise type(error)(f"{where}: {error}") from None

    @classmethod
    def from_toml(cls, path: str | os.PathLike) -> Recipe:
        """From a TOML file that is such a table. Raises FileFormatError for one that is not TOML,
        and an OSError that says why it cannot be read.
        """
        try:
            table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise FileFormatError(f"{path}: is no TOML: {error}") from None
        return cls.from_table(table, str(path))

    @classmethod
    def of(cls, what: str | Recipe | Mapping[str, Any] | None, targets: Any, said: dict) -> Recipe:
        """What the arguments of `Engine.add` say: a recipe, its table, or an algorithm with
        targets and options.
        """
        said = {n: v for n, v in said.items() if v is not None or n not in ("rank", "alpha")}
        if targets is not None:
            said = {"targets": targets, **said}
        if what is None or isinstance(what, str):
            if what is not None and "algorithm" in said:
                raise LycorisError(f"algorithm is said twice, {what!r} and {said['algorithm']!r}")
            return cls.from_table(said if what is None else {"algorithm": what, **said})
        if said:
            names = ", ".join(said)
            raise LycorisError(f"a recipe says all there is to say, but {names} stands beside it")
        return what if isinstance(what, Recipe) else cls.from_table(what)

    @classmethod
    def _read(cls, table: Mapping[str, Any]) -> Recipe:
        if not isinstance(table, Mapping):
            raise LycorisError(f"a recipe is {table!r}, expected a table of names and values")
        own = translated(table)
        preset_name = own.get("preset")
        if preset_name is not None and preset_name not in tuple(PRESETS):
            file = str(preset_name).endswith(".toml")
            hint = "; what a file of presets says may stand in the recipe itself" if file else ""
            raise LycorisError(
                f"preset {preset_name!r} is unknown: use one of {', '.join(PRESETS)}{hint}"
            )
        preset = PRESETS[preset_name] if preset_name is not None else None
        targets = own.get("targets")
        if preset is not None and targets is not None:
            raise LycorisError(
                f"preset {preset_name!r} and targets both say which layers: keep one (exclude and "
                "override may stand beside a preset)"
            )
        algorithm = own.get("algorithm")
        only = preset.algorithm if preset is not None else None
        if algorithm is not None and only is not None and algorithm != only:
            raise LycorisError(f"preset {preset_name!r} is for {only}, not for {algorithm}")
        algorithm = algorithm or only or _DEFAULT
        dropout = {n: option.parsed(own[n]) for n, option in _DROPOUT.items() if n in own}
        Dropout(**dropout)  # its ranges
        more = (*_SELECTION, *_DROPOUT)
        rest = {name: value for name, value in own.items() if name not in more}
        said = Statement.from_table({**rest, "algorithm": algorithm}, more=more)
        override = own.get("override") or {}
        if not isinstance(override, Mapping) or not all(isinstance(s, str) for s in override):
            raise LycorisError(f"override is {override!r}, expected a table of selectors")
        return cls(
            said,
            None if targets is None else _selectors("targets", targets),
            _selectors("exclude", own.get("exclude") or ()),
            preset_name,
            truth("train_norm", own.get("train_norm", False)),
            {known(s): one for s, one in statements(override, algorithm, more).items()},
            {name: value for name, value in dropout.items() if value != _DROPOUT[name].default},
        )

    def table(self) -> dict[str, Any]:
        """Plain names and values, in the project's words, of which `from_table` makes the same."""
        out = self.said.table() | dict(self.dropout)
        if self.targets is not None:
            out["targets"] = list(self.targets)
        if self.preset is not None:
            out["preset"] = self.preset
        if self.exclude:
            out["exclude"] = list(self.exclude)
        if self.train_norm:
            out["train_norm"] = True
        if self.override:
            out["override"] = {selector: one.table() for selector, one in self.override.items()}
        return out

    @property
    def selectors(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(targets, exclude), those of the preset with them."""
        if self.preset is None:
            return ("*",) if self.targets is None else self.targets, self.exclude
        preset = PRESETS[self.preset]
        return preset.targets, (*preset.exclude, *self.exclude)

    def statement(self, name: str, shape: LayerShape) -> Statement:
        """What holds for a layer that is taken."""
        out = self.said
        of_preset = PRESETS[self.preset].override if self.preset is not None else {}
        every = [*statements(of_preset, str(out.algorithm)).items(), *self.override.items()]
        for selector, one in every:
            if matches(selector, name, shape):
                out = one.over(out)
        if self.train_norm and isinstance(shape, NormShape) and out.algorithm != "norm":
            return out.only("norm")
        return out


def _selectors(what: str, value: Any) -> tuple[str, ...]:
    listed: Sequence = [value] if isinstance(value, str) else value
    if not isinstance(listed, (list, tuple)) or not all(isinstance(s, str) for s in listed):
        raise LycorisError(f"{what} is {value!r}, expected a selector or a list of them")
    if what == "targets" and not listed:
        raise LycorisError("targets is empty: leave it out to take every layer")
    return tuple(known(selector) for selector in listed)
