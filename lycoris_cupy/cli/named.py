"""Functions that a text names: 'module:function', or 'file.py:function'."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import LycorisError, MatchError


def function_named(named: str, folder: Path, where: str) -> Callable:
    """folder: where files, and modules that are not installed, are looked for. where: what names
    it, for errors, which are LycorisError or MatchError.
    """
    module_name, colon, name = named.rpartition(":")
    if not colon or not module_name or not name.isidentifier():
        raise LycorisError(
            f"{where} is {named!r}, expected 'module:function' or 'file.py:function'"
        )
    try:
        module = _module(module_name, folder, where)
    except (ImportError, SyntaxError) as error:
        raise LycorisError(f"{where}: cannot import {module_name}: {error}") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise MatchError(f"{where}: {module_name} has no function {name!r}")
    return function


def called(function: Callable, options: Mapping[str, Any], where: str) -> Any:
    """What the function returns. Raises LycorisError, not what it may raise itself, if it does not
    take these arguments.
    """
    try:
        inspect.signature(function).bind(**options)
    except TypeError as error:
        raise LycorisError(f"{where}: {function.__name__}: {error}: see options") from None
    return function(**options)


def _module(name: str, folder: Path, where: str):
    if not name.endswith(".py"):
        sys.path.insert(0, str(folder.resolve()))
        try:
            return importlib.import_module(name)
        finally:
            sys.path.pop(0)
    path = folder / name
    if not path.is_file():
        raise LycorisError(f"{where}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
