"""DoRA on every adapter that carries it and every kind of layer: the law, the gradients, strength,
several at once, files. The norms are checked against those of the built weight.
"""

import numpy as np
import pytest

from lycoris_cupy import Conv2d, Engine, Linear, bf16, to_device
from lycoris_cupy.adapters import DoRA, LoCon, LoHa, LoKr
from lycoris_cupy.attachment import Attachment
from lycoris_cupy.errors import LycorisError
from lycoris_cupy.ops import conv_cpu, product
from lycoris_cupy.optim import AdamW
from tests import magnitudes
from tests.arrays import drawn
from tests.bounds import assert_within, bound
from tests.cases import KINDS, Kind, adapters_for
from tests.test_law import draw, engine_with

FORMS = [
    (kind, name, axis)
    for kind in KINDS
    for name, adapter in adapters_for(kind.shape).items()
    if adapter.decomposable
    for axis in ("output", "input")
]
IDS = [f"{kind.name}-{name}-{axis}" for kind, name, axis in FORMS]
# One kind of each: linear, a walk with dilation, groups whose weight LoKr builds, depthwise.
FEW = ("linear", "conv3x2 dilation", "groups 4", "depthwise")
SOME = [form for form in FORMS if form[0].name in FEW]
SOME_IDS = [f"{kind.name}-{name}-{axis}" for kind, name, axis in SOME]


def made(kind, name, axis, rule="base", seed=0):
    adapter = DoRA.over(adapters_for(kind.shape)[name], axis, rule)
    return adapter, *draw(kind, adapter, seed)


def depth_of(layer):
    return 64 + layer.shape.taps * layer.shape.channels * 4 + layer.shape.outputs


@pytest.mark.parametrize(("kind", "name", "axis"), FORMS, ids=IDS)
def test_law_in_f64(kind, name, axis):
    for rule, strength in (("base", 0.7), ("base", -1.0), ("reference", 0.7), ("reference", 0.0)):
        adapter, layer, x, factors = made(kind, name, axis, rule)
        weight = magnitudes.adapted(layer.matrix, adapter, factors, strength)
        expected = product(x, weight, layer.window, bias=layer.bias)
        size, *_, size_weight = magnitudes.sizes(
            layer, adapter, factors, x, np.zeros_like(expected), strength
        )
        engine = engine_with(layer, adapter, factors, strength=strength)
        limit = bound(expected, size, depth_of(layer), np.float64)
        assert_within(engine.forward(x), expected, limit, rule)
        merged = engine.merged().layers["layer"].matrix
        assert_within(merged, weight, bound(weight, size_weight, depth_of(layer), np.float64))


@pytest.mark.parametrize(("kind", "name", "axis"), FORMS, ids=IDS)
def test_gradients_are_derivatives(kind, name, axis):
    """dx and every factor's gradient, the magnitudes' too, in f64 against central differences of
    the definition.
    """
    adapter, layer, x, factors = made(kind, name, axis, seed=1)
    y, pullback = engine_with(layer, adapter, factors, strength=0.7).vjp(x)
    rng = np.random.default_rng(6)
    dy = rng.standard_normal(y.shape)
    dx, grads = pullback(dy)
    size = magnitudes.sizes(layer, adapter, factors, x, dy, 0.7)

    def value(at_x, at):
        weight = magnitudes.adapted(layer.matrix, adapter, at, 0.7)
        return float((product(at_x, weight, layer.window, bias=layer.bias) * dy).sum())

    step = 2.0**-16
    for key, base in {"x": x, **factors}.items():
        gradient = dx if key == "x" else grads["a"]["layer"][key]
        d = rng.standard_normal(base.shape)

        def moved(t, key=key, d=d):
            if key == "x":
                return value(x + t * d, factors)
            return value(x, {**factors, key: factors[key] + t * d})

        first = (moved(step) - moved(-step)) / (2 * step)
        second = (moved(2 * step) - moved(-2 * step)) / (4 * step)
        # A norm is no polynomial: the difference at twice the step shows the third derivative.
        rounding = float((size[0] * np.abs(dy)).sum()) * 2.0**-44 / step
        found = float((gradient * d).sum())
        assert abs(found - first) <= rounding + abs(second - first), key


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize(("kind", "name", "axis"), SOME, ids=SOME_IDS)
def test_on_device(kind, name, axis, dtype, device):
    """Output, gradients and merged weight in bf16 and f32 against f64."""
    adapter, layer, x, factors = made(kind, name, axis, seed=2)
    y, pull = engine_with(layer, adapter, factors, strength=0.7).vjp(x)
    dy = drawn(np.random.default_rng(8), *y.shape)
    dx, grads = pull(dy)
    size_y, size_x, size_p, size_w = magnitudes.sizes(layer, adapter, factors, x, dy, 0.7)
    engine = engine_with(layer, adapter, factors, device=device, dtype=dtype, strength=0.7)
    found_y, pull = engine.vjp(x)
    found_x, found = pull(dy)
    kept = bf16 if dtype == "bf16" else np.float32
    depth = depth_of(layer) + int(np.prod(y.shape))

    def near(value, expected, size, what, roundings=8):
        limit = bound(expected, size, depth, kept, roundings)
        assert_within(to_device(value, "cpu"), expected, limit, what)

    near(found_y, y, size_y, "y")
    near(found_x, dx, size_x, "dx")
    for factor, gradient in grads["a"]["layer"].items():
        value = found["a"]["layer"][factor]
        assert value.dtype == np.float32
        near(value, gradient, size_p[factor], factor)
    weight = magnitudes.adapted(layer.matrix, adapter, factors, 0.7)
    near(engine.merged().layers["layer"].matrix, weight, size_w, "merged", 1)


@pytest.mark.parametrize(("kind", "name", "axis"), SOME, ids=SOME_IDS)
def test_strength_zero_is_the_identity_bit_for_bit(kind, name, axis):
    adapter, layer, x, factors = made(kind, name, axis, seed=3)
    engine = engine_with(layer, adapter, factors, dtype="bf16", strength=0.0)
    base = Engine({"layer": layer}, device="cpu")
    assert engine.forward(x).tobytes() == base.forward(x).tobytes()


@pytest.mark.parametrize(("kind", "name", "axis"), SOME, ids=SOME_IDS)
def test_new_adapters_change_nothing(kind, name, axis):
    """The magnitudes start as the norms of the weight, kept in f32: rounded to bf16 they would
    change it by 2^-9.
    """
    adapter, layer, x, _ = made(kind, name, axis)
    factors = adapter.start(np.random.default_rng(0), layer.matrix.astype(bf16))
    assert factors["dora_scale"].dtype == np.float32
    engine = engine_with(layer, adapter, factors, dtype="bf16")
    assert engine.parameters("a")["layer"]["dora_scale"].dtype == np.float32
    expected = np.asarray(Engine({"layer": layer}, device="cpu").forward(x), np.float64)
    size = product(np.abs(x), np.abs(layer.matrix), layer.window, bias=np.abs(layer.bias))
    # m / (norm + eps) is 1 within a few 2^-24, which shows only where a sum was near a tie.
    limit = bound(expected, size, 9, bf16)
    found = np.asarray(engine.forward(x), np.float64)
    assert_within(found, expected, limit)
    assert (found == expected).mean() > 0.9


def several(kind, axes):
    """A layer with a DoRA an axis and a plain LoCon, at different strengths."""
    rng = np.random.default_rng(4)
    layer, x, _ = draw(kind, LoCon(kind.shape, 3), 5)
    engine, expected = Engine({"layer": layer}, device="cpu", dtype="f64"), layer.matrix.copy()
    on = [LoCon(kind.shape, 3, 2.0), LoHa(kind.shape, 2), LoKr.create(kind.shape, 1, 2.0, factor=2)]
    for i, axis in enumerate(axes):
        adapter = on[i % 3] if axis is None else DoRA.over(on[i % 3], axis)
        factors = {
            n: rng.standard_normal(v.shape) * 0.5
            for n, v in adapter.init(np.random.default_rng(0)).items()
        }
        strength = 0.9 - 0.6 * i
        engine.attachments[f"a{i}"] = Attachment(
            {"layer": (adapter, factors)}, "cpu", np.float64, strength, layers=engine.layers
        )
        if axis is None:
            scale = np.array([strength * adapter.scale])
            expected += adapter.delta_weight(layer.matrix, adapter.canonical(factors), scale)
        else:
            adapted = magnitudes.adapted(layer.matrix, adapter, factors, strength)
            expected += adapted - layer.matrix
    return engine, layer, x, expected


@pytest.mark.parametrize(
    "axes",
    [
        ("output", "output"),
        ("input", "input", None),
        (None, "output", None, "output"),
        ("output", "input"),
        ("input", None, "output", "input"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [k for k in KINDS if k.name in FEW], ids=lambda k: k.name)
def test_several_at_once(kind, axes):
    """W + sum of s_i (W'_i - W), each W'_i with the norm of its own adapted weight."""
    engine, layer, x, weight = several(kind, axes)
    expected = product(x, weight, layer.window, bias=layer.bias)
    y, pullback = engine.vjp(x)
    assert np.abs(y - expected).max() < 1e-12 * np.abs(expected).max()
    merged = engine.merged().layers["layer"].matrix
    assert np.abs(merged - weight).max() < 1e-13 * np.abs(weight).max()
    dy = np.random.default_rng(1).standard_normal(y.shape)
    dx, _ = pullback(dy)
    d = np.random.default_rng(2).standard_normal(x.shape)
    slope = float((product(d, weight, layer.window) * dy).sum())  # y is linear in x
    assert abs(slope - float((dx * d).sum())) < 1e-11 * np.abs(dx * d).sum()


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("name", ["locon", "locon tucker", "locon per tap", "loha", "lokr w1 w2ab"])
def test_one_product_by_the_weight_and_no_change_of_its_size(monkeypatch, name, axis):
    """What makes it cheap: a step multiplies by W as often as without DoRA, and builds nothing of
    its size.
    """
    kind = Kind("large", Conv2d, (40, 28, 3, 3), (1, 28, 4, 5), {"padding": 1})
    on = adapters_for(kind.shape)[name]
    assert on.route != "delta"
    adapter = DoRA.over(on, axis)
    layer, x, factors = draw(kind, adapter)
    monkeypatch.setattr(type(on), "delta_weight", lambda *_: pytest.fail("the change was built"))
    made = []
    for op in ("conv", "conv_dx"):
        run = getattr(conv_cpu, op)

        def counted(a, w, *rest, run=run, op=op):
            made.extend([op] * (w.shape == layer.matrix.shape))
            return run(a, w, *rest)

        monkeypatch.setattr(conv_cpu, op, counted)
    y, pullback = engine_with(layer, adapter, factors, strength=0.7).vjp(x)
    pullback(np.ones(y.shape))
    assert sorted(made) == ["conv", "conv_dx"]


def test_a_column_of_zeros_stays_zero():
    """The weight of a zero convolution has no direction: no NaN, no change, no gradient through
    the norm.
    """
    engine = Engine({"layer": Linear(np.zeros((5, 3)), np.ones(3))}, device="cpu", dtype="f64")
    engine.add("a", "locon", rank=2, dora="output")
    y, pullback = engine.vjp(np.ones((2, 5)))
    dx, grads = pullback(np.ones((2, 3)))
    assert (y == 1).all() and (dx == 0).all()
    assert all(np.isfinite(g).all() for g in grads["a"]["layer"].values())


@pytest.mark.parametrize("name", ["locon", "loha", "lokr"])
def test_training_lowers_the_loss(name):
    rng = np.random.default_rng(0)
    layer = Linear.from_torch(rng.standard_normal((6, 9)) / 3, rng.standard_normal(6))
    x, target = rng.standard_normal((32, 9)), rng.standard_normal((32, 6))
    engine = Engine({"layer": layer}, device="cpu", dtype="bf16")
    engine.add("a", name, rank=2, dora="output")
    optimizer, losses = AdamW(engine.parameters("a"), lr=2e-2, weight_decay=0.0), []
    for _ in range(40):
        y, pullback = engine.vjp(x)
        difference = np.asarray(y, np.float64) - target
        losses.append(float((difference**2).mean()))
        _, grads = pullback(2 * difference / y.size)
        engine.set_parameters("a", optimizer.step(grads["a"]))
    assert losses[-1] < 0.8 * losses[0]


def test_options_are_checked():
    engine = Engine({"a": Linear(np.ones((3, 5)))}, device="cpu")
    with pytest.raises(LycorisError, match="dora is 'row', expected one of output, input"):
        engine.add("a", "locon", dora="row")
    with pytest.raises(LycorisError, match="rule is 'mine', expected one of base, reference"):
        engine.add("a", "locon", dora="output", rule="mine")
    for option, known in (
        ({"dora": "row"}, "output, input"),
        ({"rule": "mine"}, "base, reference"),
        ({"dialect": "oft:mine"}, "oft:lycoris"),
    ):
        with pytest.raises(LycorisError, match=f"expected one of {known}"):
            engine.attach("there is none.safetensors", **option)
    with pytest.raises(LycorisError, match="DoRA stands on locon, loha and lokr"):
        engine.add("a", "full", dora="output")
    engine.add("a", "loha", rank=2, dora="input")
    assert "loha with dora per input rank 2, scale 1" in engine.explain()


def test_strength_is_seen_without_attaching_again():
    engine = Engine({"a": Linear(np.ones((3, 5)))}, device="cpu", dtype="f64")
    engine.add("a", "locon", dora="output", rule="reference")
    engine.set_parameters("a", {"a": {"up": np.ones((4, 5))}})
    x = np.random.default_rng(0).standard_normal((2, 3))
    base, full = x @ np.ones((3, 5)), engine.forward(x)
    engine.strength["a"] = 0.0  # the reference's rule: the undecomposed adapter is left
    down = engine.parameters("a")["a"]["down"]
    assert np.abs(engine.forward(x) - (base + x @ down @ np.ones((4, 5)))).max() < 1e-13
    engine.strength["a"] = 1.0
    assert engine.forward(x).tobytes() == full.tobytes()
