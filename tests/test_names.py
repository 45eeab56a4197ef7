"""Names: modules to layers; never a guess, and never by a part of a name."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lycoris_cupy import LayerShape
from lycoris_cupy.io.keys import FOLDED_PREFIXES, parse_key
from lycoris_cupy.io.names import BaseNames, container_of, fold, split_folded


def key_of(module):
    return parse_key(f"{module}.alpha")


def resolve(names, module):
    """The one layer a module means, None if none, or all that it could mean."""
    key = key_of(module)
    if key is None:
        return None
    tiers = names.candidates(key)
    if not tiers:
        return None
    layers = [share.layer for (share,) in tiers[0]]
    return layers[0] if len(layers) == 1 else layers


def test_fold():
    assert fold("down.0.conv.weight") == fold("down.0.conv") == fold("down_0_conv") == "down_0_conv"
    assert fold("weight.weights") == "weight_weights"


def test_containers_are_the_longest_match():
    assert container_of("model.diffusion_model.out.2") == "model.diffusion_model."
    assert container_of("model.layers.0") == "model."
    assert container_of("models.x") == ""


SDXL = [
    "model.diffusion_model.input_blocks.1.0.in_layers.2",
    "model.diffusion_model.out.2",
    "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1",
    "conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc",
    "first_stage_model.decoder.conv_in",
]


@pytest.mark.parametrize(
    "module, index",
    [
        ("lora_unet_input_blocks_1_0_in_layers_2", 0),
        ("lycoris_input_blocks_1_0_in_layers_2", 0),
        ("lycoris_model_diffusion_model_out_2", 1),
        ("lora_unet_model_diffusion_model_out_2", 1),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", 2),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", 2),
        ("lora_te2_transformer_resblocks_0_mlp_c_fc", 3),
        ("lycoris_first_stage_model_decoder_conv_in", 4),
        # Another part of the model, a part of a name, a name too long, no prefix.
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1", 3),
        ("lora_te1_input_blocks_1_0_in_layers_2", None),
        ("lora_unet_text_model_encoder_layers_0_mlp_fc1", None),
        ("lora_unet_input_blocks_1_0_in_layers", None),
        ("lora_unet_input_blocks_1_0_in_layers_20", None),
        ("lora_unet_out", None),
        ("lora_unet_decoder_conv_in", None),
        ("out_2", 1),
        ("lycoris_", None),
    ],
)
def test_resolve_in_a_checkpoint(module, index):
    assert resolve(BaseNames(SDXL), module) == (None if index is None else SDXL[index])


def test_t5_is_the_second_or_the_third_encoder():
    names = BaseNames(["text_encoders.clip_l.transformer.fc", "text_encoders.t5xxl.transformer.wo"])
    assert (
        resolve(names, "lora_te2_wo")
        == resolve(names, "lora_te3_wo")
        == "text_encoders.t5xxl.transformer.wo"
    )
    assert resolve(names, "lora_te1_wo") is None and resolve(names, "lora_te1_fc") is not None


def test_layers_named_by_users():
    names = BaseNames(["down.0.conv", "mid_conv"])
    assert resolve(names, "lycoris_down_0_conv") == "down.0.conv"
    assert resolve(names, "lora_unet_mid_conv") == "mid_conv"
    assert resolve(names, "lora_te1_mid_conv") == "mid_conv"  # nothing says which part it is


def test_a_name_in_full_goes_first():
    names = BaseNames(["unet.conv", "conv"])
    assert (
        resolve(names, "lycoris_conv") == "conv"
        and resolve(names, "lycoris_unet_conv") == "unet.conv"
    )


@pytest.mark.parametrize(
    "pair", [["a.b_c", "a_b.c"], ["unet.x", "diffusion_model.x"], ["text_encoder.x", "unet.x"]]
)
def test_two_candidates_are_both_given(pair):
    module = "lycoris_" + ("a_b_c" if "a.b_c" in pair else "x")
    assert resolve(BaseNames(pair), module) == pair
    assert resolve(BaseNames([*pair, "y"]), "lycoris_y") == "y"


def test_a_container_in_a_folded_path():
    """LyCORIS around a whole pipeline: the base may have the layer without its container."""
    names = BaseNames(["down.0.conv", "text_encoder_2.fc"])
    assert resolve(names, "lycoris_unet_down_0_conv") == "down.0.conv"
    assert resolve(names, "lycoris_text_encoder_2_fc") == "text_encoder_2.fc"
    assert resolve(names, "lora_te1_unet_down_0_conv") is None
    assert split_folded("text_encoder_2_x") == ("te2", "x")
    assert split_folded("text_encoders_x") == (None, "text_encoders_x")


def test_dotted_names():
    names = BaseNames(["model.diffusion_model.a.b", "transformer.h.0", "text_encoder_2.a.b"])
    assert resolve(names, "diffusion_model.a.b") == "model.diffusion_model.a.b"
    assert resolve(names, "text_encoder_2.a.b") == "text_encoder_2.a.b"
    assert resolve(names, "transformer.h.0") == "transformer.h.0"
    assert resolve(names, "base_model.model.transformer.h.0") == "transformer.h.0"
    assert resolve(names, "base_model.model.a.b") == [
        "model.diffusion_model.a.b",
        "text_encoder_2.a.b",
    ]
    assert resolve(names, "unet.h.0") == "transformer.h.0"
    assert resolve(names, "text_encoder.a.b") is None


def test_a_prefix_that_names_the_part_resolves_two_candidates():
    names = BaseNames(["text_encoder.x", "unet.x"])
    assert (
        resolve(names, "lora_unet_x") == "unet.x"
        and resolve(names, "lora_te_x") == "text_encoder.x"
    )


def test_nearest():
    names = BaseNames(SDXL)
    assert names.nearest(key_of("lora_unet_input_blocks_1_0_in_layer_2")) == SDXL[0]
    assert names.nearest(key_of("lora_unet_inputblocks_1_0_in_layers_2")) == SDXL[0]
    assert names.nearest(key_of("lycoris_qqqqqqqqqqq")) is None
    assert BaseNames([]).nearest(key_of("lycoris_x")) is None


def test_nearest_is_cheap_among_thousands():
    names = BaseNames(
        [f"model.diffusion_model.blocks.{i}.attn{j}.to_q" for i in range(600) for j in range(5)]
    )
    assert (
        names.nearest(key_of("lora_unet_blocks_411_attn3_to_k"))
        == "model.diffusion_model.blocks.411.attn3.to_q"
    )
    start = time.process_time()
    found = [names.nearest(key_of(f"lora_unet_wrong_{i}_attn_to_q")) for i in range(5000)]
    assert time.process_time() - start < 2 and found[-1] is None


PARTS = st.sampled_from(
    ["a", "b", "0", "1", "10", "conv", "unet", "model", "text_encoder", "diffusion_model", "to_q"]
)
PATHS = st.lists(PARTS, min_size=1, max_size=4).flatmap(
    lambda parts: st.lists(st.sampled_from("._"), min_size=len(parts), max_size=len(parts)).map(
        lambda dots: "".join(p + d for p, d in zip(parts, dots, strict=True))[:-1]
    )
)


@given(st.sets(PATHS, min_size=1, max_size=8), st.sampled_from(FOLDED_PREFIXES), PATHS)
def test_a_module_means_layers_of_its_whole_name_or_none(names, prefix, path):
    base = BaseNames(names)
    for name in sorted(names):
        twins = sorted(other for other in names if fold(other) == fold(name))
        found = resolve(base, f"lycoris_{fold(name)}")  # what `write_adapter` saves
        assert found == name if len(twins) == 1 else sorted(found) == twins
    found = resolve(base, prefix + fold(path))
    for layer in [found] if isinstance(found, str) else found or []:
        ends = (fold(layer), fold(layer[len(container_of(layer)) :]))
        assert fold(path) in ends or split_folded(fold(path))[1] in ends


def test_shapes_and_names_alone_give_the_same_layers():
    shapes = {name: LayerShape.of_file((3, 2)) for name in SDXL}
    for module in ("lora_unet_out_2", "lora_te1_text_model_encoder_layers_0_mlp_fc1"):
        assert resolve(BaseNames(SDXL), module) == resolve(BaseNames(shapes), module)
