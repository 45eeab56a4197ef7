"""Conditions: what a forward is given beside its inputs, for the algorithms that read it.

noise_level   T-LoRA: an array of one level a sample, or one for all, 0 clean to 1 pure noise
ranks         DyLoRA: (first, last), the block of ranks that is trained, see `draw_block`
step          the number of a training step, a whole number or (1,) uint32: with it, and only with
              it, adapters drop what their dropout says. Taken also where none has any
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .arrays import Array, to_device, wide_dtype
from .attachment import Attachment
from .errors import LycorisError, ShapeError


def checked(
    conditions: Mapping[str, Any], attachments: Mapping[str, Attachment], device: str, dtype
) -> dict[str, Any]:
    """The conditions as the attached algorithms take them, in an engine of this device and dtype.

    Raises LycorisError for one that none reads, or that is out of range; values on a GPU are not
    looked at.
    """
    if not conditions:  # at each replay of a graph
        return {}
    read = {
        name
        for attached in attachments.values()
        for kind in set(map(type, attached.adapters.values()))
        for name in kind.conditions
    }
    out: dict[str, Any] = {}
    for name, value in conditions.items():
        if name == "step":
            out[name] = _step(value, device)
            continue
        if name not in read:
            raise LycorisError(
                f"forward was given {name}, which no attached adapter reads "
                f"(they read: {', '.join(sorted(read)) or 'nothing'})"
            )
        if name == "noise_level":
            out[name] = _levels(value, device, wide_dtype(dtype))
        elif len(value) != 2 or not all(isinstance(v, (int, np.integer)) for v in value):
            raise LycorisError(f"{name} is {value!r}, expected two whole numbers (first, last)")
        else:
            out[name] = tuple(int(v) for v in value)
    return out


def _step(value: Any, device: str) -> Array:
    """(1,) uint32 on the device; an array that lies there already is taken as it is."""
    array: Any = value
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        if not 0 <= value < 2**32:
            raise LycorisError(f"step is {value}, expected 0 to 2^32 - 1")
        array = np.array([value], np.uint32)
    if getattr(array, "dtype", None) != np.uint32 or tuple(array.shape) != (1,):
        raise LycorisError(
            f"step is {value!r}, expected a whole number, or an array of shape (1,) and uint32"
        )
    return to_device(array, device)


def _levels(value: Any, device: str, dtype: np.dtype) -> Array:
    if not hasattr(value, "dtype"):
        value = np.asarray(value, np.float64)
    if value.ndim > 1:
        raise ShapeError(f"noise_level has shape {tuple(value.shape)}, expected (N,) or one number")
    if isinstance(value, np.ndarray):
        wide = value.astype(np.float64)
        if not ((wide >= 0) & (wide <= 1)).all():
            raise LycorisError(
                f"noise_level reaches from {wide.min():g} to {wide.max():g}, expected 0 (clean) to "
                "1 (pure noise): divide the timestep by the number of timesteps"
            )
    return to_device(value.reshape(-1), device).astype(dtype)
