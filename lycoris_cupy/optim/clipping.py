"""Clipping of gradients by their global norm, without a look at it."""

from __future__ import annotations

import numpy as np

from ..arrays import Array, module_of, wide_dtype
from ..errors import LycorisError
from .nested import Nested, Own, items, mapped


def clip_by_global_norm(grads: Nested, bound: float) -> tuple[Own, Array]:
    """(gradients times min(1, bound / norm), norm) where norm is that of all values together.

    The gradients are new arrays in the wide dtype; the norm, (1,), is of before, and stays on the
    device. A NaN anywhere makes all of them NaN.  Pascanu et al. 2013.
    """
    if not bound > 0:
        raise LycorisError(f"the bound of the norm is {bound}, expected a number above 0")
    bound = float(bound)
    wide = mapped(lambda g: g.astype(wide_dtype(g.dtype), copy=False), grads)
    arrays = [g for _, _, g in items(wide)]
    if not arrays:
        return wide, np.zeros(1, np.float32)
    xp = module_of(arrays[0])
    total = xp.zeros(1, arrays[0].dtype)
    for g in arrays:
        total += (g * g).sum()
    norm = xp.sqrt(total)
    factor = bound / xp.maximum(norm, bound)
    return mapped(lambda g: g * factor.astype(g.dtype, copy=False), wide), norm
