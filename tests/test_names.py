"""Names: keys to modules, modules to layers; never a guess, and never by a part of a name."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lycoris_cupy.errors import MatchError
from lycoris_cupy.io.names import (
    PREFIXES,
    BaseNames,
    container_of,
    fold,
    foreign,
    split_key,
    split_prefix,
)


@pytest.mark.parametrize(
    "key, expected",
    [
        ("lycoris_block_layer.lora_up.weight", ("lycoris_block_layer", "lora_up.weight")),
        ("lora_unet_mid.hada_w1_a", ("lora_unet_mid", "hada_w1_a")),
        ("lora_te2_x.a1.weight", ("lora_te2_x", "a1.weight")),
        ("lycoris_x", None),
        ("lora_A.weight", None),
        ("other_x.alpha", None),
        ("down.0.conv.lora_up.weight", None),
        ("", None),
    ],
)
def test_split_key(key, expected):
    assert split_key(key) == expected


@pytest.mark.parametrize(
    "key, dialect",
    [
        ("base_model.model.conv.lora_A.weight", "PEFT;"),
        ("base_model.model.conv.hada_w1_a", "PEFT;"),
        ("diffusion_model.blocks.0.q.lora_A.weight", "BFL and ai-toolkit"),
        ("transformer.single.0.lora_B.default.weight", "BFL and ai-toolkit"),
        ("unet.down.0.to_q.lora_A.weight", "PEFT in a diffusers file"),
        ("x.attn.lora_magnitude_vector", "PEFT in a diffusers file"),
        ("unet.down.0.to_q.lora.down.weight", "diffusers;"),
        ("down.0.processor.to_q_lora.down.weight", "diffusers;"),
        ("text_encoder.layers.0.lora_linear_layer.up.weight", r"diffusers \(text encoder\)"),
        ("double_blocks.0.processor.qkv_lora1.down.weight", "x-labs"),
        ("oft_unet_x.oft_blocks", "kohya's OFT"),
        ("lora_prior_unet_x.lora_up.weight", "Stable Cascade"),
        ("lora_transformer_x.lora_up.weight", "old OneTrainer"),
        ("bundle_emb.cat.string_to_param", "bundle embeddings"),
        ("model.layers.0.weight", "has an unknown prefix"),
    ],
)
def test_other_dialects_are_named(key, dialect):
    assert split_key(key) is None
    assert re.search(
        rf"{dialect}.*this version reads LyCORIS and kohya names, lycoris_\.\.\., lora_unet_\.\.\.",
        foreign(key),
    )


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
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1", None),
        ("lora_te1_input_blocks_1_0_in_layers_2", None),
        ("lora_unet_text_model_encoder_layers_0_mlp_fc1", None),
        ("lora_unet_input_blocks_1_0_in_layers", None),
        ("lora_unet_input_blocks_1_0_in_layers_20", None),
        ("lora_unet_out", None),
        ("lora_unet_decoder_conv_in", None),
        ("out_2", None),
        ("lycoris_", None),
    ],
)
def test_resolve_in_a_checkpoint(module, index):
    assert BaseNames(SDXL).resolve(module) == (None if index is None else SDXL[index])


def test_t5_is_the_second_or_the_third_encoder():
    names = BaseNames(["text_encoders.clip_l.transformer.fc", "text_encoders.t5xxl.transformer.wo"])
    assert (
        names.resolve("lora_te2_wo")
        == names.resolve("lora_te3_wo")
        == "text_encoders.t5xxl.transformer.wo"
    )
    assert names.resolve("lora_te1_wo") is None and names.resolve("lora_te1_fc") is not None


def test_layers_named_by_users():
    names = BaseNames(["down.0.conv", "mid_conv"])
    assert names.resolve("lycoris_down_0_conv") == "down.0.conv"
    assert names.resolve("lora_unet_mid_conv") == "mid_conv"
    assert names.resolve("lora_te1_mid_conv") == "mid_conv"  # nothing says which part it is


def test_a_name_in_full_goes_first():
    names = BaseNames(["unet.conv", "conv"])
    assert (
        names.resolve("lycoris_conv") == "conv"
        and names.resolve("lycoris_unet_conv") == "unet.conv"
    )


@pytest.mark.parametrize(
    "pair", [["a.b_c", "a_b.c"], ["unet.x", "diffusion_model.x"], ["text_encoder.x", "unet.x"]]
)
def test_two_candidates_are_refused(pair):
    module = "lycoris_" + ("a_b_c" if "a.b_c" in pair else "x")
    with pytest.raises(
        MatchError,
        match=f"module '{module}' could mean any of '{pair[0]}', '{pair[1]}': rename all but one",
    ):
        BaseNames(pair).resolve(module)
    assert BaseNames([*pair, "y"]).resolve("lycoris_y") == "y"


def test_a_prefix_that_names_the_part_resolves_two_candidates():
    names = BaseNames(["text_encoder.x", "unet.x"])
    assert (
        names.resolve("lora_unet_x") == "unet.x" and names.resolve("lora_te_x") == "text_encoder.x"
    )


def test_nearest():
    names = BaseNames(SDXL)
    assert names.nearest("lora_unet_input_blocks_1_0_in_layer_2") == SDXL[0]
    assert names.nearest("lora_unet_inputblocks_1_0_in_layers_2") == SDXL[0]
    assert names.nearest("lycoris_qqqqqqqqqqq") is None
    assert BaseNames([]).nearest("lycoris_x") is None


def test_nearest_is_cheap_among_thousands():
    names = BaseNames(
        [f"model.diffusion_model.blocks.{i}.attn{j}.to_q" for i in range(600) for j in range(5)]
    )
    assert (
        names.nearest("lora_unet_blocks_411_attn3_to_k")
        == "model.diffusion_model.blocks.411.attn3.to_q"
    )
    start = time.process_time()
    found = [names.nearest(f"lora_unet_wrong_{i}_attn_to_q") for i in range(5000)]
    assert time.process_time() - start < 2 and found[-1] is None


PARTS = st.sampled_from(
    ["a", "b", "0", "1", "10", "conv", "unet", "model", "text_encoder", "diffusion_model", "to_q"]
)
PATHS = st.lists(PARTS, min_size=1, max_size=4).flatmap(
    lambda parts: st.lists(st.sampled_from("._"), min_size=len(parts), max_size=len(parts)).map(
        lambda dots: "".join(p + d for p, d in zip(parts, dots, strict=True))[:-1]
    )
)


@given(st.sets(PATHS, min_size=1, max_size=8), st.sampled_from(sorted(PREFIXES)), PATHS)
def test_a_module_means_a_layer_of_its_whole_name_or_none(names, prefix, path):
    base = BaseNames(names)
    for name in sorted(names):
        twins = [other for other in names if fold(other) == fold(name)]
        if len(twins) == 1:
            assert base.resolve(f"lycoris_{fold(name)}") == name  # what `write_adapter` saves
        else:
            with pytest.raises(MatchError):
                base.resolve(f"lycoris_{fold(name)}")
    try:
        found = base.resolve(prefix + fold(path))
    except MatchError:
        return
    assert found is None or fold(path) in (fold(found), fold(found[len(container_of(found)) :]))


@given(st.text(max_size=30))
def test_any_key_is_split_or_explained(key):
    parts = split_key(key)
    if parts is None:
        assert "this version reads" in foreign(key)
    else:
        assert ".".join(parts) == key and split_prefix(parts[0])
