"""Arrays for tests: drawn so that every dtype holds them, and brought back to the host."""

import numpy as np

from lycoris_cupy import bf16, to_device


def drawn(rng, *shape, size=1.0):
    """Normal values of this size in f64, exact in bf16."""
    return (rng.standard_normal(shape) * size).astype(bf16).astype(np.float64)


def on_gpu(*arrays):
    """bf16 on the GPU; None stays."""
    return [None if a is None else to_device(a.astype(bf16), "cuda:0") for a in arrays]


def host(array):
    """An array of any device in f64."""
    return np.asarray(to_device(array, "cpu"), np.float64)
