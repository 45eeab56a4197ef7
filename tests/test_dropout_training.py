"""Dropout in an engine: when it acts, what is refused, its statistics, and in captured steps."""

import numpy as np
import pytest

from lycoris_cupy import Conv2d, Engine, LayerNorm, Linear, LoCon, Norm, layers, ops, to_device
from lycoris_cupy.adapters import ALGORITHMS
from lycoris_cupy.attachment import Attachment
from lycoris_cupy.errors import DtypeError, LycorisError, ShapeError
from lycoris_cupy.optim import AdamW
from tests import masks
from tests.arrays import host
from tests.test_graph import data, engine_on, loss

ALL = {"dropout": 0.3, "rank_dropout": 0.3, "module_dropout": 0.2}


def trained(device, **knobs):
    """Two layers with a locon whose factors are not at their start."""
    engine = engine_on(device)
    rng = np.random.default_rng(0)
    for layer, p in engine.parameters("a").items():
        engine.set_parameters(
            "a", {layer: {n: rng.standard_normal(v.shape, np.float32) for n, v in p.items()}}
        )
    engine.set_dropout("a", **knobs)
    return engine


def number(step, device):
    return to_device(np.array([step], np.uint32), device)


def test_the_mask_is_the_published_generators(device):
    """Bit for bit, on every device: elements, an axis, what is kept of it, and one scalar."""
    draw = ops.Draw(0.3, 2**63 + 5, tensor=3, kind=1)
    step = number(2**32 - 1, device)
    ones = to_device(np.ones((7, 10), np.float32), device)
    numbers = {"step": 2**32 - 1, "tensor": 3, "kind": 1, "seed": 2**63 + 5}
    for axis in (None, 0, 1):
        m = np.broadcast_to(masks.along((7, 10), axis, 0.3, **numbers), (7, 10))
        assert (host(ops.dropout(ones, draw, step, axis=axis)) == m).all()
    for entries in (1, 7, 10, 1001):
        m = masks.mask(entries, 0.3, **numbers)
        found = host(ops.kept_gain(entries, draw, step, np.float32))
        assert found == np.float32(entries / m.sum() if m.any() else 0)
    assert host(ops.kept_gain(0, draw, step, np.float32)) == 0


def test_where_nothing_is_kept_the_gain_is_zero(device):
    """Not NaN, as the reference has it; and what is dropped may be infinite."""
    draw = ops.Draw(1 - 2.0**-33, 1)
    x = to_device(np.full((3, 5), np.inf, np.float32), device)
    step = number(4, device)
    gain = ops.kept_gain(3, draw, step, np.float32)
    assert host(gain) == 0
    assert (host(ops.dropout(x, draw, step, axis=0, gain=draw.inverse)) == 0).all()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_means_and_variances(p, device):
    """Within five deviations of what independent draws give: of the mask, of inverted elements, of
    neighbours, and from one step, tensor, kind and seed to the next.
    """
    n = 40_000
    ones = to_device(np.ones(n, np.float64), device)

    def mask(seed=0, tensor=0, kind=1, step=1):
        return host(ops.dropout(ones, ops.Draw(p, seed, tensor, kind), number(step, device)))

    m = mask()
    spread = np.sqrt(p * (1 - p) / n)
    assert set(np.unique(m)) == {0.0, 1.0}
    assert abs(m.mean() - (1 - p)) < 5 * spread
    inverted = ops.dropout(ones, ops.Draw(p, 0), number(1, device), gain=ops.Draw(p, 0).inverse)
    assert abs(host(inverted).mean() - 1) < 5 * spread / (1 - p)
    deviation = np.sqrt(p * (1 - p) * (1 - 4 * p * (1 - p)) / n) + p * (1 - p) * 5 / n
    assert abs(m.var() - p * (1 - p)) < 5 * deviation
    others = [mask(seed=1), mask(seed=2**32), mask(tensor=1), mask(kind=2), mask(step=2)]
    for other in (np.roll(m, 1), np.roll(m, 4), *others):
        covariance = ((m - m.mean()) * (other - other.mean())).mean()
        assert abs(covariance) < 5 * p * (1 - p) / np.sqrt(n)


def test_only_a_step_drops(device):
    """Without one a forward is what it was, bit for bit; the same step repeats, another differs."""
    x, _ = data(device)
    plain, engine = trained(device), trained(device, **ALL, seed=5)
    assert host(engine.forward(x)).tobytes() == host(plain.forward(x)).tobytes()
    assert host(plain.forward(x, step=3)).tobytes() == host(plain.forward(x)).tobytes()
    seen = [host(engine.forward(x, step=s)).tobytes() for s in (1, 2, 3, number(1, device))]
    assert len(set(seen)) == 3 and seen[0] == seen[3]
    assert host(engine.vjp(x, step=1)[0]).tobytes() == seen[0]
    assert host(engine.merged().forward(x)).tobytes() == host(plain.merged().forward(x)).tobytes()
    engine.set_dropout("a", **ALL, seed=6)
    assert host(engine.forward(x, step=1)).tobytes() != seen[0]
    engine.set_dropout("a")
    assert host(engine.forward(x, step=1)).tobytes() == host(plain.forward(x)).tobytes()


def test_strength_scales_what_is_left():
    """What is added is linear in strength, so the same mask is seen at each; 0 is the layer."""
    rng = np.random.default_rng(1)
    layer = Linear(rng.standard_normal((6, 8)), rng.standard_normal(8))
    engine = Engine({"l": layer}, device="cpu", dtype="f64")
    engine.add("a", "locon", rank=3, dropout=0.5, rank_dropout=0.3, module_dropout=0.1, seed=3)
    values = {n: rng.standard_normal(v.shape) for n, v in engine.parameters("a")["l"].items()}
    engine.set_parameters("a", {"l": values})
    x = rng.standard_normal((5, 6))
    base = layer.forward(x)
    one = engine.forward(x, step=2) - base
    assert one.any() and not one.all()
    engine.strength["a"] = 0.25
    assert np.allclose(engine.forward(x, step=2) - base, one / 4, atol=1e-12)
    engine.strength["a"] = 0.0
    assert engine.forward(x, step=2).tobytes() == base.tobytes()


def test_several_adapters_drop_for_themselves():
    rng = np.random.default_rng(1)
    layer = Linear(rng.standard_normal((6, 8)))
    engine = Engine({"l": layer}, device="cpu", dtype="f64")
    x, alone = rng.standard_normal((5, 6)), []
    for i, algorithm in enumerate(("locon", "ia3", "diag-oft")):
        one = Engine({"l": layer}, device="cpu", dtype="f64")
        for e in (engine, one):
            e.add(algorithm, algorithm, dropout=0.4, seed=i)
            rng_i = np.random.default_rng(i)
            p = e.parameters(algorithm)["l"]
            e.set_parameters(
                algorithm, {"l": {n: rng_i.standard_normal(v.shape) for n, v in p.items()}}
            )
        alone.append(one.forward(x, step=9) - layer.forward(x))
    assert np.allclose(engine.forward(x, step=9), layer.forward(x) + sum(alone), atol=1e-12)
    masked = [part == 0 for part in alone]
    assert all(m.any() for m in masked) and not (masked[0] == masked[1]).all()


def test_without_dropout_of_outputs_the_last_product_is_still_deferred(monkeypatch):
    """Masks of ranks and modules lie on factors and scales: the layer takes the product in."""
    x, _ = data("cpu")
    calls = []
    real = layers.extended
    monkeypatch.setattr(layers, "extended", lambda *a, **k: calls.append(0) or real(*a, **k))
    # Of the two layers, the convolution's change is a product of two factors.
    for knobs, count in (({}, 1), ({"rank_dropout": 0.3, "module_dropout": 0.2}, 1), (ALL, 0)):
        calls.clear()
        trained("cpu", **knobs).forward(x, step=1)
        assert len(calls) == count, knobs


def test_a_captured_step_drops_anew(device):
    """A step after another equals the plain loop's, whose step numbers are the optimizer's; at a
    rate of 0 only what is dropped changes, and from a new optimizer it comes back.
    """
    x, target = data(device)
    plain, fast = (trained(device, **ALL, seed=11) for _ in range(2))
    optimizers = [AdamW(e.parameters("a"), lr=0.01) for e in (plain, fast)]
    step = fast.capture_step("a", loss, optimizers[1], x, targets=[target])
    for i in range(1, 7):
        y, pullback = plain.vjp(x, step=i)
        value, dy = loss(y, target)
        plain.set_parameters("a", optimizers[0].step(pullback(dy)[1]["a"]))
        np.testing.assert_allclose(float(host(step(x, target))), float(host(value)), rtol=1e-6)
    for layer, factors in plain.parameters("a").items():
        for name, value in factors.items():
            assert (host(value) == host(fast.parameters("a")[layer][name])).all(), (layer, name)
    runs = []
    for _ in range(2):
        still = AdamW(fast.parameters("a"), lr=0.0, weight_decay=0.0)
        step = fast.capture_step("a", loss, still, x, targets=[target])
        runs.append([float(host(step(x, target))) for _ in range(5)])
    assert len(set(runs[0])) == 5 and runs[0] == runs[1]


def test_a_captured_forward_takes_the_step(device):
    x, _ = data(device)
    engine = trained(device, **ALL)
    captured = engine.capture(x, step=0)
    for step in (4, number(5, device), 4):
        assert (host(captured(x, step=step)) == host(engine.forward(x, step=step))).all()


def test_the_clock_is_the_step_that_is_prepared(device):
    optimizer = AdamW(engine_on(device).parameters("a"))
    clock = optimizer.clock()
    for step in (1, 2):
        optimizer.prepare()
        assert host(clock) == step and optimizer.clock() is clock


@pytest.mark.parametrize(
    "algorithm, options, message",
    [
        ("locon", {"dropout": 1.0}, "dropout is 1.0, expected a number from 0 to below 1"),
        ("locon", {"rank_dropout": -0.1}, "rank_dropout is -0.1, expected"),
        ("locon", {"module_dropout": True}, "module_dropout is True, expected"),
        ("locon", {"module_dropout": float("nan")}, "module_dropout is nan, expected"),
        ("locon", {"rank_dropout_scale": 2}, "rank_dropout_scale is 2, expected true or false"),
        ("ia3", {"rank_dropout": 0.1}, "layer 'l': ia3 has no rank_dropout"),
        ("dylora", {"rank_dropout": 0.1}, "dylora has no rank_dropout"),
        ("boft", {"rank_dropout": 0.1}, "boft has no rank_dropout"),
        ("tlora", {"rank_dropout": 0.1}, "tlora has no rank_dropout; use dropout or module"),
        ("diag-oft", {"rank_dropout": 0.1, "rank_dropout_scale": True}, "no rank_dropout_scale"),
        ("oft-peft", {"rank_dropout": 0.1, "rank_dropout_scale": True}, "blocks of a rotation"),
        ("norm", {"dropout": 0.1}, "layer 'n': norm has no dropout.* use rank_dropout"),
        ("boft", {"module_dropout": 0.1, "rule": "reference"}, "no module_dropout by rule"),
        ("lokr", {"module_dropout": 0.1, "dora": "input", "rule": "reference"}, "by rule"),
        ("locon", {"drop": 0.1}, "locon has no option 'drop'"),
    ],
)
def test_refused(algorithm, options, message):
    layers = {"l": Linear(np.ones((8, 8), np.float32)), "n": LayerNorm(np.ones(8, np.float32))}
    engine = Engine(layers, device="cpu")
    with pytest.raises(LycorisError, match=message):
        engine.add("a", algorithm, **options)
    assert not engine.attachments  # nothing is left behind


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_knob_is_without_effect(algorithm):
    """What is not refused does something: other steps, other outputs."""
    rng = np.random.default_rng(0)
    layer = Linear(rng.standard_normal((8, 16)))
    if algorithm == "norm":
        layer = LayerNorm(rng.standard_normal(16))
    x, dropping = rng.standard_normal((3, layer.weight.shape[0])), []
    for knob in ("dropout", "rank_dropout", "module_dropout"):
        engine = Engine({"l": layer}, device="cpu", dtype=np.dtype("f8"))
        size = {"block_size": 2} if algorithm in ("boft", "boft-peft") else {}
        try:
            engine.add("a", algorithm, **size, **{knob: 0.5})
        except LycorisError:
            continue
        p = engine.parameters("a")["l"]
        engine.set_parameters("a", {"l": {n: rng.standard_normal(v.shape) for n, v in p.items()}})
        assert len({engine.forward(x, step=i).tobytes() for i in range(12)}) > 1, knob
        dropping.append(knob)
    assert "module_dropout" in dropping and len(dropping) > 1


def test_where_algorithms_differ_each_drops_what_it_has():
    """A knob of some layers is no error of the others; masks are those of a layer's place by name,
    so that an adapter attached again drops the same whatever the order.
    """
    rng = np.random.default_rng(0)
    made = {"n": LayerNorm(np.ones(6)), "l": Linear(rng.standard_normal((6, 6)))}
    adapters = {"n": Norm(made["n"].shape), "l": LoCon(made["l"].shape, 2)}
    values = {
        n: {k: rng.standard_normal(v.shape) for k, v in a.init(rng).items()}
        for n, a in adapters.items()
    }
    engine = Engine(made, device="cpu", dtype=np.dtype("f8"))
    found = {n: (adapters[n], values[n]) for n in made}
    engine.attachments["a"] = Attachment(found, "cpu", engine.dtype, 1.0, layers=engine.layers)
    engine.set_dropout("a", dropout=0.5, seed=9)
    x = rng.standard_normal((4, 6))
    normed = LayerNorm(1 + values["n"]["w_norm"], values["n"]["b_norm"]).forward(x)
    part = normed @ values["l"]["down"] @ values["l"]["up"]  # alpha missing: scale 1
    m = masks.along(part.shape, None, 0.5, step=3, tensor=0, kind=1, seed=9)
    expected = engine.forward(x, step=3)
    assert np.allclose(expected, normed @ made["l"].weight + 2 * m * part)
    turned = dict(reversed(found.items()))
    engine.attachments["a"] = Attachment(turned, "cpu", engine.dtype, 1.0, layers=engine.layers)
    engine.set_dropout("a", dropout=0.5, seed=9)
    assert engine.forward(x, step=3).tobytes() == expected.tobytes()


def test_refused_later():
    engine = Engine({"l": Conv2d(np.ones((3, 3, 2, 4), np.float32))}, device="cpu")
    engine.add("a", "loha", rank=2, rank_dropout=0.5)
    x = np.ones((1, 4, 4, 2), np.float32)
    for step in (-1, 2**32, 1.5, True, np.zeros(1, np.int64), np.zeros(2, np.uint32), "1", None):
        with pytest.raises(LycorisError, match="step is .*expected"):
            engine.forward(x, step=step)
    with pytest.raises(LycorisError, match="no adapter named 'b'"):
        engine.set_dropout("b", dropout=0.1)
    with pytest.raises(LycorisError, match="seed is -1, expected"):
        engine.set_dropout("a", dropout=0.1, seed=-1)
    engine.set_dropout("a", module_dropout=0.5, seed=2**64 - 1)
    assert engine.forward(x, step=np.uint32(7)).shape == (1, 2, 2, 4)


def test_the_operation_refuses():
    x, step, draw = np.ones((3, 4)), np.zeros(1, np.uint32), ops.Draw(0.5, 0)
    for options, kind, message in (
        ({"axis": 2}, ShapeError, "axis 2 is none of the 2 axes of x"),
        ({"add": np.ones(4)}, ShapeError, "add has shape"),
        ({"add": np.ones((3, 4), np.float32)}, DtypeError, "x is float64 but add is float32"),
        ({"gain": np.ones(2)}, ShapeError, "factor has shape"),
    ):
        with pytest.raises(kind, match=message):
            ops.dropout(x, draw, step, **options)
    with pytest.raises(DtypeError, match="step has shape"):
        ops.dropout(x, draw, np.zeros(1, np.int32))
    with pytest.raises(LycorisError, match="probability of a drop is 1"):
        ops.dropout(x, ops.Draw(1.0, 0), step)
    with pytest.raises(LycorisError, match="probability of a drop is -0.5"):
        ops.kept_gain(3, ops.Draw(-0.5, 0), step, np.float32)
