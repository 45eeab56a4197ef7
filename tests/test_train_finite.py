"""The first value that is not finite stops a run, and is named: layer, step and tensor."""

import numpy as np
import pytest

from lycoris_cupy.optim import SGD, Average
from lycoris_cupy.train import NonFiniteError, read_log, read_state
from tests.training import batch, factors, squared_error, student, train

AT = 13  # the step that goes wrong


def changed(where, value):
    """Batches of which that of step AT holds such values."""

    def batches(step):
        parts = batch(step)
        if step == AT:
            parts[where][0][0, 1:3] = value
        return parts

    return batches


def loss_that(breaks):
    """The squared error, and what `breaks` makes of (value, dy) of a target with a mark."""

    def loss(y, target):
        value, dy = squared_error(y, target)
        return breaks(value, dy) if target[0, 0, 0, 0] == 77 else (value, dy)

    return loss


def marked(step):
    inputs, (target,) = batch(step)
    if step == AT:
        target[0, 0, 0, 0] = 77
    return inputs, (target,)


def rate(step):
    return 3e38 if step == AT else 0.01


NAN, INF = float("nan"), float("inf")
CASES = {
    "input": (changed(0, NAN), squared_error, 0.01, "input 0 of the batch"),
    "target": (changed(1, -INF), squared_error, 0.01, "target 0 of the batch"),
    "output": (changed(0, 3e38), squared_error, 0.01, "the output of layer conv"),
    "loss": (marked, loss_that(lambda v, dy: (v * NAN, dy)), 0.01, "the loss"),
    "its gradient": (marked, loss_that(lambda v, dy: (v, dy * INF)), 0.01, "the gradient of the loss"),
    "a gradient": (marked, loss_that(lambda v, dy: (v, np.full_like(dy, 3e38))), 0.01, "the gradient of conv.up"),
    "norm": (marked, loss_that(lambda v, dy: (v, dy * np.float32(1e30))), 0.01, "the norm of the gradient"),
    "factor": (batch, squared_error, rate, "factor conv.down after the update"),
}  # fmt: skip


@pytest.mark.parametrize("steps", [18, AT + 1], ids=["between", "last"])
@pytest.mark.parametrize("kind", CASES)
def test_the_first_is_named(kind, steps, tmp_path):
    batches, loss, lr, tensor = CASES[kind]

    def run(steps, out, **options):
        engine = student()
        optimizer = SGD(
            engine.parameters("a"), lr, weight_decay=10.0, clip=1.0 if kind == "loss" else None
        )
        average = Average(optimizer.masters)
        options = {"log_every": 5, "checkpoint_every": 4, "average": average, **options}
        train(engine, optimizer, steps, batches, loss, out=out, **options)
        return engine

    with pytest.raises(NonFiniteError, match=rf"^step {AT}: {tensor} is not finite: ") as raised:
        run(steps, tmp_path / "run")
    assert (raised.value.step, raised.value.tensor) == (AT, tensor)
    names = sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["step-00000008", "step-00000012"]  # the last good ones, whole
    state = read_state(tmp_path / "run/checkpoints/step-00000012", "cpu")
    assert all(np.isfinite(a).all() for a in state["training"][0][1])
    assert not (tmp_path / "run/a.safetensors").exists()
    assert all(np.isfinite(list(line.values())).all() for line in read_log(tmp_path / "run"))
    if kind == "input":  # it would be the same again, and is not with better data
        with pytest.raises(NonFiniteError, match=tensor):
            run(steps, tmp_path / "run", resume=True)
        batches = batch
        assert np.isfinite(factors(run(steps, tmp_path / "run", resume=True))).all()


@pytest.mark.parametrize("kind, accumulate", [("data", 1), ("data", 2), ("factor", 1)])
def test_the_engine_stands_before_the_step(kind, accumulate):
    """An iterable too is gone through again, and a batch in pieces."""

    def run(steps, batches):
        engine = student()
        lr = rate if kind == "factor" else 0.01
        optimizer = SGD(engine.parameters("a"), lr, weight_decay=10.0)
        try:
            train(engine, optimizer, steps, batches, log_every=9, accumulate=accumulate)
        except NonFiniteError as error:
            assert error.step == AT
        return factors(engine)

    source = changed(0, NAN) if kind == "data" else batch
    broken = run(AT + 1, (source(step) for step in range(20)))
    assert (broken == run(AT, batch)).all()


def test_half_precision_targets_and_numbers_are_looked_at():
    """bf16 and whole numbers are no obstacle: the network here learns classes."""
    engine = student(dtype="bf16")

    def classes(step):
        (x,), _ = batch(step)
        x = x.copy()
        x[0, 0, 0, 0] = NAN if step == 2 else 0
        return (x.astype(engine.dtype),), (np.arange(x[..., 0].size).reshape(x.shape[:-1]) % 5,)

    def cross_entropy(y, target):
        wide = y.astype(np.float32)
        p = np.exp(wide - wide.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        chosen = np.eye(5, dtype=np.float32)[target]
        return -np.log((p * chosen).sum(-1)).mean(), (p - chosen) / target.size

    optimizer = SGD(engine.parameters("a"), 0.01)
    with pytest.raises(NonFiniteError, match="step 2: input 0 of the batch"):
        train(engine, optimizer, 9, classes, cross_entropy)
