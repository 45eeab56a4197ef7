"""Tolerances, computed from what a computation does, never chosen.

A value is a sum of `depth` terms kept in the wide dtype and rounded once: with u = 2^-24 (f32) or
2^-53 (f64), |error| <= half an ulp of the result + depth * u * (the same sum over absolute values),
to first order.
"""

import numpy as np

from lycoris_cupy import bf16

UNIT = {"bf16": 2.0**-24, "f32": 2.0**-24, "f64": 2.0**-53}
ROUNDING = {"bf16": 2.0**-8, "f32": 2.0**-24, "f64": 2.0**-53}  # half an ulp, relative


def name_of(dtype) -> str:
    return "bf16" if dtype == bf16 else {4: "f32", 8: "f64"}[np.dtype(dtype).itemsize]


def bound(reference, magnitude, depth: int, dtype, roundings: float = 1.0):
    """Elementwise bound on |value - reference|.

    magnitude: the same formula over absolute values. depth: terms in the longest sum, plus the
    operations around it. roundings: how many times a result or an intermediate of this magnitude is
    rounded to dtype; the first one counts against the result itself, the others against
    `magnitude`, since an intermediate may cancel later.
    """
    name = name_of(dtype)
    extra = max(roundings - 1.0, 0.0) * ROUNDING[name]
    tiny = np.finfo(np.float32).tiny if name != "f64" else np.finfo(np.float64).tiny
    return (
        ROUNDING[name] * np.abs(reference)
        + (depth + 4) * UNIT[name] * magnitude
        + extra * magnitude
        + tiny
    )


def assert_within(value, reference, limit, what: str = "") -> None:
    """Fail with the worst offender unless |value - reference| <= limit everywhere; NaN fails."""
    value, reference = np.asarray(value, np.float64), np.asarray(reference, np.float64)
    assert value.shape == reference.shape, (
        f"{what}: shape {value.shape}, expected {reference.shape}"
    )
    error = np.abs(value - reference)
    bad = ~(error <= limit)
    if bad.any():
        at = np.unravel_index(
            np.argmax(np.where(np.isnan(error), np.inf, error / np.maximum(limit, 1e-300))),
            error.shape,
        )
        raise AssertionError(
            f"{what}: {bad.sum()} of {bad.size} out of bounds; at {tuple(map(int, at))} got "
            f"{value[at]!r}, "
            f"expected {reference[at]!r}, error {error[at]:.3g}, bound "
            f"{np.broadcast_to(limit, error.shape)[at]:.3g}"
        )
