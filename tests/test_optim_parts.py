"""What goes with the optimizers: schedules, rates, clipping, sums, averages, norms, random bits."""

import math

import numpy as np
import pytest

from lycoris_cupy import Conv2d, Engine, Linear, bf16, to_device
from lycoris_cupy.errors import DtypeError, LycorisError, MatchError, ShapeError
from lycoris_cupy.optim import (
    SGD,
    Accumulator,
    Average,
    apply_max_norm,
    constant,
    cosine,
    linear,
    philox4x32,
    random_bits,
    rate_factors,
    round_stochastically,
)
from lycoris_cupy.optim.nested import mapped
from tests.test_optim import draw, on
from tests.test_optim_methods import flat

# Random123's kat_vectors, rows "philox4x32 10": counter, key, result.
KNOWN = [
    ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize("counter, key, expected", KNOWN)
def test_philox_gives_the_published_numbers(counter, key, expected, device):
    arrays = [to_device(np.array([word], np.uint32), device) for word in words(counter)]
    first, second = words(key)
    found = [int(to_device(x, "cpu")[0]) for x in philox4x32(arrays, (first, second))]
    assert found == words(expected)


def test_random_bits_are_of_seed_step_tensor_and_element(device):
    """Element by element what the counter of the docstring gives; every part of it counts."""
    seed, step = 0x299F31D0_A4093822, to_device(np.array([9], np.uint32), device)
    found = to_device(random_bits((3, 5), seed, step, 4), "cpu")
    assert found.shape == (3, 5) and found.dtype == np.uint32
    for i, value in enumerate(found.ravel()):
        counter = [np.array([word], np.uint32) for word in (i // 4, 4, 9, 0)]
        assert philox4x32(counter, (0xA4093822, 0x299F31D0))[i % 4][0] == value
    others = [
        random_bits((3, 5), seed + 1, step, 4),
        random_bits((3, 5), seed + 2**32, step, 4),
        random_bits((3, 5), seed, step + np.uint32(1), 4),
        random_bits((3, 5), seed, step, 5),
    ]
    assert all((to_device(other, "cpu") != found).sum() > 12 for other in others)
    assert random_bits((0, 2), 0, step, 0).shape == (0, 2)


def test_rounding_is_to_a_neighbour_and_right_on_average(device):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(1000) * 10.0 ** rng.integers(-30, 30, 1000)).astype(np.float32)
    x[:4] = 0, -0.0, np.inf, -np.inf
    step = to_device(np.array([3], np.uint32), device)
    down = (x.view(np.uint32) & 0xFFFF0000).view(np.float32)  # towards zero
    gap = ((x.view(np.uint32) & 0xFFFF0000) + np.where(x == down, 0, 1 << 16)).astype(np.uint32)
    up = gap.view(np.float32)
    on_device = to_device(x, device)
    total = np.zeros(1000)
    with np.errstate(invalid="ignore"):
        share = np.where(
            x == down, 0, (x.astype(np.float64) - down) / (up.astype(np.float64) - down)
        )
    for tensor in range(256):
        found = to_device(round_stochastically(on_device, 1, step, tensor), "cpu")
        assert found.dtype == bf16
        value = found.astype(np.float32)
        assert ((value == down) | (value == up)).all()
        total += (value == up) & (x != down)
    # Each count is binomial: together they are within five deviations.
    deviation = math.sqrt((256 * share * (1 - share)).sum())
    assert abs(total.sum() - 256 * share.sum()) < 5 * deviation
    assert (abs(total - 256 * share) <= 6 * np.sqrt(256 * share * (1 - share)) + 1).all()


def test_nan_is_rounded_to_nan():
    bits = np.array([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000], np.uint32)
    for tensor in range(16):
        found = round_stochastically(bits.view(np.float32), 0, np.zeros(1, np.uint32), tensor)
        assert np.isnan(found.astype(np.float32)).all()
    with pytest.raises(DtypeError, match="has dtype float64, expected f32"):
        round_stochastically(np.zeros(3), 0, np.zeros(1, np.uint32), 0)


def test_schedules():
    warm = [0.25, 0.5, 0.75, 1.0]
    assert [constant(1.0, 4)(i) for i in (0, 1, 2, 3, 4, 99)] == [*warm, 1, 1]
    assert [constant(2.0)(i) for i in (0, 7)] == [2, 2]
    found = [linear(1.0, 14, 4, end=0.5)(i) for i in range(20)]
    expected = [*warm, *(1 - 0.05 * i for i in range(10)), *[0.5] * 6]
    np.testing.assert_allclose(found, expected, 1e-12)
    found = [cosine(1.0, 14, 4, end=0.2)(i) for i in range(20)]
    middle = [0.2 + 0.8 * (1 + math.cos(math.pi * i / 10)) / 2 for i in range(10)]
    np.testing.assert_allclose(found, [*warm, *middle, *[0.2] * 6], 1e-12)
    with pytest.raises(LycorisError, match="steps is 4, expected more than the warm-up of 4"):
        cosine(1.0, 4, 4)
    with pytest.raises(LycorisError, match="lr is -1, expected at least 0"):
        constant(-1)


def test_rates_by_pattern():
    """Layers and factors; what several patterns match is multiplied by all."""
    p = draw(0, np.float32)
    found = rate_factors(p, {"a": 0.5, "*.up": 3, "b.*": 0}, plus=4)
    assert found == {"a": {"up": 0.5 * 3 * 4, "down": 0.5}, "b": {"w1": 0}}
    with pytest.raises(MatchError, match=r"'c\*' matches no layer and no factor of: a.up, a.down"):
        rate_factors(p, {"c*": 1})
    with pytest.raises(LycorisError, match="the rate of 'a' is -1, expected at least 0"):
        rate_factors(p, {"a": -1})
    with pytest.raises(MatchError, match="no factor is an up side"):
        rate_factors({"a": {"w1": 0}}, plus=16)


@pytest.mark.parametrize(
    "algorithm, options, ups",
    [
        ("locon", {"tucker": True}, {"up"}),
        ("loha", {}, {"w1_up", "w2_up"}),
        ("lokr", {"decompose_both": True, "factor": 8}, {"w1_a", "w2_up"}),
        ("lokr", {"factor": 4}, {"w2_up"}),
        ("dylora", {}, {"up"}),
    ],
)
def test_lora_plus_raises_the_side_of_the_outputs(algorithm, options, ups):
    engine = Engine({"a": Conv2d(np.ones((3, 3, 64, 64), np.float32))}, device="cpu")
    engine.add("x", algorithm, rank=2, **options)
    found = rate_factors(engine.parameters("x"), plus=16)["a"]
    assert {name for name, factor in found.items() if factor == 16} == ups
    assert {factor for name, factor in found.items() if name not in ups} == {1.0}


@pytest.mark.parametrize("dtype", [np.float64, np.float32, bf16])
def test_clipping_keeps_the_direction(dtype, device):
    """A step of rate 1 from 0 is the clipped gradient with a minus."""
    grads = draw(0, dtype)
    whole = flat(grads)
    norm = np.linalg.norm(whole)
    start = mapped(
        lambda g: np.zeros(g.shape, np.float64 if dtype == np.float64 else np.float32), grads
    )
    for bound in (norm / 3, norm * 3):
        optimizer = SGD(on(device, start), lr=1.0, momentum=0, weight_decay=0, clip=bound)
        found = -flat(on("cpu", optimizer.step(on(device, grads))))
        np.testing.assert_allclose(float(to_device(optimizer.grad_norm, "cpu")[0]), norm, 1e-6)
        np.testing.assert_allclose(found, whole * min(1, bound / norm), 1e-6)
        assert np.linalg.norm(found) <= bound * (1 + 1e-6)
    assert (flat(grads) == whole).all()
    with pytest.raises(LycorisError, match="clip is 0, expected a norm above 0"):
        SGD(start, clip=0)


def test_clipping_of_nothing_and_of_what_is_not_finite(device):
    zero = {"a": {"w": np.zeros(3, np.float32)}}

    def stepped(grads):
        optimizer = SGD(on(device, zero), lr=1.0, momentum=0, weight_decay=0, clip=1.0)
        return to_device(optimizer.step(on(device, grads))["a"]["w"], "cpu")

    assert (stepped(zero) == 0).all()
    assert np.isnan(stepped({"a": {"w": np.array([1, np.nan, 2], np.float32)}})).all()


def test_accumulation_is_the_weighted_mean(device):
    accumulator = Accumulator(on(device, draw(0, bf16)))
    for again in (0, 10):
        grads = [draw(i + again, np.float32) for i in range(3)]
        for g, weight in zip(grads, (1, 2, 5), strict=True):
            accumulator.add(on(device, g), weight)
        expected = sum(w * flat(g) for g, w in zip(grads, (1, 2, 5), strict=True)) / 8
        np.testing.assert_allclose(flat(on("cpu", accumulator.mean())), expected, 1e-5, 1e-6)
    with pytest.raises(LycorisError, match="nothing was added"):
        accumulator.mean()
    with pytest.raises(LycorisError, match="weight is 0, expected a number above 0"):
        accumulator.add(on(device, draw(0, np.float32)), 0)
    with pytest.raises(ShapeError, match=r"a.up has shape \(1,\)"):
        accumulator.add({"a": {"up": np.zeros(1), "down": np.zeros(7)}})


@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_is_its_formula(warmup, device):
    average = Average(on(device, draw(0, np.float64)), 0.3, warmup)
    expected, kept = flat(draw(0, np.float64)), None
    for t in range(1, 6):
        decay = min(0.3, (1 + t) / (10 + t)) if warmup else 0.3
        expected = decay * expected + (1 - decay) * flat(draw(t, np.float64))
        average.update(on(device, draw(t, np.float64)))
        np.testing.assert_allclose(flat(on("cpu", average.values)), expected, 1e-12)
        kept = average.snapshot() if t == 3 else kept
    last = flat(on("cpu", average.values))
    assert kept is not None
    average.restore(kept)
    for t in (4, 5):
        average.update(on(device, draw(t, np.float64)))
    assert (flat(on("cpu", average.values)) == last).all()
    with pytest.raises(MatchError, match="no value for factor 'up' of layer 'a'"):
        average.update({})


@pytest.mark.parametrize(
    "algorithm, options",
    [
        ("locon", {}),
        ("locon", {"tucker": True}),
        ("locon", {"dora": "output"}),
        ("loha", {}),
        ("loha", {"tucker": True}),
        ("lokr", {"factor": 4}),
        ("lokr", {"factor": 4, "decompose_both": True, "tucker": True}),
    ],
)
def test_max_norm_bounds_the_change(algorithm, options, device):
    """The change as the engine builds it has the bound's norm, and the same direction."""
    engine = Engine(
        {"a": Conv2d(np.ones((3, 3, 16, 16), np.float32))}, device=device, dtype=np.float64
    )
    engine.add("x", algorithm, rank=2, alpha=3.0, **options)
    adapter = engine.attachments["x"].adapters["a"]
    plain = getattr(adapter, "on", adapter)
    rng = np.random.default_rng(0)
    p = {
        "a": {
            n: to_device(rng.standard_normal(v.shape), device)
            for n, v in engine.parameters("x")["a"].items()
        }
    }

    def change():
        host = {n: to_device(p["a"][n], "cpu") for n in plain.factors()}
        weight = np.zeros((9, 16, 16))
        return plain.delta_weight(weight, plain.canonical(host), np.array([plain.scale]))

    before, magnitude = change(), to_device(p["a"].get("dora_scale", np.ones(1)), "cpu").copy()
    norm = np.linalg.norm(before)
    report = apply_max_norm(engine.attachments["x"].adapters, p, 2 * norm)
    assert report.scaled == 0 and (change() == before).all()
    np.testing.assert_allclose([report.mean, report.largest], norm, 1e-9)
    report = apply_max_norm(engine.attachments["x"].adapters, p, norm / 5)
    assert report.scaled == 1
    np.testing.assert_allclose(change(), before / 5, 1e-9, 1e-12)
    assert (to_device(p["a"].get("dora_scale", np.ones(1)), "cpu") == magnitude).all()


def test_max_norm_of_rotations_is_that_of_the_blocks_and_leaves_others(device):
    layers = {"a": Linear(np.ones((8, 8), np.float32)), "b": Linear(np.ones((8, 8), np.float32))}
    engine = Engine(layers, device=device)
    engine.add("x", "diag-oft", ["a"], rank=2)
    engine.add("y", "full", ["b"])
    adapters = {**engine.attachments["x"].adapters, **engine.attachments["y"].adapters}
    shapes = {**engine.parameters("x"), **engine.parameters("y")}
    p = {
        layer: {n: to_device(np.ones(v.shape, np.float32), device) for n, v in factors.items()}
        for layer, factors in shapes.items()
    }
    size = math.sqrt(p["a"]["blocks"].size)
    report = apply_max_norm(adapters, p, size / 4)
    assert report == (1, size / 4, size / 4)
    np.testing.assert_allclose(to_device(p["a"]["blocks"], "cpu"), 0.25, 1e-6)
    assert (to_device(p["b"]["diff"], "cpu") == 1).all()
    assert apply_max_norm(adapters, {"b": p["b"]}, 0.1) == (0, 0, 0)
    with pytest.raises(LycorisError, match="bound of the norm is nan"):
        apply_max_norm(adapters, p, float("nan"))


def test_max_norm_of_bf16_factors_is_rounded_once(device):
    engine = Engine({"a": Linear(np.ones((8, 8), np.float32))}, device=device)
    engine.add("x", "locon", rank=2)
    ones = {"down": np.ones((8, 2), bf16), "up": np.full((2, 8), 3, bf16)}
    p = on(device, {"a": ones})
    norm = 3 * 2 * 8  # every value of the change is 6, on 8 x 8
    assert apply_max_norm(engine.attachments["x"].adapters, p, norm / 3) == (1, norm / 3, norm / 3)
    for name, value in (("down", 1), ("up", 3)):
        found = to_device(p["a"][name], "cpu")
        assert (found == np.float32(value * 3**-0.5).astype(bf16)).all() and found.dtype == bf16
