"""What is trained on and what is tested: made on the host before any clock runs, the same arrays
for every side.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from lycoris_cupy.arrays import bf16
from lycoris_cupy.demo.photographs import batch, psnr, training_photographs
from lycoris_cupy.demo.upscaler import upscale
from lycoris_cupy.optim import cosine
from lycoris_cupy.optim.schedules import Schedule

VALIDATED = 16  # batches on which the final loss is taken: the same whatever the seed
VALIDATION_SEED = 10**6


@dataclass(frozen=True)
class Task:
    """What a run trains: patches of `patch` x `patch` in low resolution, `patches` a step, from a
    list of `batches` that is gone through again and again; AdamW's rate rises for `warmup` steps
    and falls to 0 along a cosine. rate_factor: what every method's rate is multiplied by.
    """

    steps: int
    patches: int = 16
    patch: int = 32
    batches: int = 256
    rate_factor: float = 1.0

    @property
    def warmup(self) -> int:
        return min(50, self.steps // 4)

    def schedule(self, rate: float) -> Schedule:
        """Step -> rate, for a method whose greatest is this one."""
        return cosine(rate * self.rate_factor, self.steps, self.warmup)

    def training(self, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(damaged, original) pairs: (P, S, S, 3) bf16, so that no side rounds what another keeps,
        and (P, 2S, 2S, 3) f32.
        """
        return _pairs(self.patches, self.patch, (seed, 2), min(self.batches, self.steps))

    def validation(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Pairs from the training photographs that no step sees."""
        return _pairs(self.patches, self.patch, (VALIDATION_SEED, 2), VALIDATED)


@functools.cache
def _pairs(patches: int, patch: int, seed: tuple[int, ...], count: int) -> list:
    rng, photographs = np.random.default_rng(seed), training_photographs()
    pairs = (batch(photographs, patches, patch, rng) for _ in range(count))
    return [(low.astype(bf16), original) for low, original in pairs]


def decibels(network, pictures: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Photograph -> PSNR, dB. network: anything with `forward((1, H, W, 3)) -> (1, 2H, 2W, 3)`."""
    return {
        name: psnr(upscale(network, low), original) for name, (low, original) in pictures.items()
    }


def mean_squared_error(network, pairs: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Over all pairs, in f64."""
    total = 0.0
    for low, original in pairs:
        difference = np.asarray(network.forward(low), np.float64) - original
        total += float((difference**2).mean())
    return total / len(pairs)
