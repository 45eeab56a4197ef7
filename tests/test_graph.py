"""Captured forwards and captured training steps do what the same work does uncaptured."""

import numpy as np
import pytest

from lycoris_cupy import Conv2d, Engine, Linear, bf16, graph, kernels, to_device
from lycoris_cupy.errors import KernelError, LycorisError, ShapeError
from lycoris_cupy.optim import AdamW
from tests.arrays import host


def engine_on(device, seed=0):
    rng = np.random.default_rng(seed)
    layers = {
        "conv": Conv2d(rng.standard_normal((3, 3, 8, 16), np.float32) / 8, padding=1),
        "head": Linear(rng.standard_normal((16, 8), np.float32) / 4, np.zeros(8, np.float32)),
    }
    engine = Engine(layers, device=device)
    engine.add("a", "locon", rank=8, alpha=4.0)
    return engine


def loss(y, target):
    """Half the mean squared error, and its gradient."""
    difference = y.astype(np.float32) - target.astype(np.float32)
    return (difference * difference).mean() / 2, (difference / y.size).astype(y.dtype)


def data(device):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 6, 5, 8), np.float32).astype(bf16)
    target = rng.standard_normal((2, 6, 5, 8), np.float32).astype(bf16)
    return to_device(x, device), to_device(target, device)


def test_a_captured_step_is_the_step(device):
    """Ten steps with a rate that changes, captured and not: the same factors, the same losses."""
    x, target = data(device)
    plain, fast = engine_on(device), engine_on(device)
    optimizers = [AdamW(e.parameters("a"), lr=0.05, weight_decay=0.1) for e in (plain, fast)]
    step = fast.capture_step("a", loss, optimizers[1], x, targets=[target])
    for layer, factors in plain.parameters("a").items():
        for name, value in factors.items():  # capturing has taken no step
            assert (host(value) == host(fast.parameters("a")[layer][name])).all()
    seen = []
    for i in range(10):
        rate = 0.05 / (1 + i)
        y, pullback = plain.vjp(x)
        value, dy = loss(y, target)
        optimizers[0].lr = optimizers[1].lr = rate
        plain.set_parameters("a", optimizers[0].step(pullback(dy)[1]["a"]))
        got = step(x, target)
        np.testing.assert_allclose(float(host(got)), float(host(value)), rtol=1e-6)
        seen.append(float(host(got)))
    assert seen[-1] < 0.8 * seen[0]
    for layer, factors in plain.parameters("a").items():
        for name, value in factors.items():
            assert (host(value) == host(fast.parameters("a")[layer][name])).all(), (layer, name)


def test_strength_needs_no_new_capture(device):
    x, target = data(device)
    engine = engine_on(device)
    rng = np.random.default_rng(3)
    factors = {
        layer: {
            n: to_device(rng.standard_normal(v.shape, np.float32), device) for n, v in p.items()
        }
        for layer, p in engine.parameters("a").items()
    }
    captured = engine.capture(x)
    engine.set_parameters("a", factors)
    for strength in (1.0, 0.0, -0.5):
        engine.strength["a"] = strength
        assert (host(captured(x)) == host(engine.forward(x))).all()


def test_inputs_may_be_written_in_place(device):
    x, _ = data(device)
    engine = engine_on(device)
    captured = engine.capture(x)
    captured.inputs[0][...] = x * 0 + 1
    first = host(captured())
    assert (first == host(engine.forward(x * 0 + 1))).all()
    assert (host(captured(x)) == host(engine.forward(x))).all()


def test_other_shapes_are_refused(device):
    x, target = data(device)
    engine = engine_on(device)
    step = engine.capture_step("a", loss, AdamW(engine.parameters("a")), x, targets=[target])
    with pytest.raises(ShapeError, match="captured for inputs of shapes"):
        step(x[:1], target)
    with pytest.raises(LycorisError, match="no adapter named 'b'"):
        engine.capture_step("b", loss, AdamW(engine.parameters("a")), x, targets=[target])


@pytest.mark.gpu
def test_a_host_copy_inside_is_the_error_that_is_told():
    x, _ = data("cuda:0")
    engine = engine_on("cuda:0")
    calls = []

    def topology(call, x):
        calls.append(0)
        if len(calls) > 2:  # the capture itself
            raise ShapeError("from inside")
        return call("head", call("conv", x))

    engine.topology = topology
    with pytest.raises(ShapeError, match="from inside"):
        engine.capture(x)
    engine.topology = lambda call, x: call("head", call("conv", x))
    assert engine.capture(x)(x).shape == (2, 6, 5, 8)  # nothing is left in capture mode


@pytest.mark.gpu
def test_warmup_leaves_nothing_to_compile(monkeypatch):
    kernels._kernel.cache_clear()  # launchers that have loaded nothing
    x, _ = data("cuda:0")
    engine = engine_on("cuda:0")
    assert engine.warmup(x, workers=4) > 1
    before = engine.forward(x)

    def refuse(*args):
        raise KernelError("compiled after the warm-up")

    monkeypatch.setattr(kernels.Kernel, "_load", refuse)
    y, pullback = engine.vjp(x)
    pullback(y)
    assert (host(y) == host(before)).all()


def test_warmup_on_the_cpu_has_nothing_to_do():
    assert engine_on("cpu").warmup(data("cpu")[0]) == 0


def test_explain_tells_what_runs(device):
    x, _ = data(device)
    text = engine_on(device).explain(x)
    assert "locon rank 8" in text
    assert "BLAS" in text if device == "cpu" else "GFLOP" in text and "w (9, 8, 16)" in text


def test_targets_keep_their_dtype(device):
    """A loss may want more digits than bf16 has, or whole numbers."""
    x, _ = data(device)
    engine = engine_on(device)
    wanted = to_device(np.full((2, 6, 5, 8), 1 + 2.0**-20, np.float32), device)
    labels = to_device(np.arange(2, dtype=np.int64), device)

    def exact(y, target, labels):
        difference = y.astype(np.float32) - target
        return target.sum() + labels.sum(), difference.astype(y.dtype)

    optimizer = AdamW(engine.parameters("a"))
    step = engine.capture_step("a", exact, optimizer, x, targets=[wanted, labels])
    expected = 480 * (1 + 2.0**-20) + 1
    assert float(host(step(x, wanted, labels))) == pytest.approx(expected, rel=4e-7)
    # The captured dtype counts: another one is cast, not taken as bytes.
    assert float(host(step(x, wanted.astype(np.float64), labels))) == pytest.approx(
        expected, rel=1e-7
    )


def test_a_capture_that_fails_changes_nothing(monkeypatch):
    x, target = data("cpu")
    engine = engine_on("cpu")
    optimizer = AdamW(engine.parameters("a"), lr=0.1)
    marked = {
        layer: {n: v + np.asarray(0.25, v.dtype) for n, v in p.items()}
        for layer, p in engine.parameters("a").items()
    }
    engine.set_parameters("a", marked)  # not what the masters are
    before = {k: {n: host(v) for n, v in p.items()} for k, p in engine.parameters("a").items()}

    def failing(run, inputs, device, convert):
        run(*inputs)
        raise ShapeError("in the middle")

    monkeypatch.setattr(graph, "Captured", failing)
    with pytest.raises(ShapeError, match="in the middle"):
        engine.capture_step("a", loss, optimizer, x, targets=[target])
    for layer, factors in engine.parameters("a").items():
        for name, value in factors.items():
            assert (host(value) == before[layer][name]).all()
            assert not np.any(optimizer.masters[layer][name] == before[layer][name])
