"""The loop: it converges, tells what it does, and does the same in pieces."""

import itertools
import json

import numpy as np
import pytest

from lycoris_cupy import LycorisError, ShapeError
from lycoris_cupy.io.safetensors import open_file
from lycoris_cupy.optim import SGD, AdamW, Average, Lion, Prodigy, ScheduleFreeAdamW, cosine
from lycoris_cupy.train import read_log
from tests.training import TEACHER, batch, factors, squared_error, student, train

OPTIMIZERS = {
    "AdamW": lambda p: AdamW(p, cosine(0.03, 150, warmup=5), weight_decay=0.0),
    "SGD": lambda p: SGD(p, 0.2, clip=1.0),
    "Lion": lambda p: Lion(p, cosine(0.01, 150)),
    "Prodigy": lambda p: Prodigy(p, d0=1e-3),
    "ScheduleFreeAdamW": lambda p: ScheduleFreeAdamW(p, 0.03, weight_decay=0.0),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns_the_teacher(name):
    engine = student()
    result = train(engine, OPTIMIZERS[name](engine.parameters("a")), 150, log_every=5)
    losses = [line["loss"] for line in result.lines]
    assert result.loss == losses[-1] < losses[0] / 20 and result.steps == 150


@pytest.mark.parametrize("algorithm", ["loha", "lokr", "full", "dylora", "glora"])
def test_every_kind_of_adapter_gets_nearer(algorithm):
    engine = student(algorithm=algorithm)
    result = train(engine, AdamW(engine.parameters("a"), 0.02), 60, log_every=5)
    assert result.loss < 0.8 * result.lines[0]["loss"]


def test_a_batch_in_pieces_is_the_whole_batch():
    whole, pieces = student(dtype="f64"), student(dtype="f64")
    for engine, count in ((whole, 1), (pieces, 4)):
        result = train(engine, AdamW(engine.parameters("a"), 0.02, clip=0.05), 12, accumulate=count)
    np.testing.assert_allclose(factors(pieces), factors(whole), rtol=1e-9, atol=1e-12)
    assert result.lines[-1]["grad_norm"] > 0
    with pytest.raises(
        ShapeError, match=r"input 0 of the batch has shape \(4, 5, 4, 4\): .* 3 equal"
    ):
        train(whole, AdamW(whole.parameters("a")), 1, accumulate=3)


def test_the_log_holds_what_was_computed(tmp_path):
    """The means of losses and norms by hand, and the rates of the steps."""
    engine, losses, norms = student(), [], []
    optimizer = AdamW(engine.parameters("a"), cosine(0.02, 7))
    for step in range(7):
        (x,), (target,) = batch(step)
        y, pullback = engine.vjp(x)
        value, dy = squared_error(y, target)
        grads = pullback(dy)[1]["a"]
        losses.append(float(value))
        norms.append(sum(float((g * g).sum()) for p in grads.values() for g in p.values()) ** 0.5)
        engine.set_parameters("a", optimizer.step(grads))
    again = student()
    out = tmp_path / "run"
    result = train(again, AdamW(again.parameters("a"), cosine(0.02, 7)), 7, log_every=3, out=out)
    assert (factors(again) == factors(engine)).all()
    lines = read_log(out)
    assert (
        lines
        == result.lines
        == [json.loads(text) for text in (out / "log.jsonl").read_text().splitlines()]
    )
    assert [line["step"] for line in lines] == [3, 6, 7]
    for line, part in zip(lines, (slice(0, 3), slice(3, 6), slice(6, 7)), strict=True):
        np.testing.assert_allclose(line["loss"], np.mean(losses[part]), rtol=1e-6)
        np.testing.assert_allclose(line["grad_norm"], np.mean(norms[part]), rtol=1e-5)
        assert line["lr"] == cosine(0.02, 7)(line["step"] - 1)
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)


def test_the_average_is_validated_and_saved(tmp_path):
    engine = student()
    optimizer = AdamW(engine.parameters("a"), 0.02)
    average = Average(optimizer.masters, 0.9)
    seen = []

    def validate(engine):
        seen.append(factors(engine))
        return float(len(seen))

    result = train(
        engine,
        optimizer,
        4,
        average=average,
        validate=validate,
        validate_every=2,
        out=tmp_path / "run",
    )
    mean = np.concatenate([v.ravel() for p in average.values.values() for v in p.values()])
    masters = np.concatenate([v.ravel() for p in optimizer.masters.values() for v in p.values()])
    assert (
        (seen[1] == mean).all() and (factors(engine) == masters).all() and (mean != masters).any()
    )
    other = student()
    other.detach("a")
    other.attach(result.path)
    assert (factors(other, "a") == mean).all()
    assert [line["validation"] for line in result.lines if "validation" in line] == [1.0, 2.0]
    assert result.best == (1.0, 2)
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == [
        "best-00000002",
        "step-00000004",
    ]


def test_patience_stops_early():
    engine, values = student(), iter([3.0, 2.0, 2.5, float("nan"), 1.0])
    result = train(
        engine,
        AdamW(engine.parameters("a")),
        50,
        validate=lambda _: next(values),
        validate_every=2,
        patience=2,
    )
    assert (result.steps, result.stopped, result.best) == (8, "early", (2.0, 4))


def test_max_norm_is_kept():
    engine = student()
    train(engine, AdamW(engine.parameters("a"), 0.1), 20, max_norm=0.05)
    for layer in engine.layers:
        change, _ = engine.attachments["a"].delta(layer, engine.layers[layer])
        assert 0.04 < np.linalg.norm(change) < 0.0501


def test_what_a_saved_adapter_says(tmp_path):
    engine = student(alpha=1.0)
    optimizer = AdamW(engine.parameters("a"), 0.02, clip=1.0)
    path = train(engine, optimizer, 3, out=tmp_path / "run", configuration={"seed": 7}).path
    assert path == tmp_path / "run" / "a.safetensors"
    with open_file(path) as file:
        told = file.metadata
    expected = {"ss_network_module": "lycoris.kohya", "ss_network_dim": "2", "ss_network_alpha": "1", "ss_steps": "3",
                "ss_optimizer": "lycoris_cupy.optim.AdamW", "ss_learning_rate": "0.02", "ss_lr_scheduler": "constant",
                "ss_max_grad_norm": "1.0", "ss_seed": "7", "ss_output_name": "a"}  # fmt: skip
    assert expected.items() <= told.items()
    own = json.loads(told["lycoris_cupy.training"])
    assert own["configuration"]["optimizer"]["betas"] == [0.9, 0.999] and len(own["base"]) == 64


def test_batches_of_other_shapes_and_from_an_iterable():
    """Counts that differ from step to step; a list, a cycle and a function are the same."""
    made = [batch(step, 2 + step) for step in range(3)]
    found = []
    for batches in (made, itertools.cycle(made), lambda step: made[step]):
        engine = student()
        train(engine, AdamW(engine.parameters("a"), 0.02), 3, batches)
        found.append(factors(engine))
    assert (found[0] == found[1]).all() and (found[0] == found[2]).all()


def test_bf16_alone_moves_on_average():
    """Steps of 2^-12 of a value, far below bf16's 2^-9: rounded to nearest none is ever seen."""
    engine = student(dtype="bf16", algorithm="full")
    for layer, p in engine.parameters("a").items():
        engine.set_parameters("a", {layer: {"diff": np.ones(p["diff"].shape, np.float32)}})

    def pull(
        y, target
    ):  # every output down: the gradient of the weights is that of positive inputs
        return y.astype(np.float32).mean(), np.full(y.shape, 1 / y.size, np.float32)

    def positive(step):
        (x,), targets = batch(step)
        return (abs(x),), targets

    before = factors(engine).mean()
    optimizer = SGD(engine.parameters("a"), 0.0, momentum=0.0, seed=3)
    assert optimizer.masters["head"]["diff"].dtype == engine.dtype
    lion = Lion(engine.parameters("a"), 2.0**-12, seed=3)
    train(engine, lion, 64, positive, pull)
    moved = before - factors(engine).mean()
    count = factors(engine).size
    # 64 steps of 2^-12, each up or down a bf16 step of at most 2^-8 at random.
    spread = (64 * 2.0**-12 * 2.0**-8 / count) ** 0.5
    assert abs(moved - 64 * 2.0**-12) < 5 * spread


def test_weight_decay_has_its_effect():
    """Without a gradient n steps leave (1 - lr * decay)^n of every factor."""
    engine = student(algorithm="full")
    values = {
        a: {n: np.ones(v.shape) for n, v in p.items()} for a, p in engine.parameters("a").items()
    }
    engine.set_parameters("a", values)
    optimizer = AdamW(engine.parameters("a"), 0.1, weight_decay=0.5)

    def nothing(y, target):
        return y.mean() * 0, np.zeros_like(y)

    train(engine, optimizer, 10, loss=nothing)
    np.testing.assert_allclose(factors(engine), (1 - 0.1 * 0.5) ** 10, rtol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steps": 0}, "steps is 0, expected a whole number of at least 1"),
        ({"log_every": 2.5}, "log_every is 2.5, expected a whole number"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"validate": lambda engine: 0.0}, "validate was given, but neither"),
        ({"batches": [batch(0)]}, "the batches end after 1: give a function of the step"),
        ({"batches": lambda step: batch(0)[0]}, r"the batch of step 0 is tuple, expected a pair"),
        (
            {"batches": lambda step: (TEACHER, TEACHER)},
            r"the batch of step 0 is tuple, expected a pair",
        ),
    ],
)
def test_refusals(options, message):
    engine = student()
    with pytest.raises(LycorisError, match=message):
        train(engine, AdamW(engine.parameters("a")), **{"steps": 3, **options})


@pytest.mark.parametrize("accumulate", [1, 2])
def test_dropout_draws_anew_at_every_step_and_piece(accumulate):
    """With the same data and a rate of 0 all losses would be one; with dropout no two are."""
    engine = student(dropout=0.5)
    values = {
        a: {n: np.ones(v.shape) for n, v in p.items()} for a, p in engine.parameters("a").items()
    }
    engine.set_parameters("a", values)
    seen = []

    def loss(y, target):
        value, dy = squared_error(y, target)
        seen.append(float(value))
        return value, dy

    def same(step):
        (x,), (target,) = batch(0, 1)
        return (np.repeat(x, 2, 0),), (np.repeat(target, 2, 0),)

    optimizer = SGD(engine.parameters("a"), 0.0)
    train(engine, optimizer, 6, same, loss, accumulate=accumulate)
    assert len(set(seen)) == 6 * accumulate
