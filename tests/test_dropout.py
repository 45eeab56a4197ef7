"""What each knob of dropout does to each algorithm on each kind of layer: against formulas with the
masks written out, in f64, and as derivatives.
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lycoris_cupy import Engine, GLoRA, LayerNorm, Linear, LoCon, LoKr, bf16, ops, to_device
from lycoris_cupy.adapters import Biased, DoRA, RowPart, Rows
from lycoris_cupy.ops import product
from tests import masks
from tests.bounds import assert_within, bound
from tests.cases import KINDS, adapters_for
from tests.dropped import (
    SEED,
    STEP,
    P,
    kept,
    largest,
    masked_factors,
    masked_weight,
    ranks,
    with_knobs,
)
from tests.test_law import absolute, changed_weight, draw, kinds

every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


def depth_of(layer):
    return 64 + layer.shape.taps * layer.shape.channels * 4


@every_kind
def test_dropout_is_of_the_adapters_part(kind):
    """y = layer(x) + mask / (1 - p) * (what the adapter adds); GLoRA: of both of its parts."""
    for name, adapter in adapters_for(kind.shape).items():
        layer, x, factors = draw(kind, adapter, 20)
        base = layer.forward(x)
        if isinstance(adapter, GLoRA):
            g, scale = layer.window.groups, 0.7 * adapter.scale
            p = adapter.canonical(factors)
            seen = x.reshape(*x.shape[:-1], g, -1) @ p["a2"][0] @ p["a1"][0]
            seen = seen.reshape(x.shape) * kept(x.size, 1).reshape(x.shape) / (1 - P)
            second = product(x, np.einsum("tir,ro->tio", p["b2"], p["b1"][0]), layer.window)
            second = second * kept(base.size, 1, 1).reshape(base.shape) / (1 - P)
            expected = base + scale * (product(seen, layer.matrix, layer.window) + second)
        else:
            weight, bias = changed_weight(layer, adapter, factors, 0.7)
            part = product(x, weight, layer.window, bias=bias) - base
            expected = base + part * kept(base.size, 1).reshape(base.shape) / (1 - P)
        engine = with_knobs(layer, adapter, factors, {"dropout": P}, strength=0.7)
        size = absolute(layer, adapter, factors, x, 0.7) / (1 - P) + np.abs(base)
        limit = bound(expected, 2 * size, depth_of(layer), np.float64)
        assert_within(engine.forward(x, step=STEP), expected, limit, name)


@pytest.mark.parametrize("scaled", [False, True])
@every_kind
def test_rank_dropout_is_what_the_algorithm_says(kind, scaled):
    turned = ("entries", "blocks") if scaled else ()
    found = {n: a for n, a in adapters_for(kind.shape).items() if a.drops not in ("", *turned)}
    assert len(found) > 8
    for name, adapter in found.items():
        layer, x, factors = draw(kind, adapter, 21)
        knobs = {"rank_dropout": P, "rank_dropout_scale": scaled}
        engine = with_knobs(layer, adapter, factors, knobs, strength=0.7)
        for step in (STEP, STEP + 1):
            weight, bias = masked_weight(layer, adapter, factors, 0.7, ranks(scaled, step))
            expected = product(x, weight, layer.window, bias=bias)
            size = absolute(layer, adapter, factors, x, 0.7) * largest(scaled, layer.shape.outputs)
            size = size + product(np.abs(x), np.abs(layer.matrix), layer.window) / (1 - P)
            limit = bound(expected, size, depth_of(layer), np.float64)
            assert_within(engine.forward(x, step=step), expected, limit, name)


@every_kind
def test_module_dropout_is_all_or_nothing(kind):
    for name, adapter in adapters_for(kind.shape).items():
        if adapter.rule != "base":  # refused, see test_dropout_training.py
            continue
        layer, x, factors = draw(kind, adapter, 22)
        engine = with_knobs(layer, adapter, factors, {"module_dropout": P}, strength=0.7)
        base, whole, seen = layer.forward(x), engine.forward(x), set()
        for step in range(4):
            there = kept(1, 3, step=step)[0]
            y = engine.forward(x, step=step)
            assert y.tobytes() == (whole if there else base).tobytes(), name
            seen.add(there)
        assert seen == {0.0, 1.0}


def check_gradients(engine, x, factors, size, name):
    """dx and every factor's gradient in f64, against central differences at the same step. size: of
    the output, over absolute values.
    """
    (layer,) = engine.layers
    y, pullback = engine.vjp(x, step=STEP)
    rng = np.random.default_rng(25)
    dy = rng.standard_normal(y.shape)
    dx, grads = pullback(dy)
    size, step = float((size * np.abs(dy)).sum()), 2.0**-16
    for key, base in {"x": x, **factors}.items():
        d = rng.standard_normal(base.shape)

        def value(t, key=key, d=d):
            if key != "x":
                engine.set_parameters("a", {layer: {key: factors[key] + t * d}})
            return float((engine.forward(x + t * d if key == "x" else x, step=STEP) * dy).sum())

        expected = (value(step) - value(-step)) / (2 * step)
        engine.set_parameters("a", {layer: factors})
        found = float(((dx if key == "x" else grads["a"][layer][key]) * d).sum())
        assert abs(found - expected) <= size * (2.0**-44 / step + 64 * step**2), (name, key)


@every_kind
def test_gradients_are_derivatives(kind):
    """With all knobs at once, whose masks the step holds."""
    for name, adapter in adapters_for(kind.shape).items():
        layer, x, factors = draw(kind, adapter, 24)
        knobs = {"dropout": P, "rank_dropout": P, "module_dropout": 0.1}
        if not adapter.drops:
            del knobs["rank_dropout"]
        if adapter.rule != "base":
            del knobs["module_dropout"]
        engine = with_knobs(layer, adapter, factors, knobs, strength=0.7)
        size = absolute(layer, adapter, factors, x, 0.7) / (1 - P) ** 2
        size = size + product(np.abs(x), np.abs(layer.matrix), layer.window)
        check_gradients(engine, x, factors, size, name)


FEW = ("linear", "conv3x2 dilation", "groups 4")


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("kind", [k for k in KINDS if k.name in FEW], ids=lambda k: k.name)
def test_dora_drops_inside_the_norm(kind, axis):
    """V = W + what is left of the change; W' = magnitude * V / |V|; dropout is of x (W' - W)."""
    for name, on in adapters_for(kind.shape).items():
        if not on.decomposable:
            continue
        adapter = DoRA.over(on, axis)
        layer, x, factors = draw(kind, adapter, 23)
        inner = {n: v for n, v in factors.items() if n != "dora_scale"}
        over = (0, 1) if axis == "output" else (0, 2)
        base = layer.forward(x)
        for knobs in ({"rank_dropout": P, "rank_dropout_scale": True}, {"dropout": P}):
            made = ranks(True) if "rank_dropout" in knobs else whole
            v = masked_weight(layer, on, inner, 1.0, made)[0]
            norm = np.sqrt((v**2).sum(axis=over, keepdims=True))
            c = factors["dora_scale"].reshape(norm.shape) / norm
            part = 0.7 * product(x, c * v - layer.matrix, layer.window)
            if "dropout" in knobs:
                part = part * kept(base.size, 1).reshape(base.shape) / (1 - P)
            engine = with_knobs(layer, adapter, factors, knobs, strength=0.7)
            size = absolute(layer, on, inner, x, 1) * (1 + largest(True, on.shape.outputs))
            size = size * (1 + np.abs(c).max())
            limit = bound(base + part, size, depth_of(layer) + layer.shape.outputs, np.float64)
            assert_within(engine.forward(x, step=STEP), base + part, limit, name)
            check_gradients(engine, x, factors, size, name)


def whole(entries, part=0):
    return np.ones(entries)


@pytest.mark.parametrize("kind", KINDS[:5:2], ids=lambda k: k.name)
def test_on_device(kind, device):
    """bf16 against f64 with the same masks: a bit that differed would be a whole term."""
    for name in ("locon", "loha", "lokr w1 w2ab", "glora", "diag-oft", "full bias", "ia3"):
        adapter = adapters_for(kind.shape)[name]
        layer, x, factors = draw(kind, adapter, 26)
        knobs = {"dropout": P, "module_dropout": 0.1}
        if adapter.drops:
            knobs["rank_dropout"] = P
        expected = with_knobs(layer, adapter, factors, knobs).forward(x, step=STEP)
        engine = with_knobs(layer, adapter, factors, knobs, device=device, dtype="bf16")
        y = to_device(engine.forward(x, step=STEP), "cpu")
        assert y.dtype == bf16
        size = absolute(layer, adapter, factors, x, 1.0) / (1 - P) ** 2
        size = size + 2 * product(np.abs(x), np.abs(layer.matrix), layer.window) / (1 - P)
        limit = bound(expected, size, depth_of(layer), bf16, roundings=6)
        assert_within(y, expected, limit, name)


@given(kinds(), st.data())
def test_any_geometry(kind, data):
    """The mask of an output's elements has the output's shape, whatever the layer."""
    adapters = {n: a for n, a in adapters_for(kind.shape).items() if not isinstance(a, GLoRA)}
    name = data.draw(st.sampled_from(sorted(adapters)))
    step = data.draw(st.integers(0, 2**32 - 1))
    layer, x, factors = draw(kind, adapters[name], 27)
    weight, bias = changed_weight(layer, adapters[name], factors, 0.7)
    base = layer.forward(x)
    part = product(x, weight, layer.window, bias=bias) - base
    m = kept(base.size, 1, step=step).reshape(base.shape)
    engine = with_knobs(layer, adapters[name], factors, {"dropout": P}, strength=0.7)
    size = absolute(layer, adapters[name], factors, x, 0.7) / (1 - P) + np.abs(base)
    expected = base + part * m / (1 - P)
    limit = bound(expected, 2 * size, depth_of(layer), np.float64)
    assert_within(engine.forward(x, step=step), expected, limit, name)


@given(st.lists(st.integers(0, 5), max_size=4), st.data())
def test_masks_of_any_axis(shape, data):
    axes = [None, *range(-len(shape), len(shape))]
    axis = data.draw(st.sampled_from(axes))
    seed, step = data.draw(st.integers(0, 2**64 - 1)), data.draw(st.integers(0, 2**32 - 1))
    draw_of = ops.Draw(data.draw(st.floats(0, 0.99)), seed, 5, 2)
    x = np.random.default_rng(0).standard_normal(shape)
    numbers = {"step": step, "tensor": 5, "kind": 2, "seed": seed}
    m = masks.along(tuple(shape), axis, draw_of.probability, **numbers)
    y = ops.dropout(x, draw_of, np.array([step], np.uint32), axis=axis, gain=2.0)
    assert (y == 2 * x * m).all() and y.shape == x.shape


def test_a_norm_drops_channels():
    """One mask for weight and bias, as many kept as 1 - p says."""
    rng = np.random.default_rng(0)
    layer = LayerNorm(rng.standard_normal(40), rng.standard_normal(40))
    x, values = rng.standard_normal((3, 40)), {n: rng.standard_normal(40) for n in "wb"}
    engine = Engine({"n": layer}, device="cpu", dtype="f64")
    engine.add("a", "norm", rank_dropout=P, rank_dropout_scale=True, seed=SEED)
    engine.set_parameters("a", {"n": {f"{n}_norm": v for n, v in values.items()}})
    m = ranks(True)(40)
    assert 0.3 < (m > 0).mean() < 0.9
    changed = LayerNorm(layer.weight + values["w"] * m, layer.bias + values["b"] * m)
    assert np.allclose(engine.forward(x, step=STEP), changed.forward(x), atol=1e-12)
    factors = {f"{n}_norm": v for n, v in values.items()}
    check_gradients(engine, x, factors, 1 + 4 * np.abs(changed.forward(x)), "norm")


def test_a_bias_beside_factors_is_no_rank_but_part_of_the_output():
    kind = KINDS[0]
    on = LoCon(kind.shape, 3, 2.0)
    for scaled in (False, True):
        adapter = Biased.over(on, scaled)
        layer, x, factors = draw(kind, on, 28)
        bias = np.random.default_rng(1).standard_normal(kind.shape.outputs)
        own = bias * (on.scale if scaled else 1)
        inner = masked_factors(on, factors, ranks(False))
        part = product(x, changed_weight(layer, on, inner, 0.7)[0] - layer.matrix) + 0.7 * own
        y = layer.forward(x) + part * kept(part.size, 1).reshape(part.shape) / (1 - P)
        knobs = {"dropout": P, "rank_dropout": P}
        engine = with_knobs(layer, adapter, {**factors, "bias": bias}, knobs, strength=0.7)
        assert np.allclose(engine.forward(x, step=STEP), y, atol=1e-12)


def test_rows_of_a_fused_layer_each_drop_their_own():
    kind, made = KINDS[0], ranks(True)
    layer = draw(kind, LoCon(kind.shape, 1), 29)[0]
    half = replace(kind.shape, outputs=10)
    both = (("a", LoCon(half, 5, 2.0)), ("b", LoKr.create(half, 2, 1.0, factor=2)))
    parts = [RowPart(n, ((i * 10, i * 10 + 10),), a) for i, (n, a) in enumerate(both)]
    adapter = Rows.of(kind.shape, parts)
    rng = np.random.default_rng(2)
    factors = {n: rng.standard_normal(v.shape) for n, v in adapter.init(rng).items()}
    weight = layer.matrix.copy()
    for i, (part, own) in enumerate(zip(parts, adapter.split(factors), strict=True)):
        rows = slice(i * 10, i * 10 + 10)
        piece = Linear(np.ascontiguousarray(layer.weight[:, rows]), layer.bias[rows])
        its = [made(n, 2 * i) for n in (5, 10)]  # the ranks of the one, the outputs of the other
        new = masked_weight(piece, part.adapter, own, 0.7, lambda n, m=0, its=its: its[n == 10])
        weight[..., rows] = new[0]
    x = rng.standard_normal((4, 12))
    knobs = {"rank_dropout": P, "rank_dropout_scale": True}
    engine = with_knobs(layer, adapter, factors, knobs, strength=0.7)
    expected = product(x, weight, layer.window, bias=layer.bias)
    assert np.allclose(engine.forward(x, step=STEP), expected, atol=1e-12)
    y, pullback = engine.vjp(x, step=STEP)
    assert set(pullback(y)[1]["a"]["layer"]) == set(factors)


def test_every_algorithm_says_what_it_drops():
    """Those that LyCORIS or PEFT give a meaning to; the blocks of PEFT's are turned or not."""
    found = {type(a).algorithm: a.drops for k in KINDS for a in adapters_for(k.shape).values()}
    assert found == {
        "locon": "ranks", "loha": "outputs", "lokr": "outputs", "full": "outputs", "ia3": "",
        "dylora": "", "glora": "ranks", "diag-oft": "entries", "boft": "", "tlora": "",
        "oft-peft": "blocks", "boft-peft": "blocks",
    }  # fmt: skip
