"""Statement: what is said of some layers' adapters: algorithm, ranks, alphas, options.

A recipe makes one of all its layers, and one more for each selector that it makes an exception of.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from ..adapters import ALGORITHMS, DORA, Option, kind_of, options_of
from ..errors import LycorisError
from ..layers import LayerShape
from .reference import WORDS, translated

DEFAULT_RANK = 4
RANK_STABILIZED = ("locon", "loha", "lokr", "glora")  # the algorithms that rs_lora is known for
_OWN = {
    "rank": Option("rank", "int", None, optional=True),
    "alpha": Option("alpha", "float", None, optional=True),
    "conv_rank": Option("conv_rank", "int", None, optional=True),
    "conv_alpha": Option("conv_alpha", "float", None, optional=True),
    "rs_lora": Option("rs_lora", "bool", None),
}
WORDS_OF_ALL = ("algorithm", *_OWN)
_BASE = DORA["rule"].default
_HINTS = {
    "dora": "DoRA stands on locon, loha and lokr",
    "dylora block_size": "each step draws its block: draw_block",
}


@dataclass(frozen=True)
class Settings:
    """What `new_adapter` is given for one layer. alpha: None for the rank."""

    algorithm: str
    rank: int
    alpha: float | None
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Statement:
    """None: nothing is said. conv_rank, conv_alpha: of kernels over space. rs_lora: alpha counts
    divided by the root of the rank, Kalajdzievski 2023, arXiv 2312.03732.
    """

    algorithm: str | None = None
    rank: int | None = None
    alpha: float | None = None
    conv_rank: int | None = None
    conv_alpha: float | None = None
    rs_lora: bool | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_table(
        cls, table: Mapping[str, Any], of: str | None = None, more: tuple[str, ...] = ()
    ) -> Statement:
        """From names and values, in this project's words. of: the algorithm that is meant where
        none is named. more: other names that are valid where this stands, to list in errors.

        Raises LycorisError for an unknown name or value.
        """
        said = {name: _OWN[name].parsed(value) for name, value in table.items() if name in _OWN}
        algorithm = table.get("algorithm")
        kind_of(str(algorithm if algorithm is not None else of))
        own = str(algorithm or of)
        known = options_of(own)
        options = {}
        for name, value in table.items():
            if name in WORDS_OF_ALL:
                continue
            if name in known:
                options[name] = known[name].parsed(value)
            elif not _says_nothing(name, value):
                raise LycorisError(_unknown(name, own, (*WORDS_OF_ALL, *more, *known)))
        out = cls(algorithm, **said, options=options)
        out._require_ranges(own)
        return out

    def over(self, earlier: Statement) -> Statement:
        """What holds where both speak of a layer. A rank of this one holds for every kernel, and so
        does an alpha. Another algorithm takes over the options that it knows.
        """
        kept = dict(earlier.options)
        if self.algorithm not in (None, earlier.algorithm):
            kept = {n: v for n, v in kept.items() if n in options_of(str(self.algorithm))}
        said = {name: getattr(self, name) for name in WORDS_OF_ALL}
        if self.rank is not None:
            said["conv_rank"] = self.conv_rank or self.rank
        if self.alpha is not None and self.conv_alpha is None:
            said["conv_alpha"] = self.alpha
        said = {name: value for name, value in said.items() if value is not None}
        return replace(earlier, **said, options={**kept, **self.options})

    def only(self, algorithm: str) -> Statement:
        """The same for another algorithm, without options: they are those of this one."""
        return replace(self, algorithm=algorithm, options={})

    def settings(self, shape: LayerShape) -> Settings:
        """For a layer of this shape. A kernel is over space if any of its extents is above 1; there
        alone can a Tucker core stand, and conv_rank and conv_alpha hold.
        """
        algorithm = str(self.algorithm)
        spatial = shape.taps > 1
        rank = self.conv_rank if spatial and self.conv_rank is not None else self.rank
        rank = DEFAULT_RANK if rank is None else rank
        alpha = self.conv_alpha if spatial and self.conv_alpha is not None else self.alpha
        if self.rs_lora and algorithm in RANK_STABILIZED:
            # A reader divides by the rank: alpha times its root gives alpha over the root.
            alpha = (alpha or rank) * math.sqrt(rank)
        options = dict(self.options)
        if not spatial and options.get("tucker"):
            del options["tucker"]
        if kind_of(algorithm).decomposable and options.get("dora") is None:
            rule = options.pop("rule", _BASE)  # a rotation has its own; here it is that of DoRA
            if rule != _BASE:
                raise LycorisError(
                    f"rule = {rule!r} on {algorithm} is what the strength of DoRA means: it needs "
                    "dora beside it"
                )
        return Settings(algorithm, rank, alpha, options)

    @property
    def needs_space(self) -> Iterator[str]:
        """The words that act on kernels over space alone."""
        for name in ("conv_rank", "conv_alpha"):
            if getattr(self, name) is not None:
                yield name
        if self.options.get("tucker"):
            yield "tucker"

    def table(self) -> dict[str, Any]:
        """Names and values, of which `from_table` makes the same."""
        said = {name: getattr(self, name) for name in WORDS_OF_ALL}
        return {**{n: v for n, v in said.items() if v is not None}, **self.options}

    def _require_ranges(self, algorithm: str) -> None:
        for name in ("rank", "conv_rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise LycorisError(f"{name} is {value}, expected at least 1")
        if self.rs_lora and algorithm not in RANK_STABILIZED:
            raise LycorisError(
                f"rs_lora stands on {', '.join(RANK_STABILIZED)}, not on {algorithm}"
            )


def _says_nothing(name: str, value: Any) -> bool:
    """Whether it is another algorithm's option at its default: forms that are filled in by programs
    hold those of all algorithms.
    """
    for algorithm in ALGORITHMS:
        option = options_of(algorithm).get(name)
        try:
            if option is not None and option.parsed(value) == option.default:
                return True
        except LycorisError:
            continue
    return False


def _unknown(name: str, algorithm: str, known: tuple[str, ...]) -> str:
    others = {option: kind for kind in ALGORITHMS for option in options_of(kind)}
    where = [other for other in ALGORITHMS if name in options_of(other)]
    hint = _HINTS.get(name if name == "dora" else f"{algorithm} {name}", "")
    if not hint and where:
        hint = f"it is one of {', '.join(where)}"
    elif not hint and (near := get_close_matches(name, (*known, *WORDS, *others), 1)):
        of = "" if near[0] in (*known, *WORDS) else f" of {others[near[0]]}"
        hint = f"nearest: {near[0]!r}{of}"
    hint = f" ({hint})" if hint else ""
    names = ", ".join(dict.fromkeys(known))
    return f"{algorithm} has no option {name!r}{hint}; known are {names}, and LyCORIS's own names"


def statements(
    table: Mapping[str, Any], of: str, outside: tuple[str, ...] = ()
) -> dict[str, Statement]:
    """selector -> Statement, of an `override`. outside: names that are said of all layers alone.

    Raises LycorisError that names the selector.
    """
    out = {}
    for selector, said in table.items():
        try:
            if not isinstance(said, Mapping):
                raise LycorisError(f"it is {said!r}, expected a table")
            own = translated(said, default_alpha=False)
            for name in outside:
                if name in own:
                    raise LycorisError(f"{name} is said of all layers: put it beside override")
            out[selector] = Statement.from_table(own, of)
        except LycorisError as error:
            raise type(error)(f"override of {selector!r}: {error}") from None
    return out
