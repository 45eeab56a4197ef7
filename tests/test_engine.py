"""The engine: topologies, several adapters, strengths, gradients inside a network, capture, and its
errors.
"""

from functools import partial

import numpy as np
import pytest

from lycoris_cupy import (
    Conv1d,
    Conv2d,
    DeviceError,
    DtypeError,
    Engine,
    Linear,
    LoCon,
    LycorisError,
    MatchError,
    ShapeError,
    bf16,
    ops,
    to_device,
)
from lycoris_cupy.arrays import dtype_of, gpu_missing
from tests.arrays import drawn, host
from tests.bounds import assert_within, bound

RNG = np.random.default_rng(0)


def exact(*shape):
    return drawn(RNG, *shape)


SLOPE = exact(6)


def small(device="cpu", dtype="f64", **options):
    """Two convolutions with a residual, a PReLU and a linear head."""
    rng = np.random.default_rng(3)
    exact = partial(drawn, rng, size=0.5)
    layers = {
        "in": Conv2d(exact(3, 3, 3, 6), exact(6), padding=1),
        "mid.0": Conv2d(exact(3, 3, 2, 6), padding=1, groups=3),
        "head": Linear(exact(6, 4), exact(4)),
    }
    slope = to_device(rng.standard_normal(6).astype(dtype_of(dtype)), device)

    def topology(call, x):
        h = call("in", x)
        h = ops.add(h, ops.prelu(call("mid.0", h), slope))
        return call("head", h)

    return Engine(layers, topology, device=device, dtype=dtype, **options)


X = exact(2, 5, 4, 3)


def randomize(engine, name, seed):
    rng = np.random.default_rng(seed)
    values = {
        layer: {n: drawn(rng, *v.shape, size=0.3) for n, v in p.items()}
        for layer, p in engine.parameters(name).items()
    }
    engine.set_parameters(name, values)
    return values


def test_two_adapters_add_up():
    engine = small()
    base = engine.forward(X)
    engine.add("a", "lokr", ["in", "head"], rank=1, factor=2)
    engine.add("b", "locon", rank=2, alpha=3.0)
    randomize(engine, "a", 1)
    randomize(engine, "b", 2)
    both = engine.forward(X)
    engine.strength["a"] = 0
    only_b = engine.forward(X)
    engine.detach("a")
    assert np.abs(engine.forward(X) - only_b).max() < 1e-13
    engine.strength["b"] = 0.0
    assert np.array_equal(engine.forward(X), base)
    assert np.abs(both - only_b).max() > 1e-3
    assert dict(engine.strength) == {"b": 0.0}


def test_merged_of_several_adapters_is_one_rounding(device):
    engine = small(device, "bf16")
    weights = {}
    for name, algorithm in (("a", "lokr"), ("b", "loha"), ("c", "full")):
        options = (
            {"factor": 2} if algorithm == "lokr" else {"bias": True} if algorithm == "full" else {}
        )
        engine.add(
            name, algorithm, rank=2, strength={"a": 0.7, "b": -1.0, "c": 1.0}[name], **options
        )
        randomize(engine, name, ord(name))
    exactly = small()
    for name, attached in engine.attachments.items():
        found = attached.on_host()
        found = {
            layer: (a, {n: v.astype(np.float64) for n, v in p.items()})
            for layer, (a, p) in found.items()
        }
        exactly.attachments[name] = type(attached)(found, "cpu", np.float64, attached.strength)
    merged, expected = engine.merged(), exactly.merged()
    for name in engine.layers:
        weights = to_device(merged.layers[name].weight, "cpu"), expected.layers[name].weight
        size = np.abs(weights[1]) + 8
        assert_within(*weights, bound(weights[1], size, 64, bf16), name)
    y, live = (host(e.forward(X)) for e in (merged, engine))
    assert np.linalg.norm(y - live) <= 2.0**-5 * np.linalg.norm(live)
    assert merged.layers["mid.0"].bias is not None  # full brought one


@pytest.mark.parametrize("order", [("full", "locon"), ("locon", "full")])
def test_merged_keeps_a_bias_whatever_comes_after(order):
    """An adapter without a change of the bias must not take away that of another."""
    engine = Engine({"a": Linear(exact(3, 4))}, device="cpu", dtype="f64")
    for name in order:
        engine.add(name, name, rank=2, **({"bias": True} if name == "full" else {}))
        randomize(engine, name, 11)
    x = exact(2, 3)
    assert np.abs(engine.merged().forward(x) - engine.forward(x)).max() < 1e-13
    assert engine.merged().layers["a"].bias is not None


def test_gradients_through_the_network():
    engine = small()
    engine.add("a", "loha", rank=2, strength=0.7)
    values = randomize(engine, "a", 4)
    y, pullback = engine.vjp(X)
    assert np.abs(y - engine.forward(X)).max() == 0
    dy = np.random.default_rng(5).standard_normal(y.shape)
    dx, grads = pullback(dy)
    step = 1e-6

    def value(x, at):
        engine.set_parameters("a", at)
        return float((engine.forward(x) * dy).sum())

    d = np.random.default_rng(6).standard_normal(X.shape)
    slope = (value(X + step * d, values) - value(X - step * d, values)) / (2 * step)
    assert slope == pytest.approx(float((dx * d).sum()), rel=1e-6)
    for layer, p in grads["a"].items():
        for name, gradient in p.items():
            d = np.random.default_rng(7).standard_normal(gradient.shape)
            ends = []
            for sign in (1, -1):
                moved = {k: dict(v) for k, v in values.items()}
                moved[layer][name] = values[layer][name] + sign * step * d
                ends.append(value(X, moved))
            assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(
                float((gradient * d).sum()), rel=1e-6, abs=1e-8
            )


def test_pullback_runs_once():
    engine = small()
    _, pullback = engine.vjp(X)
    pullback(np.zeros((2, 5, 4, 4)))
    with pytest.raises(LycorisError, match="played back already"):
        pullback(np.zeros((2, 5, 4, 4)))


def test_unused_layer_gets_zero_gradients(device):
    layers = {"a": Linear(exact(3, 4)), "unused": Linear(exact(5, 2))}
    engine = Engine(layers, lambda call, x: call("a", x), device=device)
    engine.add("t", "locon", rank=1)
    dx, grads = engine.vjp(exact(2, 3))[1](exact(2, 4))
    assert dx.dtype == bf16
    assert not to_device(grads["t"]["unused"]["down"], "cpu").any()
    assert to_device(grads["t"]["a"]["up"], "cpu").any()


def test_sequential_and_default_topology(device):
    w1, w2 = exact(3, 7), exact(7, 2)
    chain = Engine.sequential(
        [Linear(w1), lambda h: ops.scale(h, to_device(np.ones(1), device)), Linear(w2)],
        device=device,
        dtype="f64",
    )
    plain = Engine({"x": Linear(w1), "y": Linear(w2)}, device=device, dtype="f64")
    x = exact(5, 3)
    assert np.allclose(to_device(chain.forward(x), "cpu"), x @ w1 @ w2)
    assert np.allclose(to_device(plain.forward(x), "cpu"), x @ w1 @ w2)
    assert list(chain.layers) == ["0", "2"]


def test_save_and_attach(tmp_path, device):
    engine = small(device, "bf16")
    engine.add("style", "lokr", rank=1, factor=2, alpha=3.0)
    randomize(engine, "style", 8)
    engine.save_adapter("style", tmp_path / "style.safetensors")
    other = small(device, "bf16")
    report = other.attach(tmp_path / "style.safetensors", strength=1.0)
    assert {e.layer for e in report.layers} == {"in", "mid.0", "head"}
    for layer, p in engine.parameters("style").items():
        for name, value in p.items():
            again = other.parameters("style")[layer][name]
            assert to_device(again, "cpu").tobytes() == to_device(value, "cpu").tobytes()
    a, b = (to_device(e.forward(X), "cpu") for e in (engine, other))
    assert a.tobytes() == b.tobytes()


def test_capture_sees_changes(device):
    engine = small(device, "bf16")
    engine.add("a", "locon", rank=2)
    randomize(engine, "a", 9)
    step = engine.capture(X)

    def host(y):
        return to_device(y, "cpu").copy()

    assert host(step(X)).tobytes() == host(engine.forward(X)).tobytes()
    other = exact(2, 5, 4, 3)
    assert host(step(other)).tobytes() == host(engine.forward(other)).tobytes()
    engine.strength["a"] = -0.5
    assert host(step(X)).tobytes() == host(engine.forward(X)).tobytes()
    randomize(engine, "a", 10)
    after = host(step(X))
    assert after.tobytes() == host(engine.forward(X)).tobytes()
    with pytest.raises(ShapeError, match="captured for inputs of shapes"):
        step(exact(1, 5, 4, 3))


def test_inputs_of_other_makers(device):
    class Foreign:
        def __init__(self, array):
            self.array = array

        def __dlpack__(self, **options):
            return self.array.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.array.__dlpack_device__()

    engine = Engine({"a": Linear(exact(3, 4))}, device=device, dtype="f32")
    x = exact(2, 3).astype(np.float32)
    expected = to_device(engine.forward(x), "cpu")
    assert np.array_equal(to_device(engine.forward(Foreign(x)), "cpu"), expected)
    assert np.array_equal(to_device(engine.forward(x.tolist()), "cpu"), expected)


def test_explain_names_routes():
    engine = small()
    engine.add("a", "loha", rank=1)
    engine.add("b", "full", ["head"])
    text = engine.explain()
    assert "in: Conv2d(3 -> 6" in text and "route" in text and "head: Linear(6 -> 4)" in text
    assert "b: full" in text and "multiply-adds" in text


def test_inputs_are_not_changed():
    engine = small()
    engine.add("a", "locon", rank=1)
    x = X.copy()
    weight = engine.layers["in"].weight.copy()
    y, pullback = engine.vjp(x)
    dy = np.ones_like(y)
    pullback(dy)
    assert (
        np.array_equal(x, X)
        and (dy == 1).all()
        and np.array_equal(engine.layers["in"].weight, weight)
    )


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda e: e.add("a", "lora2"), LycorisError, "'lora2' is unknown: use one of locon"),
        (
            lambda e: e.add("a", "locon", ["nothing*"]),
            MatchError,
            "'nothing\\*' matches none of the layers",
        ),
        (lambda e: e.add("a", "locon", bogus=1), LycorisError, "no option 'bogus'"),
        (
            lambda e: e.add("a", "locon", ["head"], tucker=True),
            MatchError,
            "tucker acts on kernels over space alone",
        ),
        (lambda e: e.detach("x"), MatchError, "no adapter named 'x'"),
        (lambda e: e.strength.__setitem__("x", 1), MatchError, "no adapter named 'x'"),
        (
            lambda e: e.forward(X.astype(np.float16)),
            DtypeError,
            "input 0 has dtype float16.*cast it first",
        ),
        (lambda e: e.forward(np.zeros((2, 5, 4, 3), int)), DtypeError, "dtype int64"),
        (
            lambda e: e.forward(exact(2, 5, 4, 7)),
            ShapeError,
            "layer 'in', Conv2d.*expected 3 channels",
        ),
        (
            lambda e: e.forward(exact(5, 3)),
            ShapeError,
            "layer 'in'.*expected \\(N, 2 spatial axes, C\\)",
        ),
        (lambda e: e.vjp(X)[1](exact(1, 2)), LycorisError, "dy has shape \\(1, 2\\)"),
        (lambda e: e.vjp(X)[1](np.ones(3, int)), DtypeError, "dy has dtype int64.*cast it first"),
    ],
)
def test_errors(act, error, message):
    with pytest.raises(error, match=message):
        act(small())


def test_strength_must_be_finite():
    engine = small()
    engine.add("a", "locon", rank=1)
    with pytest.raises(LycorisError, match="strength is nan"):
        engine.strength["a"] = float("nan")
    with pytest.raises(LycorisError, match="attached already"):
        engine.add("a", "locon")
    with pytest.raises(LycorisError, match="cannot be deleted"):
        del engine.strength["a"]
    with pytest.raises(ShapeError, match="in.down has shape"):
        engine.set_parameters("a", {"in": {"down": np.zeros((1, 2))}})
    with pytest.raises(MatchError, match="no factor 'x'"):
        engine.set_parameters("a", {"in": {"x": np.zeros((1, 2))}})


def test_topology_that_calls_an_unknown_layer():
    engine = Engine({"a": Linear(exact(3, 4))}, lambda call, x: call("b", x), device="cpu")
    with pytest.raises(MatchError, match="calls layer 'b'"):
        engine.forward(exact(1, 3))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Linear(np.zeros((2, 3), np.float16)), DtypeError, "float16.*astype"),
        (lambda: Linear(np.zeros((2, 3), np.int8)), DtypeError, "int8.*cast it first"),
        (lambda: Linear(np.zeros((2, 3, 4))), ShapeError, "expected 2 axes"),
        (
            lambda: Linear(np.zeros((2, 3)), np.zeros(2)),
            ShapeError,
            "bias has shape \\(2,\\), expected \\(3,\\)",
        ),
        (
            lambda: Conv2d(np.zeros((3, 3, 2, 5)), groups=2),
            ShapeError,
            "5 outputs are not a multiple of the 2",
        ),
        (
            lambda: Conv1d(np.zeros((3, 2, 5)), stride=(1, 2)),
            ShapeError,
            "stride \\(1, 2\\) has 2 entries",
        ),
        (lambda: Conv1d(np.zeros((4, 2, 5)), padding="same"), ShapeError, "padding 'same' needs"),
        (lambda: Conv1d(np.zeros((3, 2, 5)), stride=0), ShapeError, "at least 1"),
        (lambda: Engine({}), LycorisError, "at least one layer"),
        (
            lambda: Engine({"a": Linear(np.zeros((2, 3)))}, device="tpu"),
            DeviceError,
            "'tpu' is unknown",
        ),
        (lambda: LoCon(Linear(np.zeros((2, 3))).shape, 2, tucker=True), ShapeError, "Tucker core"),
    ],
)
def test_layer_errors(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.skipif(not gpu_missing(), reason="there is a GPU here")
def test_asking_for_a_missing_gpu_says_why():
    with pytest.raises(DeviceError, match="'cuda' was asked for, but .*CuPy"):
        Engine({"a": Linear(exact(3, 4))}, device="cuda")
    assert Engine({"a": Linear(exact(3, 4))}, device="auto").device == "cpu"


@pytest.mark.gpu
def test_auto_takes_the_gpu():
    import cupy

    engine = Engine({"a": Linear(exact(3, 4))})
    assert engine.device == "cuda:0" and isinstance(engine.forward(exact(1, 3)), cupy.ndarray)
    with pytest.raises(DeviceError, match="has 1 GPU|GPU\\(s\\)"):
        Engine({"a": Linear(exact(3, 4))}, device="cuda:99")
    with pytest.raises(DeviceError, match="lies on the GPU but"):
        ops.add(cupy.ones(3, cupy.float32), np.ones(3, np.float32))
