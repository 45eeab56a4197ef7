"""Option: what an algorithm lets users choose, with its kind of value and its default."""

from __future__ import annotations

import inspect
import math
from dataclasses import MISSING, fields
from typing import Any, NamedTuple

import numpy as np

from ..errors import LycorisError

_OF_ALL = ("shape", "rank", "alpha")  # every adapter has these; they are no options
_KINDS = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
}


class Option(NamedTuple):
    """kind: 'bool', 'int', 'float' or 'str'. optional: whether None is a value too."""

    name: str
    kind: str
    default: Any
    optional: bool = False

    def parsed(self, value: Any) -> Any:
        """The value, or what a text says of it: files of settings often hold nothing but text.

        Raises LycorisError for any other. Numbers are no truth values: programs differ in what 0
        and "no" mean.
        """
        if value is None and self.optional:
            return None
        if isinstance(value, np.generic):
            value = value.item()
        out = _PARSERS[self.kind](value)
        if out is None:
            raise LycorisError(f"{self.name} is {value!r}, expected {_KINDS[self.kind]}")
        return out


def options_of_class(kind: type) -> dict[str, Option]:
    """Those named by the signature of `create`; where it takes any, the fields of the class."""
    signature = inspect.signature(kind.create).parameters.values()  # pyright: ignore
    if any(one.kind is one.VAR_KEYWORD for one in signature):
        told = [(field.name, field.type, field.default) for field in fields(kind)]
    else:
        told = [(p.name, p.annotation, p.default) for p in signature if p.kind is p.KEYWORD_ONLY]
    out = {}
    for name, annotation, default in told:
        if name not in _OF_ALL:
            assert default is not MISSING
            first, _, rest = str(annotation).partition(" | ")
            out[name] = Option(name, first, default, rest == "None")
    return out


def _truth(value: Any) -> bool | None:
    if isinstance(value, bool):
        return value
    text = value.strip().lower() if isinstance(value, str) else None
    return {"true": True, "false": False}.get(text or "")


def _whole(value: Any) -> int | None:
    number = _number(value)
    return int(number) if number is not None and number.is_integer() else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


_PARSERS = {"bool": _truth, "int": _whole, "float": _number, "str": _text}
