"""Norm: layers that normalize, and adapters that change their weight and bias."""

import numpy as np
import pytest

from lycoris_cupy import (
    Engine,
    GroupNorm,
    LayerNorm,
    LayerShape,
    Linear,
    LycorisError,
    Norm,
    ShapeError,
    bf16,
    ops,
    to_device,
)
from lycoris_cupy.errors import DtypeError, FileFormatError
from lycoris_cupy.io.adapter_file import inspect_adapter, read_adapter
from lycoris_cupy.io.merge import merge_files
from lycoris_cupy.io.safetensors import open_file, write
from lycoris_cupy.norms import NormShape
from tests.arrays import drawn
from tests.bounds import assert_within, bound


def exact(*shape, seed=0):
    return drawn(np.random.default_rng([seed, *shape]), *shape)


WEIGHT, BIAS, DW, DB = exact(12), exact(12, seed=1), exact(12, seed=2), exact(12, seed=3)
KINDS = {
    "layer": (LayerNorm, {}, (3, 5, 12)),
    "layer without bias": (LayerNorm, {}, (7, 12)),
    "group": (GroupNorm, {"groups": 4}, (2, 5, 3, 12)),
    "group of all": (GroupNorm, {"groups": 1}, (2, 9, 12)),
    "channel by channel": (GroupNorm, {"groups": 12}, (2, 3, 4, 2, 12)),
}


def made(name):
    build, options, x = KINDS[name]
    bias = None if "without" in name else BIAS
    return build(WEIGHT, bias, eps=1e-3, **options), exact(*x)


def normalized(x, groups, eps=1e-3):
    """Group by group, in f64."""
    out = np.zeros(x.shape)
    lead = (x.shape[0], -1) if groups else (-1, 1)
    rows, into = x.reshape(*lead, x.shape[-1]), out.reshape(*lead, x.shape[-1])
    width = x.shape[-1] // (groups or 1)
    for n in range(rows.shape[0]):
        for g in range(groups or 1):
            part = rows[n, :, g * width : (g + 1) * width]
            normal = (part - part.mean()) / np.sqrt(part.var() + eps)
            into[n, :, g * width : (g + 1) * width] = normal
    return out


def engine_of(layer, device="cpu", dtype="f64", strength=0.7):
    engine = Engine({"norm": layer}, device=device, dtype=dtype)
    engine.add("a", "norm", strength=strength)
    engine.set_parameters("a", {"norm": {"w_norm": DW, "b_norm": DB}})
    return engine


@pytest.mark.parametrize("dtype", ["f64", "f32", "bf16"])
@pytest.mark.parametrize("name", KINDS)
def test_law(name, dtype, device):
    """normal * (weight + s w_norm) + bias + s b_norm, in one pass and rounded once."""
    layer, x = made(name)
    y = engine_of(layer, device, dtype).forward(x)
    normal = normalized(x, getattr(layer, "groups", 0))
    bias = BIAS if layer.bias is not None else np.zeros(12)
    expected = normal * (WEIGHT + 0.7 * DW) + bias + 0.7 * DB
    size = (np.abs(normal) + 2) * (np.abs(WEIGHT) + np.abs(DW)) + np.abs(bias) + np.abs(DB)
    size = size * 32  # 1 / deviation of a group of two values or more
    assert_within(to_device(y, "cpu"), expected, bound(expected, size, 400, y.dtype))
    merged = engine_of(layer, device, dtype).merged().forward(x)
    limit = bound(expected, size, 400, y.dtype, roundings=2)
    assert_within(to_device(merged, "cpu"), expected, limit)


@pytest.mark.parametrize("name", KINDS)
def test_gradients(name):
    layer, x = made(name)
    engine = engine_of(layer)
    y, pullback = engine.vjp(x)
    dy = exact(*y.shape, seed=9)
    dx, grads = pullback(dy)
    normal = normalized(x, getattr(layer, "groups", 0))
    own = grads["a"]["norm"]
    axes = tuple(range(x.ndim - 1))
    assert np.allclose(own["w_norm"], 0.7 * (dy * normal).sum(axes), atol=1e-10)
    assert np.allclose(own["b_norm"], 0.7 * dy.sum(axes), atol=1e-12)
    d, step = exact(*x.shape, seed=10), 2.0**-12

    def value(at):
        return float((engine.forward(at) * dy).sum())

    slope = (value(x + step * d) - value(x - step * d)) / (2 * step)
    assert slope == pytest.approx(float((dx * d).sum()), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_identities(name):
    layer, x = made(name)
    base = Engine({"norm": layer}, device="cpu").forward(x)
    assert engine_of(layer, dtype="bf16", strength=0.0).forward(x).tobytes() == base.tobytes()
    fresh = Engine({"norm": layer}, device="cpu")
    fresh.add("a", "norm")
    assert fresh.forward(x).tobytes() == base.tobytes()


def test_several_at_once(tmp_path):
    layer, x = made("layer")
    engine = engine_of(layer)
    engine.save_adapter("a", tmp_path / "b.safetensors")
    engine.attach(tmp_path / "b.safetensors", strength=-0.7, name="b")
    base = Engine({"norm": layer}, device="cpu", dtype="f64").forward(x)
    assert np.abs(engine.forward(x) - base).max() < 1e-13
    assert np.abs(engine.merged().forward(x) - base).max() < 1e-13


@pytest.mark.parametrize("keys", [("w_norm",), ("b_norm",), ("w_norm", "b_norm")])
def test_a_file_may_hold_one_alone(tmp_path, keys):
    tensors = {f"lora_unet_n.{key}": np.arange(4, dtype=np.float32) for key in keys}
    write(tmp_path / "a.safetensors", tensors)
    shapes = {"n": NormShape.of_channels(4, "LayerNorm")}
    adapter, p = read_adapter(tmp_path / "a.safetensors", shapes)[0]["n"]
    assert adapter == Norm(shapes["n"], weight="w_norm" in keys, bias="b_norm" in keys)
    assert tuple(p) == keys
    assert inspect_adapter(tmp_path / "a.safetensors").layers[0].shape == "norm(4)"
    base = {"n.weight": np.ones(4, np.float32), "n.bias": np.zeros(4, np.float32)}
    write(tmp_path / "base.safetensors", base)
    out = tmp_path / "out.safetensors"
    merge_files(tmp_path / "base.safetensors", [(tmp_path / "a.safetensors", 2.0)], out)
    with open_file(out) as file:
        change = 2.0 * np.arange(4)
        assert (file["n.weight"] == 1 + change * ("w_norm" in keys)).all()
        assert (file["n.bias"] == change * ("b_norm" in keys)).all()


def test_add_takes_what_it_can():
    layers = {"n": LayerNorm(WEIGHT), "l": Linear(exact(12, 5))}
    engine = Engine(layers, device="cpu", dtype="f64")
    assert engine.add("a", "norm") == ["n"] and engine.add("b", "locon") == ["l"]
    with pytest.raises(LycorisError, match=r"norm does not sit on Linear\(12 -> 5\)"):
        engine.add("c", "norm", ["l"])
    with pytest.raises(LycorisError, match=r"lokr does not sit on LayerNorm\(12\)"):
        engine.add("c", "lokr", ["n"])
    assert "n: LayerNorm(12)" in engine.explain()


def test_a_locon_on_a_norm_is_refused(tmp_path):
    tensors = {
        "lycoris_n.lora_up.weight": np.ones((12, 1), np.float32),
        "lycoris_n.lora_down.weight": np.ones((1, 1), np.float32),
    }
    write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(ShapeError, match=r"locon does not sit on LayerNorm\(12\)"):
        read_adapter(tmp_path / "a.safetensors", {"n": LayerNorm(WEIGHT).shape})


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: LayerNorm(exact(3, 4)), ShapeError, "a norm over several axes has no adapter"),
        (lambda: LayerNorm(WEIGHT, exact(5)), ShapeError, r"bias has shape \(5,\)"),
        (
            lambda: GroupNorm(WEIGHT, groups=5),
            ShapeError,
            "12 channels are not a multiple of the 5",
        ),
        (
            lambda: Norm(NormShape.of_channels(3), weight=False, bias=False),
            FileFormatError,
            "neither weight nor bias",
        ),
        (
            lambda: ops.group_norm(exact(2, 12), WEIGHT, BIAS, groups=5),
            ShapeError,
            "multiple of the 5 groups",
        ),
        (lambda: ops.group_norm(exact(12), WEIGHT, BIAS, groups=1), ShapeError, r"expected \(N"),
        (lambda: ops.layer_norm(exact(2, 12), exact(3), BIAS), ShapeError, "weight has shape"),
        (
            lambda: ops.layer_norm(exact(2, 12).astype(bf16), WEIGHT, BIAS),
            DtypeError,
            "weight is float64, expected float32",
        ),
    ],
)
def test_what_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_norms_count_as_layers_of_one_input():
    shape = LayerNorm(WEIGHT).shape
    assert isinstance(shape, LayerShape) and shape.file_shape == (12,) and shape.channels == 12
