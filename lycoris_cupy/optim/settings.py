"""What settings of optimizers are refused."""

from __future__ import annotations

from ..errors import LycorisError


def not_negative(**settings: float) -> None:
    """Raise LycorisError for a setting that is not a finite number of at least 0."""
    for name, value in settings.items():
        if not 0 <= value < float("inf"):
            raise LycorisError(f"{name} is {value}, expected at least 0")


def shares(names: str, values: tuple[float, ...], count: int) -> tuple[float, ...]:
    """Decay rates of running means. Raises LycorisError unless there are `count` in [0, 1)."""
    values = tuple(values)
    if len(values) != count or not all(0 <= value < 1 for value in values):
        words = {1: "a number", 2: "two numbers"}[count]
        shown = values if count > 1 else values[0]
        verb = "are" if count > 1 else "is"
        raise LycorisError(f"{names} {verb} {shown}, expected {words} of at least 0 and below 1")
    return values
