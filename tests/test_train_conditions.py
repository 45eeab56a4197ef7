"""What adapters read beside inputs, in a captured step and in a whole training: the noise level of T-LoRA,
the ranks of DyLoRA.
"""

import numpy as np
import pytest

import lycoris_cupy as lc
from lycoris_cupy import to_device
from lycoris_cupy.adapters import draw_block
from lycoris_cupy.errors import LycorisError, ShapeError
from lycoris_cupy.losses import mse
from lycoris_cupy.optim import SGD, AdamW
from lycoris_cupy.train import Step, fit


def engine_with(algorithm, device="cpu", **options):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((6, 8), np.float32)
    engine = lc.Engine({"l": lc.Linear.from_torch(weight)}, device=device, dtype="f32")
    engine.add("a", algorithm, rank=4, seed=1, **options)
    factors = engine.parameters("a")["l"]
    moved = {
        n: to_device(p, "cpu") + 0.1 * rng.standard_normal(p.shape, np.float32)
        for n, p in factors.items()
    }
    engine.set_parameters("a", {"l": moved})
    return engine


def batch(step, count=4):
    rng = np.random.default_rng([1, step])
    return (rng.standard_normal((count, 8), np.float32),), (
        rng.standard_normal((count, 6), np.float32),
    )


def host(engine):
    return {n: np.array(to_device(p, "cpu")) for n, p in engine.parameters("a")["l"].items()}


def plain(engine, optimizer, inputs, targets, **conditions):
    """A step by the engine's vjp."""
    y, pullback = engine.vjp(*inputs, **conditions)
    _, dy = mse(y, *(to_device(t, engine.device) for t in targets))
    _, grads = pullback(dy)
    engine.set_parameters("a", optimizer.step(grads["a"]))


def test_a_noise_level_is_given_anew_at_every_step(device):
    one, other = engine_with("tlora", device), engine_with("tlora", device)
    optimizers = [SGD(e.parameters("a"), lr=0.1) for e in (one, other)]
    (x,), (target,) = batch(0)
    levels = [np.full(4, 0.9), np.array([0.0, 0.3, 0.6, 1.0])]
    step = one.capture_step("a", mse, optimizers[0], x, targets=[target], noise_level=levels[0])
    for level in levels:
        step(x, target, noise_level=level)
        plain(other, optimizers[1], (x,), (target,), noise_level=level)
    found, expected = host(one), host(other)
    assert all(np.allclose(found[n], expected[n], rtol=1e-5, atol=1e-6) for n in expected)


def test_conditions_of_a_captured_step_are_checked():
    engine = engine_with("tlora")
    optimizer = SGD(engine.parameters("a"), lr=0.1)
    (x,), (target,) = batch(0)
    with pytest.raises(LycorisError, match="the step is the optimizer's own"):
        engine.capture_step("a", mse, optimizer, x, targets=[target], step=3)
    with pytest.raises(LycorisError, match="no attached adapter reads"):
        engine.capture_step("a", mse, optimizer, x, targets=[target], ranks=(0, 1))
    step = engine.capture_step("a", mse, optimizer, x, targets=[target], noise_level=0.5)
    with pytest.raises(LycorisError, match="captured with noise_level, called with none"):
        step(x, target)
    with pytest.raises(LycorisError, match="0 .clean. to 1"):
        step(x, target, noise_level=np.array([2.0]))


def test_a_step_trains_the_ranks_that_it_is_told(device):
    """Each block has a graph of its own; the others' columns stay as they were."""
    engine = engine_with("dylora", device)
    step = Step(engine, "a", mse, SGD(engine.parameters("a"), lr=0.1, momentum=0.0))
    for block in ((0, 2), (2, 4), (0, 2)):
        before = host(engine)
        step(*batch(0), {"ranks": block})
        after = host(engine)
        changed = {
            "down": np.any(before["down"] != after["down"], axis=0),
            "up": np.any(before["up"] != after["up"], axis=1),
        }
        for columns in changed.values():
            assert columns[slice(*block)].all() and columns.sum() == 2
    assert len(step._captured) == 2


def test_fit_cuts_levels_like_inputs():
    """A batch in two pieces is the whole batch, and a number stands for all samples."""

    def levels(step):
        return {"noise_level": np.array([0.0, 0.4, 0.8, 1.0]) if step % 2 else 0.5}

    results = []
    for pieces in (1, 2):
        engine = engine_with("tlora")
        optimizer = SGD(engine.parameters("a"), lr=0.1)
        fit(
            engine, lambda step: (*batch(step), levels(step)), mse,
            name="a", optimizer=optimizer, steps=4, accumulate=pieces, progress=False,
        )  # fmt: skip
        results.append(host(engine))
    one, two = results
    assert all(np.allclose(one[n], two[n], rtol=1e-5, atol=1e-6) for n in one)
    with pytest.raises(ShapeError, match="condition 0 of the batch has shape .3,."):
        step = Step(engine, "a", mse, optimizer, accumulate=2)
        step(*batch(0), {"noise_level": np.zeros(3)})


def test_dylora_learns_in_blocks():
    """Drawn blocks bring the loss down at every rank that the file can be cut to."""
    engine = engine_with("dylora")
    rng = np.random.default_rng(2)
    wanted = rng.standard_normal((8, 4)).astype(np.float32) @ rng.standard_normal((4, 6)).astype(
        np.float32
    )
    weight = np.asarray(engine.layers["l"].weight) + 0.2 * wanted

    def batches(step):
        (x,), _ = batch(step, 32)
        block = draw_block(np.random.default_rng([3, step]), 4, 2)
        return (x,), (x @ weight,), {"ranks": block}

    (x,), (target,), _ = batches(1000)

    def losses():
        return [float(mse(engine.forward(x, ranks=(0, last)), target)[0]) for last in (2, 4)]

    before = losses()
    fit(
        engine,
        batches,
        mse,
        name="a",
        optimizer=AdamW(engine.parameters("a"), lr=1e-2),
        steps=200,
        progress=False,
    )
    after = losses()
    assert all(new < 0.7 * old for new, old in zip(after, before, strict=True))


def test_what_is_no_batch_is_said():
    engine = engine_with("tlora")
    with pytest.raises(LycorisError, match="and a dict of conditions behind them"):
        fit(
            engine, lambda step: (*batch(step), 0.5), mse, name="a",
            optimizer=SGD(engine.parameters("a"), lr=0.1), steps=1, progress=False,
        )  # fmt: skip
