"""First values of factors, f32 and in Flame layout."""

from __future__ import annotations

import math

import numpy as np


def uniform(rng: np.random.Generator, shape: tuple[int, ...], fan_in: int) -> np.ndarray:
    """f32, uniform within +-1 / sqrt(fan_in): Kaiming-uniform with a = sqrt(5), the reference's
    start.
    """
    bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
    return rng.uniform(-bound, bound, shape).astype(np.float32)


def normal(rng: np.random.Generator, shape: tuple[int, ...], deviation: float) -> np.ndarray:
    """f32, normal with mean 0."""
    return (rng.standard_normal(shape) * deviation).astype(np.float32)


def zeros(shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros(shape, np.float32)
