"""Where an adapter's alpha comes from: the tensor beside its factors, else the file's metadata,
else adapter_config.json, else the rank itself, which makes the scale 1.

Sources that disagree are an error, unless the caller says which one holds. `lora_adapter_metadata`
is diffusers' copy of PEFT's configuration; `ss_network_alpha` is kohya's training record, which
speaks only of modules of the rank it names.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import FileFormatError

SOURCES = ("tensor", "metadata", "configuration", "rank")
CONFIGURATION = "adapter_config.json"
METADATA = "lora_adapter_metadata"
_CLOSE = 2.0**-7  # an alpha that was stored in bf16 is off by half of this

# Options of a training run that give modules of one rank different alphas.
_UNEVEN = ("rs_lora", "rank_stabilized", "block_alphas", "block_dims", "preset", "module_algo_map")


@dataclass(frozen=True)
class Configuration:
    """PEFT's configuration of one model: lora_alpha (or alpha), r, patterns, use_rslora."""

    values: Mapping[str, Any]
    name: str = CONFIGURATION

    def alpha(self, path: str, rank: int) -> float | None:
        """The alpha that gives this module's scale as alpha / rank, or None if it names none."""
        found = self._number("lora_alpha", "alpha")
        found = self._pattern("alpha_pattern", path, found)
        if found is None:
            return None
        said = self._pattern("rank_pattern", path, self._number("r"))
        if said is not None and rank and said != rank:
            raise FileFormatError(
                f"{self.name} says rank {said:g} of {path!r}, its factors have rank {rank}"
            )
        return found * math.sqrt(rank) if self.values.get("use_rslora") else found

    def scale(self, path: str) -> float | None:
        """alpha / r of a module whose factors do not tell r, or None if either is missing."""
        alpha = self._pattern("alpha_pattern", path, self._number("lora_alpha", "alpha"))
        rank = self._pattern("rank_pattern", path, self._number("r"))
        return alpha / rank if alpha is not None and rank else None

    def _pattern(self, key: str, path: str, otherwise: float | None) -> float | None:
        table = self.values.get(key) or {}
        if not isinstance(table, Mapping):
            raise FileFormatError(f"{self.name}: {key} is {table!r}, expected an object")
        for pattern, value in table.items():
            # PEFT's own rule: the pattern is the end of the name, after a dot.
            try:
                if re.fullmatch(rf"(.*\.)?({pattern})", path):
                    return _number(value, f"{self.name}: {key} {pattern!r}")
            except re.error as error:
                raise FileFormatError(f"{self.name}: {key} {pattern!r}: {error}") from None
        return otherwise

    def _number(self, *keys: str) -> float | None:
        for key in keys:
            if self.values.get(key) is not None:
                return _number(self.values[key], f"{self.name}: {key}")
        return None


@dataclass(frozen=True)
class Alphas:
    """The sources of a file. only: the one to believe, None for all in their order."""

    metadata: Mapping[str, str] = field(default_factory=dict)
    configuration: Configuration | None = None
    only: str | None = None

    def __post_init__(self):
        if self.only is not None and self.only not in SOURCES:
            raise FileFormatError(f"alpha from {self.only!r}: expected one of {', '.join(SOURCES)}")

    def find(
        self, module: str, path: str, tensor: float | None, rank: int, spatial: bool
    ) -> tuple[float | None, str]:
        """(alpha, where it comes from) of a module; (None, '') where the rank stands for it.

        tensor: the alpha beside the factors; 0 means the rank. Raises FileFormatError if two
        sources disagree.
        """
        found: dict[str, tuple[float, str]] = {}
        if tensor is not None:
            found["tensor"] = (tensor or float(rank), "its tensor")
        if self.only in (None, "metadata"):
            told = self._of_metadata(module, path, rank, spatial)
            if told is not None:
                found["metadata"] = told
        if self.configuration is not None and self.only in (None, "configuration"):
            alpha = self.configuration.alpha(path, rank)
            if alpha is not None:
                found["configuration"] = (alpha, self.configuration.name)
        if self.only is not None:
            found = {source: said for source, said in found.items() if source == self.only}
        if not found:
            return None, ""
        first, *others = found.values()
        for alpha, where in others:
            if abs(alpha - first[0]) > _CLOSE * abs(first[0]):
                raise FileFormatError(
                    f"alpha is {first[0]:g} by {first[1]} and {alpha:g} by {where}: say which one "
                    f"holds (alpha_from, or --alpha-from: {', '.join(SOURCES)})"
                )
        if first[1] == "its tensor":
            return tensor, ""
        return first

    def _of_metadata(
        self, module: str, path: str, rank: int, spatial: bool
    ) -> tuple[float, str] | None:
        if METADATA in self.metadata:
            values = json_object(self.metadata[METADATA], METADATA)
            component, _, _ = module.partition(".")
            own = {
                key.removeprefix(f"{component}."): value
                for key, value in values.items()
                if key.startswith(f"{component}.")
            }
            alpha = Configuration(own, METADATA).alpha(path, rank)
            return None if alpha is None else (alpha, METADATA)
        options = _options(self.metadata.get("ss_network_args", ""))
        conv = "conv_" if spatial and options.get("conv_dim") is not None else ""
        where = f"ss_network_args {conv}alpha" if conv else "ss_network_alpha"
        source = options if conv else self.metadata
        said = [_maybe(source.get(f"{conv or 'ss_network_'}{key}")) for key in ("dim", "alpha")]
        if any(options.get(name) for name in _UNEVEN) or said[0] != rank or not said[1]:
            return None
        return said[1], where


def json_object(text: str | bytes, name: str) -> dict[str, Any]:
    """The object that this JSON is. Raises FileFormatError, which says what `name` is instead."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{name} is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise FileFormatError(f"{name} is {str(values)[:60]!r}, expected a JSON object")
    return values


def _options(text: str) -> dict[str, Any]:
    """kohya's record of a network's options; a training record may hold anything, so that what is
    no object counts as none.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise FileFormatError(f"{what} is {value!r}, expected a finite number")
    return float(value)


def _maybe(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
