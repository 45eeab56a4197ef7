"""What a row of the tables of tests says of a primitive."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

FACTOR = np.array([0.703125])  # exact in bf16
# Of w1 (OL, IM) and w2 (taps, IN, OK); of taps, inputs, rank, outputs.
KRONECKER = (
    ("odd", (3, 2), (5, 7, 4)),
    ("linear", (5, 4), (1, 6, 8)),
    ("one", (1, 1), (1, 1, 1)),
    ("tall", (17, 1), (4, 1, 37)),
    ("empty", (3, 2), (1, 0, 5)),
    ("large", (8, 6), (9, 40, 48)),
)
LOW_RANK = (
    ("odd", 5, 7, 3, 11),
    ("linear", 1, 24, 4, 40),
    ("one", 1, 1, 1, 1),
    ("rank 0", 2, 3, 0, 5),
    ("large", 9, 70, 17, 131),
    ("too large for one launch", 9, 96, 20, 160),
)


@dataclass(frozen=True)
class Row:
    """call: on arrays of any device. formula: on f64. args: shapes, or arrays. wide: positions of
    arguments in the wide dtype.
    """

    primitive: str
    name: str
    call: Callable
    formula: Callable
    args: tuple
    depth: int = 1
    wide: tuple[int, ...] = ()
    fixed: tuple[int, ...] = ()  # arguments that are constants of the tape
    roundings: float = 1.0
    gradient_roundings: float = 1.0
    linear: bool = True  # a sum of products, whose magnitude is the formula over absolute values
    size: Callable | None = None  # the magnitude of any other: what its rounding errors scale with
    bend: float = 0.0  # third derivative over magnitude, for what a central difference leaves out
    dtypes: tuple[str, ...] = ("bf16", "f32", "f64")

    @property
    def id(self) -> str:
        return f"{self.primitive}-{self.name}"

    def draw(self, seed: int = 0) -> list[np.ndarray]:
        """The arguments in f64, exact in bf16."""
        from lycoris_cupy import bf16

        rng = np.random.default_rng([seed, *self.id.encode()])
        out = []
        for arg in self.args:
            value = (
                rng.standard_normal(arg) if isinstance(arg, tuple) else np.asarray(arg, np.float64)
            )
            out.append(value.astype(bf16).astype(np.float64))
        return out
