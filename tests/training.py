"""A small network, its teacher and their batches, for the tests of training."""

from __future__ import annotations

import numpy as np

from lycoris_cupy import Conv2d, Engine, Linear
from lycoris_cupy.arrays import f32, module_of
from lycoris_cupy.train import fit
from tests.arrays import host


def student(device="cpu", dtype="f32", algorithm="locon", **options):
    """An engine with an adapter 'a' that changes nothing yet."""
    rng = np.random.default_rng(0)
    layers = {
        "conv": Conv2d(rng.standard_normal((3, 3, 4, 6), np.float32) / 6, padding=1),
        "head": Linear(rng.standard_normal((6, 5), np.float32) / 3, np.zeros(5, np.float32)),
    }
    engine = Engine(layers, device=device, dtype=dtype)
    engine.add("a", algorithm, **{"rank": 2, **options})
    return engine


def teacher():
    """The same network after a change of rank two at each layer."""
    engine = student(rank=2)
    rng = np.random.default_rng(1)
    values = {
        layer: {n: rng.standard_normal(p.shape) / 4 for n, p in factors.items()}
        for layer, factors in engine.parameters("a").items()
    }
    engine.set_parameters("a", values)
    return engine


TEACHER = teacher()


def batch(step, count=4):
    """Inputs of that step, and what the teacher makes of them."""
    x = np.random.default_rng([2, step]).standard_normal((count, 5, 4, 4), np.float32)
    return (x,), (TEACHER.forward(x),)


def squared_error(y, target):
    """The mean squared error and its gradient."""
    difference = y.astype(f32) - target
    return module_of(y).mean(difference * difference), difference * (2 / difference.size)


def train(engine, optimizer, steps, batches=batch, loss=squared_error, **options):
    """`fit` of the adapter 'a', in silence."""
    options = {"progress": False, **options}
    return fit(engine, batches, loss, name="a", optimizer=optimizer, steps=steps, **options)


def factors(engine, name="a"):
    """The factors as one vector on the host."""
    return np.concatenate(
        [host(p).ravel() for parts in engine.parameters(name).values() for p in parts.values()]
    )
