"""The normal distribution function on NumPy, which has no erf: a Chebyshev series of what is left
of it once its exponential is taken out.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numpy.polynomial.chebyshev import cheb2poly, chebinterpolate

_FAR = 26.0  # exp(z^2) and erfc(z) are both finite and normal in f64 up to here, their product 0.02


def normal_below(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the share of a standard normal distribution below x, its density at x). f32 or f64.

    For z = |x| / sqrt(2): erfc(z) = exp(-z^2) q(t) with t = 1 / (1 + z / 2). q is smooth over t
    in [0, 1], so its series gains a digit every one or two terms. Both tails keep their digits.
    """
    dtype = x.dtype.type
    bell = np.exp(np.square(np.clip(x, -50, 50)) * dtype(-0.5))
    z = np.minimum(np.abs(x) * dtype(math.sqrt(0.5)), dtype(_FAR))
    # The smallest t is mapped to -1 and the largest, 1, to 1.
    place = (dtype(2) / (dtype(1) + z * dtype(0.5)) - dtype(1 + _least())) / dtype(1 - _least())
    series = _series(x.dtype.itemsize)
    tail = np.full_like(x, series[-1])
    for coefficient in series[-2::-1]:
        tail *= place
        tail += coefficient
    tail *= bell * dtype(0.5)
    return np.where(x < 0, tail, 1 - tail), bell * dtype(1 / math.sqrt(2 * math.pi))


def _least() -> float:
    return 1 / (1 + _FAR / 2)


@functools.cache
def _series(itemsize: int) -> np.ndarray:
    """The coefficients of its powers, from math.erfc at the Chebyshev nodes; as many as the dtype
    has use for.
    """
    least = _least()

    def scaled(places) -> Any:
        z = [2 / (least + (1 - least) * (p + 1) / 2) - 2 for p in places]
        return np.array([math.exp(v * v) * math.erfc(v) for v in z])

    series = cheb2poly(chebinterpolate(scaled, 24 if itemsize == 8 else 11))
    return series.astype(np.float64 if itemsize == 8 else np.float32)
