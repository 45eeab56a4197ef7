"""An adapter file as modules: which keys belong together, in which dialect, and what else tells
their alpha.

A file alone, or a folder of PEFT's: adapter_model.safetensors with its adapter_config.json beside.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from ..adapters import RULES
from ..adapters.oft import READINGS
from ..errors import FileFormatError, LycorisError
from ..ops.squares import AXES
from .alpha import CONFIGURATION, Alphas, Configuration, json_object
from .checkpoint import open_checkpoint
from .dialects import Dialect
from .keys import Key, parse_key, unread
from .peft_options import check_options
from .report import Unmatched
from .safetensors import TensorFile, open_file

PEFT_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class Module:
    """One module of a file. key: any of its keys. keys: LyCORIS's word -> the key in the file."""

    key: Key
    keys: Mapping[str, str]

    @property
    def name(self) -> str:
        return self.key.module


@dataclass(frozen=True)
class Source:
    """An open adapter file. unread: keys of no dialect, each with the reason. dora, rule, dialect:
    what the caller says of magnitudes, of strength and of rotations, see `read_module`.
    """

    file: TensorFile
    modules: tuple[Module, ...]
    unread: tuple[Unmatched, ...]
    alphas: Alphas
    dora: str | None = None
    rule: str = "base"
    dialect: str | None = None

    @property
    def path(self) -> str:
        return str(self.file.path)

    @property
    def dialects(self) -> list[Dialect]:
        """Those of its modules, without repeats."""
        return list({m.key.dialect.name: m.key.dialect for m in self.modules}.values())


@contextmanager
def open_source(
    path: str | os.PathLike | TensorFile,
    alpha_from: str | None = None,
    dora: str | None = None,
    rule: str = "base",
    dialect: str | None = None,
) -> Iterator[Source]:
    """The modules of a file, or of PEFT's folder. alpha_from: the one source of alpha to believe.
    dora, rule, dialect: kept for `read_module`.

    Raises FileFormatError where two keys are the same factor of a module, LycorisError for a dora,
    rule or dialect that there is not.
    """
    for what, value, known in (
        ("dora", dora, (None, *AXES)),
        ("rule", rule, RULES),
        ("dialect", dialect, (None, *READINGS)),
    ):
        if value not in known:
            names = ", ".join(name for name in known if name is not None)
            raise LycorisError(f"{what} is {value!r}, expected one of {names}")
    beside = None
    if not isinstance(path, TensorFile):
        path = Path(path)
        if path.is_dir():
            path = _in_folder(path)
        beside = path.parent / CONFIGURATION
    with nullcontext(path) if isinstance(path, TensorFile) else open_file(path) as file:
        modules, unread_keys = _modules(file)
        configuration = None
        # Beside a file of another dialect it is about another file.
        peft = any(module.key.dialect.alpha == "configuration" for module in modules)
        if peft and beside is not None and beside.exists():
            values = json_object(beside.read_bytes(), f"{beside}:")
            configuration = Configuration(values, str(beside))
            check_options(configuration)
        alphas = Alphas(file.metadata, configuration, alpha_from)
        yield Source(file, tuple(modules), tuple(unread_keys), alphas, dora, rule, dialect)


def files_read(
    adapter: str | os.PathLike, base: str | os.PathLike | None = None
) -> list[str | os.PathLike]:
    """The files that an adapter, and the checkpoint it is for, are read from."""
    path = Path(adapter)
    files: list[str | os.PathLike] = [_in_folder(path) if path.is_dir() else path]
    if base is not None:
        with open_checkpoint(base) as file:
            files += file.paths
    return files


def _modules(file: TensorFile) -> tuple[list[Module], list[Unmatched]]:
    found: dict[str, dict[str, str]] = {}
    first: dict[str, Key] = {}
    unmatched = []
    for name in sorted(file):
        key = parse_key(name)
        if key is None:
            unmatched.append(Unmatched(name, unread(name)))
            continue
        keys = found.setdefault(key.module, {})
        if key.suffix in keys:
            raise FileFormatError(
                f"{file.path}: {keys[key.suffix]!r} and {name!r} are both {key.suffix} of module "
                f"{key.module!r}: remove one"
            )
        keys[key.suffix] = name
        # alpha is spelled alike in all dialects: a factor tells more.
        if key.module not in first or first[key.module].suffix == "alpha":
            first[key.module] = key
    return [Module(first[name], keys) for name, keys in found.items()], unmatched


def _in_folder(folder: Path) -> Path:
    """The file of PEFT's folder. Raises FileFormatError if it holds none."""
    if (folder / PEFT_FILE).exists():
        return folder / PEFT_FILE
    pickled = folder / "adapter_model.bin"
    more = f"; {pickled.name} is a pickle: save it again with safe_serialization=True"
    raise FileFormatError(
        f"{folder}: is a folder without {PEFT_FILE}, in which PEFT keeps an adapter"
        f"{more if pickled.exists() else ''}"
    )
