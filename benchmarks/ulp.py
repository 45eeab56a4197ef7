"""Errors in units of the last place of bf16. Needs NumPy alone, so that the peers' processes share
it.
"""

from __future__ import annotations

import sys

import numpy as np


def ulp(value, reference) -> dict[str, float]:
    """{'max', 'rms'} of |value - reference| in units of the last place of bf16 at the reference.

    The unit is taken at least at the reference's root mean square: where a sum cancels, its
    rounding is that of the terms. One rounding alone gives 0.5 at most and 0.2 to 0.29 rms.
    NumPy or CuPy arrays, the reference f64.
    """
    xp = np if isinstance(reference, np.ndarray) else sys.modules["cupy"]
    size = xp.maximum(xp.abs(reference), xp.sqrt((reference**2).mean()))
    unit = 2.0 ** (xp.floor(xp.log2(xp.maximum(size, 1e-300))) - 7)
    error = xp.abs(f64(value) - reference) / unit
    return {"max": float(error.max()), "rms": float(xp.sqrt((error**2).mean()))}


def f64(a):
    """The same values in f64.  a: bf16, f32 or f64."""
    if a.dtype.itemsize == 2:  # bf16 is the upper half of an f32; no library has to know it
        a = (a.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return a.astype(np.float64)


def worst(errors) -> dict[str, float]:
    """The largest of several such errors."""
    errors = list(errors)
    return {key: max(e[key] for e in errors) for key in ("max", "rms")}
