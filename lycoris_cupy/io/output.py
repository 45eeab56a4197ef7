"""Writing much: pieces of a file at their places, by several threads; what no one changes is copied
by the system; and errors say how far it got.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any, BinaryIO

_CHUNK = 16 << 20  # bytes a write: progress and Ctrl-C are noticed in between
# What says that this pair of files, or this system, cannot copy inside the kernel.
_CANNOT = (errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)


class Output:
    """An unbuffered file of a known size. Threads may write and copy at the same time."""

    def __init__(
        self, handle: BinaryIO, total: int, progress: Callable[[int, int], None] | None = None
    ):
        self._handle, self._total, self._progress = handle, total, progress
        self._done, self._lock = 0, Lock()
        # The system lets one thread at a time write a file, and has the others wait by spinning.
        self._turn = Lock()
        self._copies = hasattr(os, "copy_file_range")

    def write(self, data: Any, offset: int) -> None:
        """All of these bytes, or an OSError that says how many of the file are done."""
        left = memoryview(data)
        while left:
            count = self._counted(self._write_some, left[:_CHUNK], offset)
            left, offset = left[count:], offset + count

    def copy(self, source: BinaryIO, start: int, count: int, offset: int) -> bool:
        """Have the system copy bytes of another file; False if it cannot, and none were."""
        if not self._copies:
            return False
        done = 0
        while done < count:
            size = min(_CHUNK, count - done)
            places = source.fileno(), self._handle.fileno(), size, start + done, offset + done
            try:
                done += self._counted(os.copy_file_range, *places)
            except OSError as error:
                if error.errno not in _CANNOT or done:
                    raise
                self._copies = False
                return False
        return True

    def _write_some(self, data: memoryview, offset: int) -> int:
        if hasattr(os, "pwrite"):
            return os.pwrite(self._handle.fileno(), data, offset)
        self._handle.seek(offset)
        return self._handle.write(data)

    def _counted(self, step: Callable[..., int], *arguments: Any) -> int:
        try:
            with self._turn:
                count = step(*arguments)
        except OSError as error:
            raise OSError(
                error.errno, self._failed(str(error.strerror)), self._handle.name
            ) from None
        if not count:  # the source was cut while we read it
            raise OSError(errno.EIO, self._failed("the source ended"), self._handle.name)
        with self._lock:
            self._done += count
            if self._progress is not None:
                self._progress(self._done, self._total)
        return count

    def _failed(self, why: str) -> str:
        return f"cannot be written, {self._done} of {self._total} bytes done: {why}"


def require_room(folder: str | os.PathLike, total: int) -> None:
    """Raise OSError unless the disk of this folder has as many free bytes."""
    free = shutil.disk_usage(folder or ".").free
    if free < total:
        raise OSError(
            errno.ENOSPC,
            f"cannot be written: {total} bytes are needed, {free} are free",
            os.fspath(folder),
        )


def in_threads(tasks: Iterable[Callable[[], None]], workers: int) -> None:
    """Run them all, begun in order; the first error in their order is raised, and what was not
    begun by then never is. workers: 0 runs them here.
    """
    if not workers:
        for task in tasks:
            task()
        return
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(task) for task in tasks]
        try:
            for future in futures:
                future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            raise
