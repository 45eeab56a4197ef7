"""The TOML file of `lycoris-cupy train`: every key it may have, checked and with its default.

Errors name the file, the table and the key, what it is and what is expected.
"""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from ..arrays import DTYPES
from ..errors import FileFormatError, LycorisError
from ..optim import SGD, AdamW, Lion, Optimizer, Prodigy, ScheduleFreeAdamW
from ..recipe import Recipe

EXAMPLE = Path(__file__).with_name("train_example.toml")
OPTIMIZERS = {kind.__name__: kind for kind in (AdamW, SGD, Lion, Prodigy, ScheduleFreeAdamW)}
SCHEDULES = ("constant", "linear", "cosine")
_NEEDED: Any = object()


class _Key(NamedTuple):
    """default: _NEEDED where there is none. fits: whether a value will do. expected: in words."""

    default: Any
    fits: Callable[[Any], bool]
    expected: str


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(at_least: float = 0.0, default: Any = None, below: float | None = None) -> _Key:
    def fits(value: Any) -> bool:
        return _is_number(value) and at_least <= value < (below or float("inf"))

    what = "a number of" if below is None else "a number from"
    upto = f"at least {at_least:g}" if below is None else f"{at_least:g} to below {below:g}"
    return _Key(default, fits, f"{what} {upto}")


def _count(at_least: int = 1, default: Any = None) -> _Key:
    return _Key(
        default, lambda v: type(v) is int and v >= at_least, f"a whole number from {at_least} on"
    )


def _text(default: Any = None) -> _Key:
    return _Key(default, lambda value: isinstance(value, str) and bool(value), "a text")


def _one_of(names, default: Any = None) -> _Key:
    return _Key(default, lambda value: value in names, "one of " + ", ".join(names))


def _truth(default: bool) -> _Key:
    return _Key(default, lambda value: isinstance(value, bool), "true or false")


def _table(what: str = "a table of arguments") -> _Key:
    return _Key({}, lambda value: isinstance(value, dict), what)


_TABLES: dict[str, dict[str, _Key]] = {
    "": {
        "name": _Key(
            _NEEDED,
            lambda v: isinstance(v, str) and v != "" and not set(v) & set("/\\\0"),
            "a name without slashes",
        ),
        "output": _text(_NEEDED),
        "seed": _count(0, 0),
    },
    "network": {
        "source": _text(_NEEDED),
        "dtype": _one_of(DTYPES, "bf16"),
        "options": _table(),
    },
    "data": {
        "pictures": _text(),
        "pairs": _text(),
        "batches": _text(),
        "validation": _text(),
        "damage": _one_of(("screen",), "screen"),
        "batch": _count(default=4),
        "patch": _count(default=32),
        "held_out": _number(0.0, 0.1, 1.0),
        "options": _table(),
    },
    "optimizer": {
        "kind": _one_of(OPTIMIZERS, "AdamW"),
        "lr": _number(),
        "schedule": _one_of(SCHEDULES, "constant"),
        "warmup": _count(0, 0),
        "end": _number(default=0.0),
        "weight_decay": _number(),
        "clip": _number(),
        "plus": _number(default=1.0),
        "rates": _Key(
            {},
            lambda v: isinstance(v, dict) and all(map(_is_number, v.values())),
            "a table of patterns and numbers",
        ),
        "stochastic_rounding": _truth(False),
    },
    "train": {
        "steps": _count(default=_NEEDED),
        "loss": _text("mse"),
        "accumulate": _count(default=1),
        "average": _number(0.0, None, 1.0),
        "max_norm": _number(),
        "log_every": _count(default=10),
        "checkpoint_every": _count(),
        "validate_every": _count(),
        "patience": _count(),
        "keep": _count(default=2),
    },
}
_ADAPTER = "adapter"
_OWN = ("lr", "parameters", "self", "weight_decay", "common")  # of every optimizer


@dataclass(frozen=True)
class Configuration:
    """path: of the file; what it says is relative to its folder. tables: name -> key -> value, with
    the defaults; '' is what stands above the first table. settings: the optimizer's own.
    """

    path: Path
    tables: dict[str, dict[str, Any]]
    adapter: dict[str, Any]
    settings: dict[str, Any]

    def __getitem__(self, table: str) -> dict[str, Any]:
        return self.tables[table]

    @property
    def output(self) -> Path:
        return self.near(self[""]["output"])

    def near(self, path: str) -> Path:
        """A path that the file names."""
        return self.path.parent / path

    def where(self, table: str, key: str = "") -> str:
        """For errors."""
        return " ".join(part for part in (f"{self.path}:", table and f"[{table}]", key) if part)

    def decisive(self) -> dict[str, Any]:
        """What decides the numbers, beside what `fit` sees of adapter and optimizer itself."""
        return {
            "seed": self[""]["seed"],
            "network": self["network"],
            "data": self["data"],
            "loss": self["train"]["loss"],
        }


def read_configuration(path: Path) -> Configuration:
    """Raises FileFormatError, LycorisError, or OSError if it cannot be read."""
    try:
        given = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{path}: is no TOML: {error}") from None
    tables = {name: given.pop(name, {}) for name in (*filter(None, _TABLES), _ADAPTER)}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise LycorisError(f"{path}: {name} is {table!r}, expected a table [{name}]")
    adapter = tables.pop(_ADAPTER)
    settings = _settings(path, tables["optimizer"])
    tables["optimizer"] = {k: v for k, v in tables["optimizer"].items() if k not in settings}
    others = (*tables, _ADAPTER)
    checked = {"": _checked(path, "", given, others)}
    for name, table in tables.items():
        checked[name] = _checked(path, name, table)
    Recipe.from_table(adapter, f"{path}: [{_ADAPTER}]")
    out = Configuration(Path(path), checked, adapter, settings)
    _require_one_source(out)
    return out


def _checked(path: Path, table: str, given: Mapping[str, Any], others=()) -> dict[str, Any]:
    keys = _TABLES[table]
    where = f"{path}: [{table}]" if table else f"{path}:"
    for key in given:
        if key not in keys:
            raise LycorisError(f"{where} has no key {key!r}{_nearest(key, (*keys, *others))}")
    out = {}
    for key, one in keys.items():
        if key not in given:
            if one.default is _NEEDED:
                raise LycorisError(f"{where} {key} is missing, expected {one.expected}")
            out[key] = one.default
            continue
        if not one.fits(given[key]):
            raise LycorisError(f"{where} {key} is {given[key]!r}, expected {one.expected}")
        out[key] = given[key]
    return out


def _settings(path: Path, table: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that only the optimizer's class knows; ranges it checks itself."""
    common, found = _TABLES["optimizer"], {}
    named = table.get("kind", "AdamW")
    if not common["kind"].fits(named):
        raise LycorisError(
            f"{path}: [optimizer] kind is {named!r}, expected {common['kind'].expected}"
        )
    kind: type[Optimizer] = OPTIMIZERS[named]
    parameters = inspect.signature(kind).parameters
    own = {key: one.default for key, one in parameters.items() if key not in _OWN}
    for key, value in table.items():
        if key in common:
            continue
        where = f"{path}: [optimizer] {kind.__name__}"
        if key not in own:
            raise LycorisError(f"{where} has no key {key!r}{_nearest(key, (*common, *own))}")
        one = _like(own[key])
        if not one.fits(value):
            raise LycorisError(f"{where} {key} is {value!r}, expected {one.expected}")
        found[key] = value
    return found


def _like(default: Any) -> _Key:
    """What a setting with this default may be."""
    if isinstance(default, bool):
        return _truth(default)
    if not isinstance(default, tuple):
        return _Key(default, _is_number, "a number")
    count = len(default)
    return _Key(
        default,
        lambda v: isinstance(v, list) and len(v) == count and all(map(_is_number, v)),
        f"a list of {count} numbers",
    )


def _require_one_source(config: Configuration) -> None:
    data, sources = config["data"], ("pictures", "pairs", "batches")
    named = [key for key in sources if data[key] is not None]
    if len(named) != 1:
        what = " and ".join(named) or "nothing"
        raise LycorisError(f"{config.where('data')} names {what}, expected one of pictures, pairs, "
                           "batches")  # fmt: skip
    if data["validation"] is not None and data["batches"] is None:
        raise LycorisError(
            f"{config.where('data')} validation goes with batches: of pictures some are held out"
        )


def _nearest(key: str, known) -> str:
    near = get_close_matches(key, known, 1)
    listed = ", ".join(known)
    return f": did you mean {near[0]!r}?" if near else f", expected one of {listed}"
