"""Losses: values and gradients against their definitions, in every dtype and on both devices."""

import math
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lycoris_cupy import DtypeError, Engine, Linear, LycorisError, ShapeError, bf16, to_device
from lycoris_cupy.arrays import DTYPES, wide_dtype
from lycoris_cupy.losses import charbonnier, cross_entropy, l1, mse
from lycoris_cupy.optim import AdamW
from tests.arrays import drawn, host
from tests.bounds import assert_within, bound

DIFFERENCES = {
    "mse": (mse, lambda d: d * d, lambda d: 2 * d),
    "l1": (l1, abs, lambda d: (d > 0) - (d < 0)),
    "charbonnier": (
        partial(charbonnier, eps=0.25),
        lambda d: math.sqrt(d * d + 0.0625),
        lambda d: d / math.sqrt(d * d + 0.0625),
    ),
}


def checked_difference(name, shape, weighted, dtype, device, wide_target=False):
    loss, value_of, slope_of = DIFFERENCES[name]
    rng = np.random.default_rng([*shape, weighted])
    y, target = drawn(rng, *shape), drawn(rng, *shape)
    y.reshape(-1)[:1] = target.reshape(-1)[:1]  # a difference of 0
    weights = np.abs(drawn(rng, shape[0])) if weighted else np.ones(shape[0])
    kept = wide_dtype(DTYPES[dtype])
    value, slope, total = 0.0, np.zeros(shape), max(y.size, 1)
    for at in np.ndindex(*shape):
        d = float(y[at] - target[at])
        value += weights[at[0]] * value_of(d) / total
        slope[at] = weights[at[0]] * slope_of(d) / total
    given_weights = [to_device(weights.astype(kept), device)] if weighted else []
    own = y.astype(DTYPES[dtype])
    target = target.astype(kept if wide_target else DTYPES[dtype])
    found, dy = loss(to_device(own, device), to_device(target, device), *given_weights)
    assert found.shape == () and found.dtype == kept
    assert dy.shape == shape and dy.dtype == DTYPES[dtype]
    assert_within(host(found), value, bound(value, value, total + 8, kept), name)
    assert_within(host(dy), slope, bound(slope, np.abs(slope), 16, dy.dtype), name)


@pytest.mark.parametrize("dtype", ["bf16", "f32", "f64"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 1), (2, 0, 3), (7, 1500)], ids=str)
@pytest.mark.parametrize("name", DIFFERENCES)
def test_differences(name, shape, weighted, dtype, device):
    checked_difference(name, shape, weighted, dtype, device)


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_wide_target_is_not_rounded(name, device):
    checked_difference(name, (3, 5), True, "bf16", device, wide_target=True)
    y, target = np.ones((1, 4), bf16), np.full((1, 4), 1 + 2.0**-12, np.float32)
    loss = DIFFERENCES[name][0]
    assert host(loss(to_device(y, device), to_device(target, device))[1]).max() < 0


def entropy(y, target, weights, ignore, smoothing):
    """One position at a time."""
    classes = y.shape[-1]
    counted = max(sum(int(t) != ignore for t in target.reshape(-1)), 1)
    total, dy = 0.0, np.zeros(y.shape)
    for at in np.ndindex(*target.shape):
        if target[at] == ignore:
            continue
        share = weights[at[0]] / counted
        wanted = np.full(classes, smoothing / classes)
        wanted[target[at]] += 1 - smoothing
        top = y[at].max()
        logs = y[at] - top - math.log(sum(math.exp(v - top) for v in y[at]))
        total -= share * float(wanted @ logs)
        dy[at] = share * (np.exp(logs) - wanted)
    return total, dy


@pytest.mark.parametrize("dtype", ["bf16", "f32", "f64"])
@pytest.mark.parametrize(
    "shape, kind, ignore, smoothing, weighted",
    [
        ((5, 7), np.int64, -100, 0.0, False),
        ((3, 4, 11), np.int32, -100, 0.1, True),
        ((2, 3, 300), np.uint8, 255, 0.3, True),
        ((1, 1), np.int64, -100, 0.0, False),
        ((2, 3, 1), np.int64, -1, 1.0, False),
        ((70, 1100), np.int32, 5, 0.0, False),
        ((0, 5), np.int64, -100, 0.0, False),
    ],
)
def test_cross_entropy(shape, kind, ignore, smoothing, weighted, dtype, device):
    rng = np.random.default_rng(shape)
    y = drawn(rng, *shape, size=3)
    target = rng.integers(0, min(shape[-1], 250), shape[:-1]).astype(kind)
    target.reshape(-1)[1::3] = ignore
    weights = np.abs(drawn(rng, shape[0])) if weighted else np.ones(shape[0])
    value, dy = entropy(y, target, weights, ignore, smoothing)
    kept = wide_dtype(DTYPES[dtype])
    found, slope = cross_entropy(
        to_device(y.astype(DTYPES[dtype]), device),
        to_device(target, device),
        to_device(weights.astype(kept), device) if weighted else None,
        ignore=ignore,
        smoothing=smoothing,
    )
    assert found.shape == () and found.dtype == kept and slope.dtype == DTYPES[dtype]
    depth, size = (
        shape[-1] + target.size + 32,
        (1 + np.abs(y).max(initial=0)) * weights.max(initial=1),
    )
    assert_within(host(found), value, bound(value, value + size, depth, kept))
    share = size / max((target != ignore).sum(), 1)
    assert_within(host(slope), dy, bound(dy, np.abs(dy) + share, depth, slope.dtype))


def test_all_positions_left_out(device):
    y = to_device(np.ones((2, 3, 5), bf16), device)
    value, dy = cross_entropy(y, to_device(np.full((2, 3), -100), device))
    assert host(value) == 0 and not host(dy).any()


def test_logits_far_out_stay_finite(device):
    y = to_device(np.array([[3e4, -3e4, 0.0], [-3e38, -3e38, -3e38]], np.float32), device)
    value, dy = cross_entropy(y, to_device(np.array([1, 2]), device))
    np.testing.assert_allclose(host(value), (6e4 + math.log(3)) / 2, rtol=1e-6)
    np.testing.assert_allclose(host(dy)[0], [0.5, -0.5, 0], atol=1e-6)


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 9), st.floats(0, 1), st.integers(0, 99))
def test_the_gradient_is_the_derivative(n, length, classes, smoothing, seed):
    """For every loss: a central difference along a random direction, in f64."""
    rng = np.random.default_rng(seed)
    y, direction = rng.standard_normal((2, n, length, classes))
    weights = rng.random(n)
    target, labels = rng.standard_normal(y.shape), rng.integers(0, classes, (n, length))
    for run in (
        lambda v: mse(v, target, weights),
        lambda v: charbonnier(v, target, weights, eps=0.5),
        lambda v: cross_entropy(v, labels, weights, smoothing=smoothing),
    ):
        step = 1e-4
        slope = (run(y + step * direction)[0] - run(y - step * direction)[0]) / (2 * step)
        assert abs(slope - (run(y)[1] * direction).sum()) <= 1e-6


@pytest.mark.gpu
def test_a_class_that_is_none_is_seen_on_the_gpu():
    y = to_device(np.ones((3, 5), np.float32), "cuda:0")
    value, dy = cross_entropy(y, to_device(np.array([0, 5, 4]), "cuda:0"))
    assert np.isnan(host(value))
    assert np.isnan(host(dy)).any(axis=1).tolist() == [False, True, False]


def test_a_captured_step_takes_them(device):
    """Cross-entropy and mse as the loss of captured training steps, weights and all."""
    rng = np.random.default_rng(0)
    x = to_device(drawn(rng, 8, 16), device)
    labels, targets = rng.integers(0, 10, 8), drawn(rng, 8, 10).astype(np.float32)
    weights = to_device(rng.random(8).astype(np.float32), device)
    for loss, target in ((cross_entropy, labels), (mse, targets), (charbonnier, targets)):
        layer = Linear(rng.standard_normal((16, 10)) / 4)
        engine = Engine({"head": layer}, device=device, dtype="f32")
        engine.add("a", "locon", rank=4)
        optimizer = AdamW(engine.parameters("a"), lr=0.05)
        given = [to_device(target, device), weights]
        step = engine.capture_step("a", loss, optimizer, x, targets=given)
        seen = [float(host(step(x, *given))) for _ in range(12)]
        assert seen[-1] < 0.8 * seen[0]


F = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    "act, error, message",
    [
        (lambda: mse(F, F[:1]), ShapeError, r"target has shape \(1, 3\), expected that of y"),
        (lambda: mse(F, F.astype(np.float64)), DtypeError, "target is float64, expected float32"),
        (lambda: mse(F, F.astype(np.uint8)), DtypeError, "target has dtype uint8"),
        (lambda: mse(F, F, F[0]), ShapeError, r"weights have shape \(3,\), expected \(2,\)"),
        (lambda: charbonnier(F, F, eps=0), LycorisError, "expected a number above 0"),
        (lambda: cross_entropy(F, F), ShapeError, r"target has shape \(2, 3\), expected \(2,\)"),
        (lambda: cross_entropy(F, F[:, 0]), DtypeError, "expected a plain array of whole numbers"),
        (
            lambda: cross_entropy(F, np.array([0, 3])),
            ShapeError,
            "reaches from 0 to 3, expected 0 to 2, or -100",
        ),
        (lambda: cross_entropy(F, np.array([0, 1]), smoothing=2), LycorisError, "expected 0 to 1"),
    ],
)
def test_errors(act, error, message):
    with pytest.raises(error, match=message):
        act()
