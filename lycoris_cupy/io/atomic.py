"""Files and folders that take their place whole or not at all: written beside, flushed, renamed;
and never in the place of what they are made of.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..errors import FileFormatError


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A new file beside `path` that takes its place when the block ends well, and is gone when it
    does not.

    A crash, a full disk or a kill leaves the old file whole, or no file. Raises OSError before the
    block where it must.
    """
    target = Path(os.path.realpath(path))  # a link goes on pointing to the file
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "cannot be written: is a directory", str(path))
    beside = target.with_name(f".lycoris-{secrets.token_hex(6)}.tmp")
    try:
        handle = open(beside, "xb", buffering=0)
    except OSError as error:
        raise OSError(error.errno, f"cannot be written: {error.strerror}", str(path)) from None
    try:
        with handle:
            yield handle
            os.fsync(handle.fileno())
        if target.exists():
            shutil.copymode(target, beside)
        os.replace(beside, target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    flush_folder(target.parent)


@contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A folder beside `path` that gets its name when the block ends well, and is gone when it does
    not.

    There must be nothing at `path`, or an empty folder: no system replaces a full one in one step.
    The files in it are flushed here. Raises OSError before the block where it must.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(
            errno.EEXIST,
            "is there already, and several files cannot be replaced in one step: choose a new name",
            str(path),
        )
    beside = target.with_name(f".lycoris-{secrets.token_hex(6)}.tmp")
    try:
        beside.mkdir()
    except OSError as error:
        raise OSError(error.errno, f"cannot be written: {error.strerror}", str(path)) from None
    try:
        yield beside
        for file in beside.iterdir():
            with open(file, "rb+") as handle:
                os.fsync(handle.fileno())
        flush_folder(beside)
        if os.name != "posix" and target.exists():
            target.rmdir()
        beside.rename(target)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    flush_folder(target.parent)


def require_place(path: str | os.PathLike) -> None:
    """Raise OSError if there is no folder for `path` to be in: before any work is done."""
    parent = Path(os.path.realpath(path)).parent
    if not parent.is_dir():
        code = errno.ENOTDIR if parent.exists() else errno.ENOENT
        raise OSError(code, f"cannot be written: {os.strerror(code)}", str(path))


def require_other(path: str | os.PathLike, sources: Iterable[str | os.PathLike]) -> None:
    """Raise FileFormatError if `path` is one of the files that are read for it."""
    if not os.path.exists(path):
        return
    for source in sources:
        if os.path.exists(source) and os.path.samefile(source, path):
            raise FileFormatError(f"{source}: the result would overwrite it; choose another output")


def flush_folder(path: Path) -> None:
    """A new name in a folder is safe only when the folder is on the disk."""
    if os.name == "posix":
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
