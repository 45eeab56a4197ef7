"""AdamW against the formula of the paper in f64, written without the folded corrections."""

import numpy as np
import pytest

from lycoris_cupy import Engine, Linear, LycorisError, MatchError, ShapeError, bf16, to_device
from lycoris_cupy.optim import AdamW

SHAPES = {"a": {"up": (3, 5), "down": (7,)}, "b": {"w1": (1, 2)}}


def draw(seed, dtype):
    rng = np.random.default_rng(seed)
    return {
        layer: {name: rng.standard_normal(shape).astype(dtype) for name, shape in factors.items()}
        for layer, factors in SHAPES.items()
    }


def on(device, nested):
    return {a: {b: to_device(x, device) for b, x in p.items()} for a, p in nested.items()}


def adamw(p, grads, rates, b1, b2, eps, decay):
    """Loshchilov & Hutter 2019, algorithm 2, lines 6 to 12, with eta = 1."""
    m = v = np.zeros_like(p)
    for t, (g, rate) in enumerate(zip(grads, rates, strict=True), start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
        p = p - (rate * m_hat / (np.sqrt(v_hat) + eps) + rate * decay * p)
    return p


@pytest.mark.parametrize("dtype, relative", [(np.float64, 1e-12), (np.float32, 1e-5), (bf16, 1e-5)])
def test_five_steps_are_the_formula(dtype, relative, device):
    start = draw(0, dtype)
    optimizer = AdamW(on(device, start), lr=0.01, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1)
    wide = np.float64 if dtype == np.float64 else np.float32
    grads = [draw(seed, wide) for seed in range(1, 6)]
    rates = [0.01, 0.02, 0.02, 0.005, 0.001]
    for g, optimizer.lr in zip(grads, rates, strict=True):
        masters = on("cpu", optimizer.step(on(device, g)))
    for layer, factors in SHAPES.items():
        for name in factors:
            history = [g[layer][name].astype(np.float64) for g in grads]
            first = start[layer][name].astype(np.float64)
            expected = adamw(first, history, rates, 0.8, 0.95, 1e-3, 0.1)
            assert masters[layer][name].dtype == wide
            np.testing.assert_allclose(masters[layer][name], expected, relative, relative)


def test_first_step_is_the_rate_against_the_sign():
    p = {"a": {"w": np.array([1.0, -2.0, 3.0])}}
    masters = AdamW(p, lr=0.5, eps=0, weight_decay=0).step(
        {"a": {"w": np.array([4.0, -1e-3, 7.0])}}
    )
    np.testing.assert_allclose(masters["a"]["w"], [0.5, -1.5, 2.5])


def test_decay_is_decoupled_from_the_gradient():
    p = {"a": {"w": np.array([1.0, -2.0])}}
    masters = AdamW(p, lr=0.5, weight_decay=0.1).step({"a": {"w": np.zeros(2)}})
    np.testing.assert_allclose(masters["a"]["w"], [0.95, -1.9])


def test_the_given_arrays_and_gradients_are_not_written():
    p, g = draw(0, np.float32), draw(1, np.float32)
    AdamW(p).step(g)
    for found, kept in ((p, draw(0, np.float32)), (g, draw(1, np.float32))):
        assert all((found[a][b] == kept[a][b]).all() for a in SHAPES for b in SHAPES[a])


def test_masters_keep_what_bf16_rounds_away():
    """Steps of 2^-11 of a value: bf16 alone would never move, with masters it moves after a few."""
    engine = Engine({"a": Linear(np.ones((2, 3), np.float32))}, device="cpu")
    engine.add("x", "full")
    engine.set_parameters("x", {"a": {"diff": np.ones((2, 3), np.float32)}})
    optimizer = AdamW(engine.parameters("x"), lr=2**-11, eps=0, weight_decay=0)
    held = engine.parameters("x")["a"]["diff"]
    seen = []
    for _ in range(16):
        engine.set_parameters("x", optimizer.step({"a": {"diff": np.ones((2, 3), np.float32)}}))
        seen.append(float(held[0, 0]))
    assert held is engine.parameters("x")["a"]["diff"] and held.dtype == bf16
    assert seen[0] == 1.0 and seen[-1] == 1 - 16 * 2**-11  # exact in bf16
    np.testing.assert_allclose(optimizer.masters["a"]["diff"], 1 - 16 * 2**-11, rtol=1e-6)


def test_refusals():
    p = draw(0, np.float32)
    with pytest.raises(LycorisError, match=r"betas are \(0.9, 1.0\), expected"):
        AdamW(p, betas=(0.9, 1.0))
    with pytest.raises(LycorisError, match="weight_decay is -1, expected at least 0"):
        AdamW(p, weight_decay=-1)
    with pytest.raises(LycorisError, match="lr is nan"):
        AdamW(p, lr=float("nan"))
    optimizer, grads = AdamW(p), draw(1, np.float32)
    del grads["b"]["w1"]
    with pytest.raises(MatchError, match="no gradient for factor 'w1' of layer 'b'"):
        optimizer.step(grads)
    grads["b"]["w1"] = np.zeros((2, 1), np.float32)
    with pytest.raises(ShapeError, match=r"b.w1 has shape \(2, 1\), expected \(1, 2\)"):
        optimizer.step(grads)
    assert all((optimizer.masters[a][b] == p[a][b]).all() for a in SHAPES for b in SHAPES[a])
