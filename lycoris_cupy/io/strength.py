"""Strengths: how strongly an adapter, or an adapter on some layers, is applied.

    0.8                        every layer of every adapter that has no strength of its own
    *attn*:0.5                 the layers whose name fits the pattern, of every adapter
    style=*attn*:0.5           of the adapter style.safetensors only

A pattern is a shell's: * for anything, ? for one character, [ab] for a or b; capitals count. It
is held against the whole name of the layer in the base, as in `model.diffusion_model.out.2`. Where
several fit, the last one counts. It is the strength itself, not a factor of the adapter's. What
fits no layer is an error.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from ..errors import FileFormatError, MatchError


class LayerStrength(NamedTuple):
    """The strength of the layers that fit a pattern. adapter: its path, file name, or file name
    without `.safetensors`; None for all.
    """

    pattern: str
    value: float
    adapter: str | None = None

    def __str__(self) -> str:
        return f"{self.adapter + '=' if self.adapter else ''}{self.pattern}:{self.value:g}"

    def concerns(self, path: str | os.PathLike) -> bool:
        """Whether it speaks of this adapter."""
        name = Path(path).name
        return self.adapter in (None, os.fspath(path), name, name.removesuffix(".safetensors"))


def parse_strength(text: str) -> float | LayerStrength:
    """One `--strength`. Raises FileFormatError."""
    what, colon, number = text.rpartition(":")
    adapter, equals, pattern = what.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        value = None
    if value is None or (colon and not pattern) or (equals and not adapter):
        raise FileFormatError(
            f"strength {text!r} is unknown: write 0.8, PATTERN:0.5 or ADAPTER=PATTERN:0.5"
        )
    if not math.isfinite(value):
        raise FileFormatError(f"strength {text!r} is not finite, expected a number")
    return LayerStrength(pattern, value, adapter if equals else None) if colon else value


def strength_on(
    layer: str, path: str | os.PathLike, strength: float, rules: Sequence[LayerStrength]
) -> float:
    """Of this adapter on this layer: the last rule that fits, or the adapter's own strength."""
    for rule in reversed(rules):
        if rule.concerns(path) and fnmatchcase(layer, rule.pattern):
            return rule.value
    return strength


def require_used(
    rules: Sequence[LayerStrength], layers_of: Iterable[tuple[str | os.PathLike, Iterable[str]]]
) -> None:
    """Raise MatchError for a rule of no given adapter, or whose pattern fits no layer.

    layers_of: the path of each adapter and the layers it changes.
    """
    known = [(path, list(layers)) for path, layers in layers_of]
    for rule in rules:
        mine = [layers for path, layers in known if rule.concerns(path)]
        if not mine:
            names = ", ".join(sorted({repr(Path(path).name) for path, _ in known})) or "none"
            raise MatchError(
                f"strength '{rule}' is of the adapter {rule.adapter!r}, expected one of {names}"
            )
        layers = [layer for some in mine for layer in some]
        if not any(fnmatchcase(layer, rule.pattern) for layer in layers):
            example = f", for example {layers[0]!r}" if layers else ""
            raise MatchError(
                f"strength '{rule}' fits none of the {len(layers)} layers that are changed{example}"
            )
