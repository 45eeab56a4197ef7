"""Training of one adapter: `lycoris_cupy.train.fit` with the mean squared error and AdamW."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..engine import Engine
from ..losses import mse
from ..optim import AdamW, cosine
from ..train import fit
from .photographs import batch

PATCHES, PATCH = 4, 32  # of low resolution a step: 4096 positions
WARM_UP = 10  # steps in which the rate rises, of 40 and more
LOG_EVERY = 5


@dataclass(frozen=True)
class Method:
    """What to add, an algorithm of `Engine.add` with its options, and AdamW's greatest rate."""

    algorithm: str
    options: dict
    rate: float


METHODS = {
    "LoKr": Method("lokr", {"rank": 16, "factor": 4}, 6e-3),
    "LoCon": Method("locon", {"rank": 8}, 6e-3),
}


def train(
    engine: Engine, name: str, method: Method, photographs: list[np.ndarray], steps: int, seed: int
) -> float:
    """Add an adapter `name` to every layer and train it; returns the median ms of a step.

    A step is forward, loss, backward, AdamW and the copy to bf16; batches are made before.
    """
    engine.add(name, method.algorithm, seed=seed, **method.options)
    rng = np.random.default_rng([seed, 2])
    batches = [batch(photographs, PATCHES, PATCH, rng) for _ in range(steps)]
    result = fit(
        engine,
        lambda step: ((batches[step][0],), (batches[step][1],)),
        mse,
        name=name,
        optimizer=AdamW(
            engine.parameters(name),
            cosine(method.rate, steps, min(WARM_UP, steps // 4)),
            weight_decay=0.0,
        ),
        steps=steps,
        log_every=LOG_EVERY,
    )
    # A reading of the log waits for the device, so the time between two is that of their steps.
    at = [(0, 0.0), *((line["step"], line["seconds"]) for line in result.lines)]
    spent, made = np.diff([seconds for _, seconds in at]), np.diff([step for step, _ in at])
    return 1000 * float(np.median(spent / made))
