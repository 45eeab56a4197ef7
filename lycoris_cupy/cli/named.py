"""Functions that a text names: 'module:function', or 'file.py:function'."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
import traceback
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
    """What the function returns. Raises LycorisError if it does not take these arguments, or fails
    itself.
    """
    try:
        inspect.signature(function).bind(**options)
    except TypeError as error:
        raise LycorisError(f"{where}: {function.__name__}: {error}: see options") from None
    return guarded(function, where)(**options)


def guarded(function: Callable, where: str) -> Callable:
    """The function; what it raises of other kinds than ours becomes LycorisError, with its place.

    Whoever wrote the function reads one line with the place, and not our own frames.
    """

    @functools.wraps(function)
    def run(*args: Any, **options: Any) -> Any:
        try:
            return function(*args, **options)
        except (LycorisError, OSError):
            raise
        except Exception as error:
            own = getattr(getattr(function, "__code__", None), "co_filename", None)
            frames = traceback.extract_tb(error.__traceback__)
            frame = next((f for f in reversed(frames) if f.filename == own), frames[-1])
            place = f"{frame.filename}, line {frame.lineno}"
            raise LycorisError(f"{where}: {place}: {type(error).__name__}: {error}") from error

    return run


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
