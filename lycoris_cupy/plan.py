"""Which way a product goes on a GPU: times estimated from operations and bytes, by rates measured
on an H100.

Nothing is timed when it runs. The rates are those of one chip; what is compared are ways on the
same chip, so on another of the same kind the choice is the same unless two ways are within some per
cent. `recording` shows what was chosen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

# H100 SXM, bf16, L2 flushed; benchmarks/NOTES.md has the measurements. CLOCK and BEGIN are set by
# 24 extended products in profiles of whole layers, LIBRARY by the bare linear layers.
LIBRARY = 780e12  # operations a second of cuBLASLt on 3072 to 14336 a side
PORTABLE = 280e12  # of the project's mma.sync convolution
CLOCK = 1.5e9  # cycles a second of the extended product, by its own count of cycles
MEMORY = 2.6e12  # bytes a second, read and written by kernels that only move
READ = 3.0e12  # bytes a second that can be read alone: the bandwidth of a large copy
L2 = 5e12  # bytes a second, read again by tap after tap
LAUNCH = 4e-6  # seconds that one more kernel takes in a graph
# Seconds that the library takes to add up parts of a product with few columns. Estimated; at 64 to
# 2048 rows it took 1 to 2 us longer than the project's own kernel.
PARTS = 4e-6
BEGIN = 5e-6  # seconds of a launch of the project's own products, until all of its blocks multiply
SOON = 3.2e-6  # likewise of the products of few positions, as measured at one position
# Bytes a second that a multiprocessor copies in a product of few positions: 48 KiB of w or more
# under way, and about 1 us until they are there (estimated). And bytes of sums a second that a
# block is sent by the others of its cluster: at 64 positions half as many columns took 1.3 us less.
BLOCK = 60e9
SENT = 10e9


@dataclass(frozen=True)
class Choice:
    """What was chosen for one product, and the estimated microseconds of each way that was
    possible."""

    what: str
    way: str
    times: dict[str, float]
    operations: int
    bytes: int

    def __str__(self) -> str:
        rest = ", ".join(f"{way} {us:.0f} us" for way, us in self.times.items() if way != self.way)
        own = f" (about {self.times[self.way]:.0f} us{'; ' * bool(rest)}{rest})" * bool(self.times)
        size = f"{self.operations / 1e9:.2f} GFLOP, {self.bytes / 1e6:.1f} MB"
        return f"{self.what}: {self.way}{own}, {size}"


_recorded: ContextVar[list[Choice] | None] = ContextVar("recorded", default=None)


@contextlib.contextmanager
def recording() -> Iterator[list[Choice]]:
    """The choices that are made inside, in order."""
    token = _recorded.set([])
    try:
        kept = _recorded.get()
        assert kept is not None
        yield kept
    finally:
        _recorded.reset(token)


def choose(what: str, seconds: dict[str, float], operations: int, moved: int) -> str:
    """The way with the least estimated time; the first of those named where they are equal."""
    way = min(seconds, key=seconds.__getitem__)
    kept = _recorded.get()
    if kept is not None:
        times = {name: s * 1e6 for name, s in seconds.items()}
        kept.append(Choice(what, way, times, operations, moved))
    return way


def extended(cycles: float, moved: int) -> float:
    """Seconds of the extended product, which moves so many bytes."""
    return max(cycles / CLOCK, moved / MEMORY) + BEGIN


def skinny(moved: int, copied: int, added: int = 0) -> float:
    """Seconds of a product of few positions that reads and writes so many bytes, of which the
    busiest multiprocessor copies `copied`, and at the end is sent `added` of sums.
    """
    return max(moved / MEMORY, copied / BLOCK) + added / SENT + SOON


def library(operations: int) -> float:
    """Seconds of a dense product by cuBLASLt."""
    return operations / LIBRARY + LAUNCH


def portable(operations: float) -> float:
    """Seconds of a convolution by mma.sync."""
    return operations / PORTABLE + BEGIN


def moving(count: int) -> float:
    """Seconds of a kernel that reads and writes so many bytes."""
    return count / MEMORY + LAUNCH


def rereading(count: int) -> float:
    """Seconds of a convolution that reads so many bytes, nearly all of them from L2."""
    return count / L2 + BEGIN


def apart(result_bytes: int, x2_bytes: int, operations: int) -> float:
    """Seconds that a change costs which is written by itself, from an x2 of so many bytes, and read
    again by the layer's own product.
    """
    return max(moving(x2_bytes + result_bytes), library(operations)) + result_bytes / MEMORY
