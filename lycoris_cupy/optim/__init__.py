"""Optimizers on an adapter's factors and what goes with them, on arrays of NumPy and of CuPy alike.

    optimizer = AdamW(engine.parameters("style"), lr=cosine(1e-3, steps=1000, warmup=50), clip=1.0)
    optimizer.step(grads["style"], out=engine.parameters("style"))

Everything that a captured step runs works on arrays alone and never looks at a value.
"""

from ..philox import philox4x32, random_bits
from .accumulation import Accumulator
from .adamw import AdamW
from .average import Average
from .base import Optimizer
from .lion import Lion
from .max_norm import NormReport, apply_max_norm
from .prodigy import Prodigy
from .rates import rate_factors
from .rounding import round_stochastically
from .schedule_free import ScheduleFreeAdamW
from .schedules import constant, cosine, linear
from .sgd import SGD

__all__ = [
    "SGD",
    "Accumulator",
    "AdamW",
    "Average",
    "Lion",
    "NormReport",
    "Optimizer",
    "Prodigy",
    "ScheduleFreeAdamW",
    "apply_max_norm",
    "constant",
    "cosine",
    "linear",
    "philox4x32",
    "random_bits",
    "rate_factors",
    "round_stochastically",
]
