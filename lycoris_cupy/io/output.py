"""Writing much: what no one changes is copied by the system, what is computed is computed ahead by
threads, and errors say how far it got.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO

_CHUNK = 16 << 20  # bytes a write: progress and Ctrl-C are noticed in between
_AHEAD = 64 << 20  # bytes of results that wait for their turn, at most one result more
# What says that this pair of files, or this system, cannot copy inside the kernel.
_CANNOT = (errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)


class Output:
    """An unbuffered file that is written from its beginning to a known end."""

    def __init__(
        self, handle: BinaryIO, total: int, progress: Callable[[int, int], None] | None = None
    ):
        self._handle, self._total, self._progress = handle, total, progress
        self._done = 0
        self._copies = hasattr(os, "copy_file_range")

    def write(self, data: Any) -> None:
        """All of these bytes, or an OSError that says how many of the file are done."""
        left = memoryview(data)
        while left:
            left = left[self._counted(self._handle.write, left[:_CHUNK]) :]

    def copy(self, source: BinaryIO, offset: int, count: int) -> bool:
        """Have the system copy bytes of another file; False if it cannot, and none were."""
        end = offset + count
        while self._copies and offset < end:
            try:
                size = min(_CHUNK, end - offset)
                offset += self._counted(
                    os.copy_file_range, source.fileno(), self._handle.fileno(), size, offset
                )
            except OSError as error:
                if error.errno not in _CANNOT or offset != end - count:
                    raise
                self._copies = False
        return offset == end and self._copies

    def _counted(self, step: Callable[..., int], *arguments: Any) -> int:
        try:
            count = step(*arguments)
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot be written, {self._done} of {self._total} bytes done: {error.strerror}",
                self._handle.name,
            ) from None
        if not count:  # the source ends early: it was cut while we read it
            raise OSError(
                errno.EIO,
                f"cannot be written, {self._done} of {self._total} bytes done: the source ended",
                self._handle.name,
            )
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)
        return count


def require_room(folder: str | os.PathLike, total: int) -> None:
    """Raise OSError unless the disk of this folder has as many free bytes."""
    free = shutil.disk_usage(folder or ".").free
    if free < total:
        raise OSError(
            errno.ENOSPC,
            f"cannot be written: {total} bytes are needed, {free} are free",
            os.fspath(folder),
        )


def made_ahead(
    makers: Sequence[Callable[[], Any]], sizes: Sequence[int], workers: int
) -> Iterator[Any]:
    """The results in order, made by threads while earlier ones are used; an error comes in its
    place. sizes: bytes of each result, of which few are held. workers: 0 makes each when asked.
    """
    if not workers:
        for make in makers:
            yield make()
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[tuple[int, Future]] = deque()
        held = begun = 0
        try:
            while begun < len(makers) or waiting:
                while begun < len(makers) and (held < _AHEAD or not waiting):
                    waiting.append((sizes[begun], pool.submit(makers[begun])))
                    held, begun = held + sizes[begun], begun + 1
                size, future = waiting.popleft()
                result = future.result()
                held -= size
                yield result
        finally:
            for _, future in waiting:
                future.cancel()
