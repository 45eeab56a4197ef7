"""Modules onto layers: names of other programs, rows of fused layers, and shapes that decide."""

import numpy as np
import pytest

from lycoris_cupy import Conv2d, Engine, LayerShape, Linear, LoCon, ShapeError, to_device
from lycoris_cupy.adapters import Adapter, RowPart, Rows, slice_rows
from lycoris_cupy.errors import MatchError
from lycoris_cupy.io.adapter_file import inspect_adapter, read_adapter, write_adapter
from lycoris_cupy.io.aliases import Share, aliases, diffusers_name, original_name
from lycoris_cupy.io.safetensors import write
from tests.cases import KINDS, adapters_for
from tests.test_spectrum import random_params

D = 12  # width of the small transformer


def lora(module, out, inputs=D, rank=2, alpha=1.0, seed=0):
    rng = np.random.default_rng([seed, *module.encode()])
    return {
        f"{module}.lora_down.weight": rng.standard_normal((rank, inputs)),
        f"{module}.lora_up.weight": rng.standard_normal((out, rank)),
        f"{module}.alpha": np.array(alpha, np.float32),
    }


def delta(tensors, module):
    up, down = tensors[f"{module}.lora_up.weight"], tensors[f"{module}.lora_down.weight"]
    return float(tensors[f"{module}.alpha"]) / up.shape[1] * up @ down


def engine(shapes, dtype="f64"):
    rng = np.random.default_rng(5)
    layers = {n: Linear.from_torch(rng.standard_normal((o, i))) for n, (o, i) in shapes.items()}
    return Engine(
        layers, lambda call, x: [call(n, x) for n in layers][-1], device="cpu", dtype=dtype
    )


def change(before, name):
    """What all adapters add to a weight, in torch's order."""
    return (before.merged().layers[name].weight - before.layers[name].weight).T


FLUX = {
    "double_blocks.0.img_attn.qkv": (3 * D, D),
    "double_blocks.0.img_attn.proj": (D, D),
    "single_blocks.0.linear1": (7 * D, D),
    "final_layer.adaLN_modulation.1": (2 * D, D),
}
SPLIT = {
    "transformer_blocks.0.attn.to_q": (D, D),
    "transformer_blocks.0.attn.to_k": (D, D),
    "transformer_blocks.0.attn.to_v": (D, D),
    "transformer_blocks.0.attn.to_out.0": (D, D),
    "norm_out.linear": (2 * D, D),
}


def test_split_adapters_on_rows_of_a_fused_layer(tmp_path):
    """q, v and the MLP of diffusers' Flux on the fused weights of Black Forest Labs; k has none."""
    q, v = "lora_unet_transformer_blocks_0_attn_to_q", "lora_unet_transformer_blocks_0_attn_to_v"
    out, mlp = (
        "lora_unet_transformer_blocks_0_attn_to_out_0",
        "lora_unet_single_transformer_blocks_0_proj_mlp",
    )
    tensors = {}
    for module, rows, rank, alpha in (
        (q, D, 2, 1.0),
        (v, D, 3, 6.0),
        (out, D, 2, 2.0),
        (mlp, 4 * D, 1, 1.0),
    ):
        tensors |= lora(module, rows, rank=rank, alpha=alpha)
    write(tmp_path / "a.safetensors", tensors)
    net = engine(FLUX)
    report = net.attach(tmp_path / "a.safetensors", name="a")
    told = {layer.module: (layer.layer, layer.rows) for layer in report.layers}
    assert told[q] == ("double_blocks.0.img_attn.qkv", f"0:{D}")
    assert told[v] == ("double_blocks.0.img_attn.qkv", f"{2 * D}:{3 * D}")
    assert told[out] == ("double_blocks.0.img_attn.proj", None)
    assert told[mlp] == ("single_blocks.0.linear1", f"{3 * D}:{7 * D}")
    assert "double_blocks.0.img_attn.qkv rows 0:12" in report.text()
    zero = np.zeros((D, D))
    qkv = np.concatenate([delta(tensors, q), zero, delta(tensors, v)])
    assert np.allclose(change(net, "double_blocks.0.img_attn.qkv"), qkv, atol=1e-12)
    assert np.allclose(
        change(net, "double_blocks.0.img_attn.proj"), delta(tensors, out), atol=1e-12
    )
    linear1 = np.concatenate([np.zeros((3 * D, D)), delta(tensors, mlp)])
    assert np.allclose(change(net, "single_blocks.0.linear1"), linear1, atol=1e-12)
    # Saved under their own names, read back bit for bit.
    net.save_adapter("a", tmp_path / "b.safetensors")
    again = engine(FLUX)
    again.attach(tmp_path / "b.safetensors", name="b")
    for layer, factors in net.parameters("a").items():
        for name, value in factors.items():
            assert (again.parameters("b")[layer][name] == value).all()
    assert "lycoris_transformer_blocks_0_attn_to_q" in {
        layer.module for layer in inspect_adapter(tmp_path / "b.safetensors").layers
    }


def test_a_swapped_half(tmp_path):
    """diffusers keeps scale and shift of the last norm the other way round."""
    module = "lora_unet_norm_out_linear"
    tensors = lora(module, 2 * D)
    write(tmp_path / "a.safetensors", tensors)
    net = engine(FLUX)
    net.attach(tmp_path / "a.safetensors")
    expected = np.roll(delta(tensors, module), D, axis=0)
    assert np.allclose(change(net, "final_layer.adaLN_modulation.1"), expected, atol=1e-12)
    # And back: the original's name on diffusers' layer.
    tensors = lora("lora_unet_final_layer_adaLN_modulation_1", 2 * D)
    write(tmp_path / "b.safetensors", tensors)
    net = engine(SPLIT)
    net.attach(tmp_path / "b.safetensors")
    expected = np.roll(delta(tensors, "lora_unet_final_layer_adaLN_modulation_1"), D, axis=0)
    assert np.allclose(change(net, "norm_out.linear"), expected, atol=1e-12)


def test_a_fused_adapter_on_split_layers(tmp_path):
    module = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = lora(module, 3 * D, rank=4)
    write(tmp_path / "a.safetensors", tensors)
    net = engine(SPLIT)
    report = net.attach(tmp_path / "a.safetensors")
    assert [layer.module for layer in report.layers] == [module] * 3
    whole = delta(tensors, module)
    for i, name in enumerate("qkv"):
        own = change(net, f"transformer_blocks.0.attn.to_{name}")
        assert np.allclose(own, whole[i * D : (i + 1) * D], atol=1e-12)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_rows_of_every_algorithm_obey_the_law(kind):
    """Beside the layer or in its weight, in value and in every gradient."""
    if kind.shape.window.groups > 1:
        with pytest.raises(ShapeError, match="rows of a grouped convolution cannot be adapted"):
            Rows.of(kind.shape, [])
        return
    outputs = kind.shape.outputs
    whole = LayerShape(kind.shape.window, kind.shape.inputs, 2 * outputs + 3)
    rows = [((outputs + 3, 2 * outputs + 3),), ((1, 1 + outputs),)]
    x = np.random.default_rng(1).standard_normal(kind.x)
    if kind.weight[2:]:
        x = np.moveaxis(x, 1, -1)
    options = kind.options if kind.weight[2:] else {}
    weight = np.random.default_rng(2).standard_normal((whole.outputs, *kind.weight[1:]))
    layer = kind.build.from_torch(weight, **options)
    for name, second in adapters_for(kind.shape).items():
        if type(second).svd is Adapter.svd:
            continue  # its change depends on the weight
        parts = [RowPart("a", rows[0], LoCon(kind.shape, 2, 3.0)), RowPart("b", rows[1], second)]
        adapter = Rows.of(whole, parts)
        params = adapter.joined([random_params(one.adapter, 3) for one in parts])
        p, scale = adapter.canonical(params), np.array([0.7])
        out = layer.forward(x, adapter.apply(None, layer, x, p, scale))
        weight = layer.matrix + adapter.delta_weight(layer.matrix, p, scale)
        bias = adapter.delta_bias(p)
        expected = layer.replaced(weight, None if bias is None else 0.7 * bias).forward(x)
        assert np.allclose(out, expected, atol=1e-9), name
        for one, own in zip(parts, adapter.split(p), strict=True):
            (a, b), total = one.rows[0], 0.7 * one.adapter.scale
            part = one.adapter.delta_weight(None, own, np.array([total]))
            assert np.allclose((weight - layer.matrix)[..., a:b], part)
        svd = adapter.svd(p)
        dense = adapter.delta_weight(None, p, np.ones(1)).reshape(-1, whole.outputs)
        assert np.allclose((svd.left * svd.values) @ svd.right, dense)


def test_gradients_reach_every_part(tmp_path):
    tensors = lora("lora_unet_transformer_blocks_0_attn_to_q", D) | lora(
        "lora_unet_transformer_blocks_0_attn_to_k", D, seed=1
    )
    write(tmp_path / "a.safetensors", tensors)
    net = engine({"double_blocks.0.img_attn.qkv": (3 * D, D)})
    net.attach(tmp_path / "a.safetensors", name="a")
    x = np.random.default_rng(0).standard_normal((5, D))
    y, pullback = net.vjp(x)
    _, grads = pullback(y)
    layer = "double_blocks.0.img_attn.qkv"
    for name, g in grads["a"][layer].items():
        direction = np.random.default_rng(1).standard_normal(g.shape)
        values, step = net.parameters("a")[layer][name].copy(), 1e-6
        sides = []
        for sign in (1, -1):
            net.set_parameters("a", {layer: {name: values + sign * step * direction}})
            sides.append((net.forward(x) ** 2).sum() / 2)
        net.set_parameters("a", {layer: {name: values}})
        assert (sides[0] - sides[1]) / (2 * step) == pytest.approx((g * direction).sum(), rel=1e-5)


def test_rows_that_overlap_are_refused(tmp_path):
    q = "transformer_blocks_0_attn_to_q"
    write(tmp_path / "a.safetensors", lora(f"lora_unet_{q}", D) | lora(f"lycoris_{q}", D))
    with pytest.raises(
        MatchError,
        match=rf"layer 'double_blocks.0.img_attn.qkv': '{q}' and '{q}' both change output 0; rem",
    ):
        engine(FLUX).attach(tmp_path / "a.safetensors")
    fused = "lora_unet_double_blocks_0_img_attn_qkv"
    write(tmp_path / "b.safetensors", lora(f"lora_unet_{q}", D) | lora(fused, 3 * D))
    with pytest.raises(
        MatchError, match=f"duplicate layer .*'{fused}' and 'lora_unet_{q}' both mean"
    ):
        engine(FLUX).attach(tmp_path / "b.safetensors")


def test_shapes_decide_between_names(tmp_path):
    """T5 is te2 in one file and te3 in another: the factors say which encoder they are for."""
    shapes = {
        "text_encoder_2.block.q": LayerShape.of_file((8, 6)),
        "text_encoder_3.block.q": LayerShape.of_file((10, 6)),
    }
    for outputs, layer in ((8, "text_encoder_2.block.q"), (10, "text_encoder_3.block.q")):
        write(tmp_path / "a.safetensors", lora("lora_te2_block_q", outputs, 6))
        assert list(read_adapter(tmp_path / "a.safetensors", shapes)[0]) == [layer]
    write(tmp_path / "a.safetensors", lora("lora_te2_block_q", 9, 6))
    with pytest.raises(
        MatchError,
        match=r"'lora_te2_block_q' fits none of the layers of its name: 'text_encoder_2.block.q': .*'text_encoder_3.block.q': .*expected \(10, 2\)",
    ):
        read_adapter(tmp_path / "a.safetensors", shapes)
    shapes["text_encoder_3.block.q"] = shapes["text_encoder_2.block.q"]
    write(tmp_path / "a.safetensors", lora("lora_te2_block_q", 8, 6))
    with pytest.raises(
        MatchError,
        match="could mean any of 'text_encoder_2.block.q', 'text_encoder_3.block.q': rename all but one",
    ):
        read_adapter(tmp_path / "a.safetensors", shapes)


def test_lokr_is_taken_apart_where_its_blocks_end():
    for name, adapter in adapters_for(LayerShape.of_file((20, 12))).items():
        if adapter.algorithm not in ("locon", "loha", "lokr", "full"):
            continue
        params = random_params(adapter)
        whole = adapter.delta_weight(None, adapter.canonical(params), np.array([adapter.scale]))
        part, own = slice_rows(adapter, params, 10, 20)
        change = part.delta_weight(None, part.canonical(own), np.array([part.scale]))
        assert np.allclose(change, whole[..., 10:20]), name
        if name.startswith("lokr"):
            with pytest.raises(
                ShapeError,
                match=r"lokr cannot be taken apart at outputs 1:5.*convert it to plain LoRA",
            ):
                slice_rows(adapter, params, 1, 5)


@pytest.mark.parametrize(
    "original, diffusers",
    [
        ("input_blocks_0_0", "conv_in"),
        ("input_blocks_1_1_proj_in", "down_blocks_0_attentions_0_proj_in"),
        ("input_blocks_3_0_op", "down_blocks_0_downsamplers_0_conv"),
        ("input_blocks_5_0_emb_layers_1", "down_blocks_1_resnets_1_time_emb_proj"),
        ("middle_block_0_in_layers_2", "mid_block_resnets_0_conv1"),
        (
            "middle_block_1_transformer_blocks_0_attn1_to_q",
            "mid_block_attentions_0_transformer_blocks_0_attn1_to_q",
        ),
        ("middle_block_2_out_layers_3", "mid_block_resnets_1_conv2"),
        ("output_blocks_2_1_conv", "up_blocks_0_upsamplers_0_conv"),
        ("output_blocks_5_2_conv", "up_blocks_1_upsamplers_0_conv"),
        ("output_blocks_3_0_skip_connection", "up_blocks_1_resnets_0_conv_shortcut"),
        ("output_blocks_10_1_proj_out", "up_blocks_3_attentions_1_proj_out"),
        ("time_embed_2", "time_embedding_linear_2"),
        ("label_emb_0_0", "add_embedding_linear_1"),
        ("out_2", "conv_out"),
    ],
)
def test_names_of_stable_diffusion(original, diffusers):
    assert original_name(diffusers, {"1", "2", "3"}) == original
    assert diffusers_name(original) == diffusers


@pytest.mark.parametrize(
    "name", ["input_blocks_0_1_x", "middle_block_7_x", "output_blocks_x", "input_blocks_1_0_what", "a",
             "up_blocks_0_upsamplers_0_op", "mid_block_attentions_3_x", "down_blocks_0_resnets_0_what", "middle_block_1_0_x"]
)  # fmt: skip
def test_other_names_are_left_alone(name):
    assert original_name(name, set()) is None and diffusers_name(name) is None


def test_aliases_need_shapes_that_can_be_split():
    layers = {"double_blocks_0_img_attn_qkv": "q"}
    assert aliases(layers, {}) == {}
    assert aliases(layers, {"q": LayerShape.of_file((4, 5))}) == {}
    split = aliases(layers, {"q": LayerShape.of_file((9, 3))})
    assert split["transformer_blocks_0_attn_to_v"] == [Share("q", ((6, 9),))]


def test_sdxl_text_encoder_two(tmp_path):
    """transformers' names on OpenCLIP's layers."""
    shapes = {
        "conditioner.embedders.1.model.transformer.resblocks.3.mlp.c_fc": LayerShape.of_file(
            (20, 6)
        ),
        "conditioner.embedders.1.model.transformer.resblocks.3.attn.in_proj_weight": LayerShape.of_file(
            (18, 6)
        ),
        "conditioner.embedders.0.transformer.text_model.encoder.layers.3.mlp.fc1": LayerShape.of_file(
            (20, 6)
        ),
    }
    path = tmp_path / "a.safetensors"
    write(path, lora("lora_te2_text_model_encoder_layers_3_mlp_fc1", 20, 6)
          | lora("lora_te1_text_model_encoder_layers_3_mlp_fc1", 20, 6)
          | lora("lora_te2_text_model_encoder_layers_3_self_attn_k_proj", 6, 6))  # fmt: skip
    found, report = read_adapter(path, shapes)
    assert set(found) == set(shapes) and {layer.rows for layer in report.layers} == {None, "6:12"}
    write_adapter(tmp_path / "b.safetensors", found)
    again, _ = read_adapter(tmp_path / "b.safetensors", shapes)
    assert set(again) == set(shapes)


def test_convolutions_have_rows_too():
    layer = Conv2d.from_torch(np.ones((6, 2, 3, 3)), padding=1)
    shape = LayerShape(layer.window, 2, 2)
    rows = Rows.of(layer.shape, [RowPart("a", ((4, 6),), LoCon(shape, 1, 1.0))])
    params = rows.joined([{"down": np.ones((3, 3, 2, 1)), "up": np.ones((1, 1, 1, 2))}])
    x = np.ones((1, 4, 4, 2))
    out = rows.apply(None, layer, x, rows.canonical(params), np.ones(1))
    assert not out[..., :4].any() and out[0, 1, 1, 4] == 18


def test_rows_that_the_caller_tells(tmp_path):
    """Grouped-query attention of a language model: q, k and v of different sizes in one weight."""
    path, q, v = (
        "model.layers.0.self_attn",
        "base_model.model.model.layers.0.self_attn.q_proj",
        "lora_unet_v",
    )
    tensors = lora(q, 8) | lora(v, 4)
    write(tmp_path / "a.safetensors", tensors)
    net = engine({f"{path}.qkv_proj": (16, D)})
    rows = {f"{path}.q_proj": (f"{path}.qkv_proj", 0, 8), "v": (f"{path}.qkv_proj", 12, 16)}
    report = net.attach(tmp_path / "a.safetensors", rows=rows)
    assert [layer.rows for layer in report.layers] == ["0:8", "12:16"]
    expected = np.concatenate([delta(tensors, q), np.zeros((4, D)), delta(tensors, v)])
    assert np.allclose(change(net, f"{path}.qkv_proj"), expected, atol=1e-12)
    net = engine({f"{path}.qkv_proj": (16, D)})
    for wrong, match in (
        ((f"{path}.qkv_proj", 8, 17), r"rows 8:17 of layer '.*': it is Linear\(12 -> 16\)"),
        (("x", 0, 1), "there is no such layer"),
    ):
        with pytest.raises(MatchError, match=match):
            net.attach(tmp_path / "a.safetensors", rows={"v": wrong})


def test_rows_on_a_device_and_in_a_capture(tmp_path, device):
    """The same numbers on both backends; a captured forward follows the strength."""
    tensors = {}
    for i, name in enumerate("qkv"):
        tensors |= lora(f"lora_unet_transformer_blocks_0_attn_to_{name}", D, alpha=i + 1.0, seed=i)
    write(tmp_path / "a.safetensors", tensors)
    layer = Linear.from_torch(np.random.default_rng(0).standard_normal((3 * D, D)))
    net = Engine({"double_blocks.0.img_attn.qkv": layer}, device=device, dtype="f32")
    net.attach(tmp_path / "a.safetensors", name="a", strength=0.5)
    x = np.random.default_rng(1).standard_normal((5, D)).astype(np.float32)
    whole = np.concatenate(
        [delta(tensors, f"lora_unet_transformer_blocks_0_attn_to_{name}") for name in "qkv"]
    )
    step = net.capture(x)
    for strength in (0.5, -2.0):
        net.strength["a"] = strength
        expected = x @ (np.asarray(layer.weight) + strength * whole.T)
        for found in (net.forward(x), step(x), net.merged().forward(x)):
            assert np.allclose(to_device(found, "cpu"), expected, rtol=1e-4, atol=1e-4)
