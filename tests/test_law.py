"""The law of every adapter: applied beside a layer it gives what the changed weight gives; and
strength 0 changes nothing.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lycoris_cupy import BOFT, Conv1d, Conv2d, Conv3d, DiagOFT, Engine, Linear, bf16, to_device
from lycoris_cupy.ops import product, ready
from tests import majorants
from tests.arrays import drawn, host
from tests.bounds import assert_within, bound
from tests.cases import KINDS, PAIRS, Kind, adapters_for, channels_last

# By LyCORIS's own rule a rescale does not fade with strength: see test_what_the_rules_differ_in.
FADING = [(kind, name) for kind, name in PAIRS if adapters_for(kind.shape)[name].rule == "base"]
IDS = [f"{kind.name}-{name}" for kind, name in PAIRS]


def draw(kind, adapter, seed=0):
    """Layer, input and factors in f64, exact in bf16."""
    rng = np.random.default_rng([seed, *f"{kind.name}{adapter}".encode()])
    weight, bias = drawn(rng, *kind.weight), drawn(rng, kind.weight[0])
    layer = kind.build.from_torch(weight, bias, **kind.options)
    start = adapter.start(rng, layer.matrix)
    factors = {n: drawn(rng, *v.shape, size=0.5) for n, v in start.items()}
    if "rescale" in factors:
        factors["rescale"] = 1 + factors["rescale"] / 2
    return layer, channels_last(drawn(rng, *kind.x), kind.build.__name__ == "Linear"), factors


def engine_with(layer, adapter, factors, *, device="cpu", dtype="f64", strength=1.0):
    from lycoris_cupy.attachment import Attachment

    engine = Engine({"layer": layer}, device=device, dtype=dtype)
    engine.attachments["a"] = Attachment(
        {"layer": (adapter, factors)}, engine.device, engine.dtype, strength, layers=engine.layers
    )
    return engine


def changed_weight(layer, adapter, factors, strength):
    """The adapted weight and bias from the definition, in f64 on the CPU."""
    p = adapter.canonical(factors)
    scale = np.array([strength * adapter.scale])
    weight = layer.matrix + adapter.delta_weight(layer.matrix, p, scale)
    if isinstance(adapter, majorants.NONLINEAR):  # these are written a second time there
        again = majorants.adapted(layer.matrix, adapter, factors, strength)
        assert np.abs(weight - again).max(initial=0) < 1e-9
        weight = again
    db = adapter.delta_bias(p, layer.bias)
    bias = layer.bias if db is None else layer.bias + scale * db
    return weight, bias


def absolute(layer, adapter, factors, x, strength):
    """The output over absolute values: what rounding errors are measured against."""
    if isinstance(adapter, majorants.NONLINEAR):
        dy = np.zeros((*x.shape[:-1], layer.shape.outputs))
        dy = dy if layer.window.pointwise else layer.forward(x) * 0
        return majorants.sizes(layer, adapter, factors, x, dy, strength)[0]
    engine = engine_with(
        layer.replaced(np.abs(layer.matrix), np.abs(layer.bias)),
        adapter,
        {n: np.abs(v) for n, v in factors.items()},
        strength=abs(strength),
    )
    return engine.forward(np.abs(x))


@pytest.mark.parametrize("strength", [0.0, 0.7, 1.0, -1.0])
@pytest.mark.parametrize(("kind", "name"), PAIRS, ids=IDS)
def test_law_in_f64(kind, name, strength):
    adapter = adapters_for(kind.shape)[name]
    layer, x, factors = draw(kind, adapter)
    weight, bias = changed_weight(layer, adapter, factors, strength)
    expected = product(x, weight, layer.window, bias=bias)
    y = engine_with(layer, adapter, factors, strength=strength).forward(x)
    depth = 40 + layer.shape.taps * layer.shape.channels * 4
    assert_within(
        y,
        expected,
        bound(expected, absolute(layer, adapter, factors, x, strength), depth, np.float64),
    )


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize(("kind", "name"), PAIRS, ids=IDS)
def test_law_on_device(kind, name, dtype, device):
    """bf16 and f32 against f64. Up to four intermediates (rounded factors, inner activations) stand
    behind the last rounding.
    """
    adapter = adapters_for(kind.shape)[name]
    layer, x, factors = draw(kind, adapter, 1)
    weight, bias = changed_weight(layer, adapter, factors, 0.7)
    expected = product(x, weight, layer.window, bias=bias)
    y = engine_with(layer, adapter, factors, device=device, dtype=dtype, strength=0.7).forward(x)
    assert y.dtype == {"bf16": bf16, "f32": np.float32}[dtype]
    depth = 40 + layer.shape.taps * layer.shape.channels * 4
    size = absolute(layer, adapter, factors, x, 0.7)
    assert_within(to_device(y, "cpu"), expected, bound(expected, size, depth, y.dtype, roundings=5))


@pytest.mark.parametrize(("kind", "name"), PAIRS, ids=IDS)
def test_routes_agree(kind, name):
    """The cheap route and the one that builds the weight give the same, so a planner may choose
    either.
    """
    from lycoris_cupy.adapters import Adapter

    adapter = adapters_for(kind.shape)[name]
    layer, x, factors = draw(kind, adapter, 2)
    p, scale = adapter.canonical(factors), np.array([adapter.scale])
    change = ready(adapter.apply(None, layer, x, p, scale))
    built = Adapter.apply(adapter, None, layer, x, p, scale)
    if adapter.delta_bias(p, layer.bias) is not None:
        built = built + scale * adapter.delta_bias(p, layer.bias)
    depth = 40 + layer.shape.taps * layer.shape.channels * 4
    size = absolute(layer, adapter, factors, x, 1.0)
    assert_within(change, built, bound(built, size, depth, np.float64))
    # A change that is there already is added to.
    before = np.random.default_rng(0).standard_normal(change.shape)
    both = ready(adapter.apply(before, layer, x, p, scale))
    limit = bound(both, size + np.abs(before), depth, np.float64)
    assert_within(both, change + before, limit)


@pytest.mark.parametrize(("kind", "name"), FADING, ids=[f"{k.name}-{n}" for k, n in FADING])
def test_strength_zero_is_the_identity_bit_for_bit(kind, name):
    adapter = adapters_for(kind.shape)[name]
    layer, x, factors = draw(kind, adapter, 3)
    x.reshape(-1)[::3] = 0
    engine = engine_with(layer, adapter, factors, dtype="bf16", strength=0.0)
    base = Engine({"layer": layer}, device="cpu")
    assert engine.forward(x).tobytes() == base.forward(x).tobytes()


@pytest.mark.parametrize(("kind", "name"), PAIRS, ids=IDS)
def test_new_adapters_change_nothing(kind, name, device):
    adapter = adapters_for(kind.shape)[name]
    layer, x, _ = draw(kind, adapter, 4)
    factors = adapter.start(np.random.default_rng(0), layer.matrix)
    changed = engine_with(layer, adapter, factors, device=device, dtype="bf16").forward(x)
    base = Engine({"layer": layer}, device=device).forward(x)
    if device == "cpu":
        assert changed.tobytes() == base.tobytes()
    else:  # another route sums in another order
        size = product(np.abs(x), np.abs(layer.matrix), layer.window, bias=np.abs(layer.bias))
        value, ref = map(host, (changed, base))
        # Both are rounded: by half an ulp each, which may differ by one.
        assert_within(value, ref, bound(ref, size, 9 * 30, bf16) + 2.0**-8 * np.abs(ref))
    starts_at_nothing = ("full", "ia3", "diag-oft", "boft", "oft")
    assert any(np.any(v) for v in factors.values()) or name.startswith(starts_at_nothing)


@pytest.mark.parametrize(("kind", "name"), PAIRS, ids=IDS)
def test_gradients_are_derivatives(kind, name):
    """dx and every factor's gradient in f64, against central differences of the definition through
    the changed weight.
    """
    adapter = adapters_for(kind.shape)[name]
    layer, x, factors = draw(kind, adapter, 5)
    engine = engine_with(layer, adapter, factors, strength=0.7)
    y, pullback = engine.vjp(x)
    rng = np.random.default_rng(6)
    dy = rng.standard_normal(y.shape)
    dx, grads = pullback(dy)

    def value(at_x, at):
        weight, bias = changed_weight(layer, adapter, at, 0.7)
        return float((product(at_x, weight, layer.window, bias=bias) * dy).sum())

    step = 2.0**-16

    def check(gradient, moved):
        expected = (moved(step) - moved(-step)) / (2 * step)
        size = float((absolute(layer, adapter, factors, x, 0.7) * np.abs(dy)).sum())
        # Rounding of two sums of this size over the step, and the third derivative (at most cubic
        # in a factor).
        assert abs(gradient - expected) <= size * (2.0**-44 / step + 16 * step**2)

    d = rng.standard_normal(x.shape)
    check(float((dx * d).sum()), lambda t: value(x + t * d, factors))
    for factor, gradient in grads["a"]["layer"].items():
        assert gradient.shape == factors[factor].shape
        d = rng.standard_normal(gradient.shape)
        check(
            float((gradient * d).sum()),
            lambda t, f=factor, d=d: value(x, {**factors, f: factors[f] + t * d}),
        )


@st.composite
def kinds(draw):
    """A layer of any geometry: axes, kernel, stride, padding, dilation, groups, channels."""
    axes, groups = draw(st.integers(0, 3)), draw(st.sampled_from([1, 1, 2, 4]))
    groups = groups if axes else 1
    inputs, outputs = draw(st.integers(1, 6)), groups * draw(st.integers(1, 6))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(axes))
    walk = {
        name: tuple(draw(st.integers(low, 2)) for _ in range(axes))
        for name, low in (("stride", 1), ("padding", 0), ("dilation", 1))
    }
    space = tuple(
        draw(st.integers(max(d * (k - 1) + 1 - 2 * p, 1), 6))
        for k, p, d in zip(kernel, walk["padding"], walk["dilation"], strict=True)
    )
    options = {**walk, "groups": groups} if axes else {}
    build = (Linear, Conv1d, Conv2d, Conv3d)[axes]
    x = (draw(st.integers(0, 2)), inputs * groups, *space)
    return Kind("any", build, (outputs, inputs, *kernel), x, options)


@given(kinds(), st.data())
def test_law_for_any_geometry(kind, data):
    adapters = adapters_for(kind.shape)
    name = data.draw(st.sampled_from(sorted(adapters)))
    layer, x, factors = draw(kind, adapters[name], 10)
    weight, bias = changed_weight(layer, adapters[name], factors, 0.7)
    expected = product(x, weight, layer.window, bias=bias)
    y = engine_with(layer, adapters[name], factors, strength=0.7).forward(x)
    size = absolute(layer, adapters[name], factors, x, 0.7)
    depth = 40 + layer.shape.taps * layer.shape.channels * 4
    assert_within(y, expected, bound(expected, size, depth, np.float64), name)


def gradient_sizes(layer, adapter, factors, x, dy):
    """dx and the gradients of the factors over absolute values, at a strength of 0.7."""
    if isinstance(adapter, majorants.NONLINEAR):
        _, size_x, size_p, _ = majorants.sizes(layer, adapter, factors, x, dy, 0.7)
        return size_x, {"a": {"layer": size_p}}
    plain = layer.replaced(np.abs(layer.matrix), np.abs(layer.bias))
    positive = {n: np.abs(v) for n, v in factors.items()}
    return engine_with(plain, adapter, positive, strength=0.7).vjp(np.abs(x))[1](np.abs(dy))


def changed_size(layer, adapter, factors):
    """The changed weight at strength 1 over absolute values."""
    if isinstance(adapter, majorants.NONLINEAR):
        return majorants.weight_size(layer.matrix, adapter, factors, 1.0)
    plain = layer.replaced(np.abs(layer.matrix), np.abs(layer.bias))
    return changed_weight(plain, adapter, {n: np.abs(v) for n, v in factors.items()}, 1.0)[0]


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_gradients_on_device(kind, device):
    """bf16 gradients against f64's, within the bound that the rules over absolute values give."""
    for name, adapter in adapters_for(kind.shape).items():
        layer, x, factors = draw(kind, adapter, 7)
        y, pullback = engine_with(layer, adapter, factors, strength=0.7).vjp(x)
        dy = drawn(np.random.default_rng(8), *y.shape)
        dx, grads = pullback(dy)
        size_x, size_p = gradient_sizes(layer, adapter, factors, x, dy)
        _, pull = engine_with(
            layer, adapter, factors, device=device, dtype="bf16", strength=0.7
        ).vjp(x)
        found_x, found = pull(dy)
        assert found_x.dtype == bf16
        depth = 64 + int(np.prod(y.shape)) + layer.shape.taps * layer.shape.channels * 4
        assert_within(
            to_device(found_x, "cpu"), dx, bound(dx, size_x, depth, bf16, roundings=6), f"{name} dx"
        )
        for factor, gradient in grads["a"]["layer"].items():
            value = to_device(found["a"]["layer"][factor], "cpu")
            assert value.dtype == np.float32
            limit = bound(gradient, size_p["a"]["layer"][factor], depth, bf16, roundings=6)
            assert_within(value, gradient, limit, f"{name} {factor}")


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_merged_is_live(kind, device):
    """merged() against the definition: f32 sums, one rounding of the weight; and the live engine is
    untouched.
    """
    for name, adapter in adapters_for(kind.shape).items():
        layer, x, factors = draw(kind, adapter, 9)
        engine = engine_with(layer, adapter, factors, device=device, dtype="bf16", strength=-1.0)
        before = to_device(engine.layers["layer"].weight, "cpu").tobytes()
        merged = engine.merged()
        weight, bias = changed_weight(layer, adapter, factors, -1.0)
        size = changed_size(layer, adapter, factors)
        found = merged.layers["layer"]
        depth = 64 * max(adapter.rank, 8)
        assert_within(
            to_device(found.matrix, "cpu"), weight, bound(weight, size, depth, bf16), name
        )
        assert_within(
            to_device(found.bias, "cpu"), bias, bound(bias, np.abs(bias) + 4, 4, bf16), name
        )
        assert to_device(engine.layers["layer"].weight, "cpu").tobytes() == before
        assert not merged.attachments


@pytest.mark.parametrize("algorithm", [DiagOFT, BOFT])
def test_what_the_rules_differ_in(algorithm):
    """By 'reference' a rescale stays at strength 0, and every stage of a butterfly fades for
    itself; at strength 1 and without a rescale on one stage the two rules are one.
    """
    kind = KINDS[0]
    made = {
        rule: algorithm.create(kind.shape, block_size=10, rescaled=True, rule=rule)
        for rule in ("base", "reference")
    }
    layer, _, factors = draw(kind, made["base"], 11)

    def weight(rule, strength):
        return changed_weight(layer, made[rule], factors, strength)[0]

    assert np.abs(weight("base", 0.0) - layer.matrix).max() == 0
    assert np.abs(weight("reference", 0.0) - layer.matrix * factors["rescale"]).max() < 1e-12
    assert np.abs(weight("base", 1.0) - weight("reference", 1.0)).max() < 1e-12
    half = (layer.matrix + weight("base", 1.0)) / 2
    assert np.abs(weight("base", 0.5) - half).max() < 1e-12
    assert np.abs(weight("reference", 0.5) - half).max() > 1e-2
