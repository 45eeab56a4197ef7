"""A change of the bias beside factors: the law, files, gradients, and other programs' words."""

import numpy as np
import pytest

from lycoris_cupy import Engine, LayerShape, Linear, LoCon
from lycoris_cupy.adapters import Adapter, Biased, DoRA, slice_rows
from lycoris_cupy.adapters.join import forward
from lycoris_cupy.io.adapter_file import read_adapter, write_adapter
from lycoris_cupy.io.convert import convert_file
from lycoris_cupy.io.inspection import inspect_file
from lycoris_cupy.io.safetensors import open_file, write
from tests.cases import KINDS, adapters_for
from tests.test_spectrum import random_params


def on_which(shape):
    """Adapters that a bias may stand beside."""
    plain = {name: a for name, a in adapters_for(shape).items() if a.decomposable}
    return plain | {"dora": DoRA.over(LoCon(shape, 2, 3.0), "output")}


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_the_law(kind):
    x = np.random.default_rng(1).standard_normal(kind.x)
    x = np.moveaxis(x, 1, -1) if kind.weight[2:] else x
    rng = np.random.default_rng(2)
    layer = kind.build.from_torch(
        rng.standard_normal(kind.weight), rng.standard_normal(kind.weight[0]), **kind.options
    )
    for name, on in on_which(kind.shape).items():
        for scaled in (False, True):
            adapter = Biased.over(on, scaled)
            p, scale = adapter.canonical(random_params(adapter)), np.array([0.7])
            weight = layer.matrix + adapter.delta_weight(layer.matrix, p, scale)
            expected = layer.replaced(weight, layer.bias + 0.7 * adapter.delta_bias(p)).forward(x)
            assert np.allclose(forward(layer, x, [(adapter, p, scale)]), expected, atol=1e-9), name
            own = p["bias"] * (on.reported_scale if scaled else 1)
            assert np.allclose(adapter.delta_bias(p), own)


def test_gradients_reach_the_bias():
    layer = Linear.from_torch(np.random.default_rng(0).standard_normal((8, 6)), np.zeros(8))
    net = Engine({"a": layer}, device="cpu", dtype="f64")
    net.add("n", "locon", rank=2, alpha=3.0)
    on = net.attachments["n"].adapters["a"]
    adapter = Biased.over(on, True)
    params = {n: v.astype(np.float64) for n, v in random_params(adapter).items()}
    net.attachments["n"].adapters["a"] = adapter
    net.attachments["n"].parameters["a"] = params
    net.strength["n"] = 0.5
    x = np.random.default_rng(3).standard_normal((4, 6))
    y, pullback = net.vjp(x)
    _, grads = pullback(y)
    assert np.allclose(grads["n"]["a"]["bias"], 0.5 * 1.5 * y.sum(0))
    assert np.allclose(net.merged().forward(x), y)


LORA = {"lora_down.weight": (2, 6), "lora_up.weight": (8, 2), "alpha": ()}


def tensors(module, words, seed=0):
    rng = np.random.default_rng(seed)
    return {f"{module}.{word}": rng.standard_normal(shape) for word, shape in words.items()}


SHAPES = {"a.q": LayerShape.of_file((8, 6))}


@pytest.mark.parametrize(
    "module, words, scaled",
    [
        ("diffusion_model.a.q", LORA | {"diff_b": (8,)}, False),
        ("lycoris_a_q", LORA | {"diff_b": (8,)}, False),
        ("base_model.model.a.q", {"lora_A.weight": (2, 6), "lora_B.weight": (8, 2), "lora_B.bias": (8,)}, True),
        ("a.q", {"lora_A.weight": (2, 6), "lora_B.weight": (8, 2), "lora_B.bias": (8,)}, True),
        ("lora_unet_a_q", {"lokr_w1": (2, 2), "lokr_w2": (4, 3), "diff_b": (8,)}, False),
        ("lora_unet_a_q", LORA | {"dora_scale": (8, 1), "diff_b": (8,)}, False),
    ],
)  # fmt: skip
def test_other_programs_words(tmp_path, module, words, scaled):
    content = tensors(module, words)
    write(tmp_path / "a.safetensors", content)
    found, report = read_adapter(tmp_path / "a.safetensors", SHAPES)
    adapter, params = found["a.q"]
    assert isinstance(adapter, Biased) and adapter.scaled == scaled
    (bias,) = [v for k, v in content.items() if k.endswith((".diff_b", ".bias"))]
    assert (params["bias"] == bias).all() and "with a bias" in report.layers[0].algorithm
    write_adapter(tmp_path / "b.safetensors", found)
    again, params_again = read_adapter(tmp_path / "b.safetensors", SHAPES)[0]["a.q"]
    assert again.factors() == adapter.factors()
    assert again.reported_scale == pytest.approx(adapter.reported_scale)
    assert all((params_again[n] == params[n]).all() for n in params)
    figures = inspect_file(tmp_path / "a.safetensors").figures
    assert len(figures) == 1 and (figures[0].norm is None) == ("dora_scale" in words)


def test_conversion_keeps_it_where_it_can(tmp_path):
    words = {"diff": (8, 6), "diff_b": (8,)}
    write(tmp_path / "a.safetensors", content := tensors("diffusion_model.a.q", words))
    done = convert_file(
        tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya", algorithm="lora"
    )
    assert done.loss < 1e-12
    with open_file(tmp_path / "b.safetensors") as file:
        assert (file["lora_unet_a_q.diff_b"] == content["diffusion_model.a.q.diff_b"]).all()
    done = convert_file(
        tmp_path / "a.safetensors", tmp_path / "c.safetensors", "bfl", algorithm="lora", lossy=True
    )
    assert "the change of its bias has no place in bfl" in done.text()


def test_rows_of_it():
    adapter = Biased.over(LoCon(SHAPES["a.q"], 2, 3.0))
    params = random_params(adapter)
    part, own = slice_rows(adapter, params, 3, 8)
    assert part.shape.outputs == 5 and (own["bias"] == params["bias"][3:]).all()
    assert isinstance(part, Biased) and isinstance(part, Adapter)
