"""What comes from outside becomes arrays of an engine: on its device, in its dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .arrays import Array, is_index, require_float, to_device
from .errors import LycorisError
from .ops.elementwise import cast
from .tape import Var


def inputs_of(given: Sequence[Any], device: str, dtype) -> list[Array]:
    """Inputs of a forward; whole numbers and booleans (tokens, masks) stay what they are."""
    out = []
    for i, x in enumerate(given):
        array = _plain(x, device)
        out.append(array if is_index(array) else _floats(array, f"input {i}", dtype))
    return out


def cotangent_of(given: Any, device: str, dtype) -> Array:
    """dy, in the dtype of y."""
    return _floats(_plain(given, device), "dy", dtype)


def _plain(x: Any, device: str) -> Array:
    if isinstance(x, Var):
        raise LycorisError(
            "the engine makes its own tape: give plain arrays, and use vjp for gradients"
        )
    return to_device(x, device)


def _floats(array: Array, name: str, dtype) -> Array:
    require_float(array, name)
    return cast(array, dtype)
