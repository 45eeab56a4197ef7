"""Every optimizer against the formula of its paper in f64, and what all of them share."""

import math

import numpy as np
import pytest

from lycoris_cupy import Engine, Linear, LycorisError, bf16, to_device
from lycoris_cupy.optim import (
    SGD,
    AdamW,
    Lion,
    Prodigy,
    ScheduleFreeAdamW,
    rate_factors,
    round_stochastically,
)
from tests.test_optim import SHAPES, adamw, draw, on

RATES = [0.01, 0.02, 0.02, 0.005, 0.001, 0.03]
DECAY = 0.1


def sgd(p, grads, rates, nesterov):
    """Momentum 0.8: the velocity of Sutskever et al. 2013, seen from the point that is stored."""
    m, out = np.zeros_like(p), []
    for g, rate in zip(grads, rates, strict=True):
        m = 0.8 * m + g
        d = g + 0.8 * m if nesterov else m
        p = p - rate * d - rate * DECAY * p
        out.append(p)
    return out


def lion(p, grads, rates):
    """Chen et al. 2023, algorithm 2, b1 = 0.8, b2 = 0.95."""
    m, out = np.zeros_like(p), []
    for g, rate in zip(grads, rates, strict=True):
        c = 0.8 * m + 0.2 * g
        p = p - rate * (np.sign(c) + DECAY * p)
        m = 0.95 * m + 0.05 * g
        out.append(p)
    return out


def prodigy(p, grads, rates, d=1e-3, eps=1e-3):
    """Mishchenko & Defazio 2023, algorithm 4, b1 = 0.8, b2 = 0.95; also every d."""
    first, r, root, out, seen = p, 0.0, math.sqrt(0.95), [], []
    m = v = s = np.zeros_like(p)
    for g, rate in zip(grads, rates, strict=True):
        m = 0.8 * m + 0.2 * d * g
        v = 0.95 * v + 0.05 * d**2 * g**2
        r = root * r + (1 - root) * rate * d**2 * (g * (first - p)).sum()
        s = root * s + (1 - root) * rate * d**2 * g
        p = p - rate * d * m / (np.sqrt(v) + d * eps) - rate * d * DECAY * p
        d = max(d, r / np.abs(s).sum())
        out.append(p)
        seen.append(d)
    return out, seen


def schedule_free(p, grads, rates, eps=1e-3):
    """Defazio et al. 2024, algorithm 1, b1 = 0.8, b2 = 0.95: the points of the gradients, and the
    averages.
    """
    z = x = y = p
    v, total, points, averages = np.zeros_like(p), 0.0, [], []
    for t, (g, rate) in enumerate(zip(grads, rates, strict=True), start=1):
        v = 0.95 * v + 0.05 * g**2
        z = z - rate * g / (np.sqrt(v / (1 - 0.95**t)) + eps) - rate * DECAY * y
        total += rate**2
        c = rate**2 / total
        x = (1 - c) * x + c * z
        y = 0.2 * z + 0.8 * x
        points.append(y)
        averages.append(x)
    return points, averages


def flat(nested):
    return np.concatenate(
        [np.asarray(nested[a][b], np.float64).ravel() for a in SHAPES for b in SHAPES[a]]
    )


def run(kind, device, dtype, rates=RATES, **options):
    """The masters after every step, and the optimizer."""
    wide = np.float64 if dtype == np.float64 else np.float32
    optimizer = kind(on(device, draw(0, dtype)), weight_decay=DECAY, **options)
    out = []
    for seed, optimizer.lr in enumerate(rates, start=1):
        masters = optimizer.step(on(device, draw(seed, wide)))
        assert all(masters[a][b].dtype == wide for a in SHAPES for b in SHAPES[a])
        out.append(flat(on("cpu", masters)))
    return out, optimizer


def given(dtype, rates=RATES):
    wide = np.float64 if dtype == np.float64 else np.float32
    return flat(draw(0, dtype)), [flat(draw(i + 1, wide)) for i in range(len(rates))]


KINDS = pytest.mark.parametrize(
    "dtype, relative", [(np.float64, 1e-11), (np.float32, 2e-5), (bf16, 2e-5)]
)


@KINDS
@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd(dtype, relative, nesterov, device):
    found, _ = run(SGD, device, dtype, momentum=0.8, nesterov=nesterov)
    np.testing.assert_allclose(found, sgd(*given(dtype), RATES, nesterov), relative, relative)


@KINDS
def test_lion(dtype, relative, device):
    found, _ = run(Lion, device, dtype, betas=(0.8, 0.95))
    np.testing.assert_allclose(found, lion(*given(dtype), RATES), relative, relative)


@KINDS
def test_prodigy(dtype, relative, device):
    rates = [1.0, 1.0, 0.5, 1.0, 0.8, 1.0]
    p, grads = given(dtype, rates)
    # Gradients that agree for a while, so that d grows.
    start, betas = on(device, draw(0, dtype)), (0.8, 0.95)
    optimizer = Prodigy(start, 1.0, betas, 1e-3, weight_decay=DECAY, d0=1e-3)
    wide = np.float64 if dtype == np.float64 else np.float32
    grads = [grads[0] + g / 9 for g in grads]
    found, seen = [], []
    for seed, optimizer.lr in enumerate(rates, start=1):
        one, other = draw(1, np.float64), draw(seed, np.float64)
        g = {a: {b: (one[a][b] + other[a][b] / 9).astype(wide) for b in one[a]} for a in one}
        found.append(flat(on("cpu", optimizer.step(on(device, g)))))
        seen.append(float(to_device(optimizer.d, "cpu")[0]))
    expected, estimates = prodigy(p, grads, rates)
    assert estimates[-1] > 1.5 * estimates[0]
    np.testing.assert_allclose(seen, estimates, max(relative, 1e-9) * 50)
    np.testing.assert_allclose(found, expected, relative, relative)


def test_prodigy_without_any_gradient_stands_still(device):
    optimizer = Prodigy(on(device, {"a": {"w": np.ones(3, np.float32)}}))
    masters = optimizer.step(on(device, {"a": {"w": np.zeros(3, np.float32)}}))
    assert (to_device(masters["a"]["w"], "cpu") == 1).all()
    assert to_device(optimizer.d, "cpu") == np.float32(1e-6)


@KINDS
def test_schedule_free(dtype, relative, device):
    found, optimizer = run(ScheduleFreeAdamW, device, dtype, betas=(0.8, 0.95), eps=1e-3)
    points, averages = schedule_free(*given(dtype), RATES)
    np.testing.assert_allclose(found, points, relative, relative)
    np.testing.assert_allclose(
        flat(on("cpu", optimizer.averaged)), averages[-1], relative, relative
    )


def test_schedule_free_may_begin_with_rate_zero():
    optimizer = ScheduleFreeAdamW(draw(0, np.float64), lr=lambda step: 0.1 * step)
    optimizer.step(draw(1, np.float64))
    assert (flat(optimizer.masters) == flat(draw(0, np.float64))).all()
    optimizer.step(draw(2, np.float64))
    assert np.isfinite(flat(optimizer.averaged)).all()


ALL = {
    "sgd": (SGD, {"lr": 0.02}),
    "nesterov": (SGD, {"lr": 0.02, "nesterov": True}),
    "lion": (Lion, {"lr": lambda step: 0.05 * 0.98**step}),
    "adamw": (AdamW, {"lr": lambda step: 0.1 * 0.98**step, "weight_decay": 0}),
    "prodigy": (Prodigy, {}),
    "schedule_free": (ScheduleFreeAdamW, {"lr": 0.1, "weight_decay": 0}),
}
EACH = pytest.mark.parametrize("name", ALL)


def evaluated(optimizer):
    return getattr(optimizer, "averaged", optimizer.masters)


@EACH
def test_a_quadratic_is_solved(name, device):
    """|A p - b|^2 / 2 with a condition of 25, from 0: the error falls to a fiftieth."""
    kind, options = ALL[name]
    target = to_device(np.random.default_rng(0).standard_normal(6).astype(np.float32), device)
    curve = to_device(np.linspace(0.2, 5, 6).astype(np.float32), device)
    optimizer = kind({"a": {"w": 0 * target}}, **options)
    for _ in range(300):
        optimizer.step({"a": {"w": curve * (optimizer.masters["a"]["w"] - target)}})
    left = to_device(evaluated(optimizer)["a"]["w"] - target, "cpu")
    assert np.linalg.norm(left) < 0.02 * np.linalg.norm(to_device(target, "cpu"))


@EACH
def test_a_small_engine_learns(name):
    """LoKr that fits a Kronecker product on a frozen layer: the loss falls to a tenth."""
    kind, options = ALL[name]
    rng = np.random.default_rng(0)
    base = rng.standard_normal((8, 8)) / 3
    goal = base + np.kron(rng.standard_normal((2, 2)), rng.standard_normal((4, 4))) / 4
    engine = Engine({"a": Linear(base)}, device="cpu", dtype=np.float32)
    engine.add("x", "lokr", rank=4, factor=2)
    optimizer = kind(engine.parameters("x"), **options)
    x = rng.standard_normal((64, 8)).astype(np.float32)
    want = (x @ goal).astype(np.float32)

    def loss_and_gradients():
        y, pullback = engine.vjp(x)
        return ((y - want) ** 2).mean(), pullback(2 * (y - want) / len(x))[1]["x"]

    first, grads = loss_and_gradients()
    for _ in range(200):
        engine.set_parameters("x", optimizer.step(grads))
        _, grads = loss_and_gradients()
    engine.set_parameters("x", evaluated(optimizer))
    assert loss_and_gradients()[0] < 0.1 * first


@EACH
def test_decay_pulls_towards_zero(name, device):
    """Without a gradient a step leaves 1 - lr * decay, times d for Prodigy."""
    kind, _ = ALL[name]
    start = on(device, {"a": {"w": np.array([1.0, -2.0])}})
    extra = {"d0": 0.5} if kind is Prodigy else {}
    optimizer = kind(start, lr=0.5, weight_decay=0.1, **extra)
    optimizer.step(on(device, {"a": {"w": np.zeros(2)}}))
    share = 1 - 0.5 * 0.1 * (0.5 if kind is Prodigy else 1)
    np.testing.assert_allclose(to_device(optimizer.masters["a"]["w"], "cpu"), [share, -2 * share])


@EACH
@pytest.mark.parametrize("seed", [None, 7])
def test_a_snapshot_is_bit_for_bit(name, seed, device):
    kind, options = ALL[name]
    options = {**options, "d0": 0.01} if kind is Prodigy else options
    optimizer = kind(on(device, draw(0, bf16)), clip=1.0, seed=seed, **options)
    grads = [on(device, draw(i, np.float32)) for i in range(1, 7)]
    for g in grads[:3]:
        optimizer.step(g)
    kept, runs = optimizer.snapshot(), []
    for _ in range(2):
        for g in grads[3:]:
            optimizer.step(g)
        runs.append([flat(on("cpu", n)) for n in (optimizer.masters, evaluated(optimizer))])
        if kind is Prodigy:
            runs[-1] += [to_device(x, "cpu").copy() for x in (optimizer.d, optimizer.d_numerator)]
        optimizer.restore(kept)
    assert all((a == b).all() for a, b in zip(*runs, strict=True))
    assert not (runs[0][0] == flat(on("cpu", optimizer.masters))).all()  # the steps do something


@EACH
def test_a_factor_of_the_rate_is_that_rate(name, device):
    """One layer at a third: as an optimizer of its own with a third of the rate."""
    kind, _ = ALL[name]
    start, grads = (
        on(device, draw(0, np.float64)),
        [on(device, draw(i, np.float64)) for i in (1, 2)],
    )
    rates = rate_factors(start, {"b": 1 / 3})
    optimizer = kind(start, lr=0.3, weight_decay=0.1, rates=rates)
    alone = kind(start, lr=0.1, weight_decay=0.1)
    # Prodigy's estimate is one for all: there the two are the same until d moves.
    for g in grads[:1] if kind is Prodigy else grads:
        optimizer.step(g)
        alone.step(g)
    a, b = (to_device(o.masters["b"]["w1"], "cpu") for o in (optimizer, alone))
    np.testing.assert_allclose(a, b, 1e-12)
    assert not np.allclose(
        *(to_device(o.masters["a"]["up"], "cpu") for o in (optimizer, alone)), 1e-9
    )


@EACH
def test_a_captured_step_is_the_step(name, device):
    kind, options = ALL[name]
    rng = np.random.default_rng(0)
    x, target = (to_device(rng.standard_normal((5, 8), np.float32), device) for _ in range(2))
    weight = rng.standard_normal((8, 8)).astype(np.float32)
    engines = [Engine({"a": Linear(weight)}, device=device) for _ in range(2)]
    for engine in engines:
        engine.add("x", "locon", rank=2)
    made = [kind(e.parameters("x"), clip=0.5, seed=3, **options) for e in engines]

    def loss(y, target):
        difference = y.astype(np.float32) - target.astype(np.float32)
        return (difference**2).mean(), (difference / 20).astype(y.dtype)

    step = engines[1].capture_step(
        "x", loss, made[1], x.astype(bf16), targets=[target.astype(bf16)]
    )
    for _ in range(4):
        y, pullback = engines[0].vjp(x.astype(bf16))
        _, dy = loss(y, target.astype(bf16))
        engines[0].set_parameters("x", made[0].step(pullback(dy)[1]["x"]))
        step(x.astype(bf16), target.astype(bf16))
    for layer, factors in engines[0].parameters("x").items():
        for n, value in factors.items():
            found = to_device(engines[1].parameters("x")[layer][n], "cpu")
            assert (found == to_device(value, "cpu")).all() and found.dtype == bf16


def test_bf16_alone_moves_on_average(device):
    """Steps of 2^-12 of a value, 32 to a bf16 spacing: without rounding upwards none would
    count; here 4096 values move by the sum of the steps within five standard errors.
    """
    start = on(device, {"a": {"w": np.ones(4096, bf16)}})
    optimizer = SGD(start, lr=2**-12, momentum=0, seed=5)
    grads = on(device, {"a": {"w": np.full(4096, -1, np.float32)}})
    for _ in range(32):
        masters = optimizer.step(grads)
    found = to_device(masters["a"]["w"], "cpu")
    assert found.dtype == bf16 and len(set(found.tolist())) > 1
    spread = 2**-7 * math.sqrt(32 * 1 / 32 * 31 / 32 / 4096)  # of the mean, by 32 binomial steps
    assert abs(found.astype(np.float64).mean() - 1 - 32 * 2**-12) < 5 * spread


def test_the_bits_of_the_rounding_are_of_step_and_place(device):
    """Each step is the f32 step, rounded with the bits of seed, step (from 1) and the place."""
    start = {"a": {"up": np.ones(64, bf16)}, "b": {"up": np.ones(64, bf16)}}
    optimizer = SGD(on(device, start), lr=0.001, momentum=0, seed=11)
    expected = [np.ones(64, bf16), np.ones(64, bf16)]
    g = np.ones(64, np.float32)
    for step in (1, 2, 3):
        masters = on("cpu", optimizer.step(on(device, {"a": {"up": g}, "b": {"up": g}})))
        for place, layer in enumerate("ab"):
            wide = expected[place].astype(np.float32) - np.float32(0.001) * g
            clock = np.array([step], np.uint32)
            expected[place] = round_stochastically(wide, 11, clock, place)
            assert (masters[layer]["up"] == expected[place]).all()
    assert (expected[0] != expected[1]).any()


def test_clip_is_in_the_step_and_leaves_the_norm(device):
    start = on(device, {"a": {"w": np.zeros(2, np.float32)}})
    optimizer = SGD(start, lr=1.0, momentum=0, clip=1.0)
    masters = optimizer.step(on(device, {"a": {"w": np.array([3, 4], np.float32)}}))
    np.testing.assert_allclose(to_device(masters["a"]["w"], "cpu"), [-0.6, -0.8], 1e-6)
    assert to_device(optimizer.grad_norm, "cpu") == 5


def test_a_schedule_is_asked_for_the_step():
    seen = []

    def counted(step):
        seen.append(step)
        return 0.1

    optimizer = AdamW(draw(0, np.float64), lr=counted)
    for i in range(3):
        optimizer.step(draw(i, np.float64))
    assert seen == [0, 1, 2]
    p = flat(draw(0, np.float64))
    expected = adamw(
        p, [flat(draw(i, np.float64)) for i in range(3)], [0.1] * 3, 0.9, 0.999, 1e-8, 0.01
    )
    np.testing.assert_allclose(flat(optimizer.masters), expected, 1e-12)


@pytest.mark.parametrize(
    "kind, options, message",
    [
        (SGD, {"momentum": 1.0}, "momentum is 1.0, expected a number of at least 0 and below 1"),
        (Lion, {"betas": (0.9,)}, r"betas are \(0.9,\), expected two numbers"),
        (Prodigy, {"d0": 0}, "d0 is 0, expected a number above 0"),
        (ScheduleFreeAdamW, {"eps": -1}, "eps is -1, expected at least 0"),
        (AdamW, {"clip": 0}, "clip is 0, expected a norm above 0"),
        (AdamW, {"seed": -1}, "seed is -1, expected a whole number"),
        (AdamW, {"rates": {"a": {"w": 1}}}, "rates name factor 'w' of layer 'a'"),
        (AdamW, {"rates": {"a": {"up": -1}}}, "the rate factor of a.up is -1"),
    ],
)
def test_refusals(kind, options, message):
    with pytest.raises(LycorisError, match=message):
        kind(draw(0, np.float32), **options)
