"""Dialects: every key as the programs write them is taken apart, or said to be in none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lycoris_cupy.io.dialects import DIALECTS
from lycoris_cupy.io.keys import WORDS, parse_key, unread

LORA = ("lora_down.weight", "lora_up.weight")


@pytest.mark.parametrize(
    "key, dialect, prefix, path, suffix",
    [
        ("lycoris_block_layer.lora_up.weight", "lycoris", "lycoris_", "block_layer", LORA[1]),
        ("lora_unet_mid.hada_w1_a", "kohya", "lora_unet_", "mid", "hada_w1_a"),
        ("lora_te_x.alpha", "kohya", "lora_te_", "x", "alpha"),
        ("lora_te2_x.a1.weight", "kohya", "lora_te2_", "x", "a1.weight"),
        ("lora_unet__blocks_0_q.lora_A.weight", "kohya", "lora_unet__", "blocks_0_q", LORA[0]),
        ("lora_transformer_x.lora_up.weight", "onetrainer", "lora_transformer_", "x", LORA[1]),
        ("lora_prior_unet_x.lora_up.weight", "cascade", "lora_prior_unet_", "x", LORA[1]),
        ("base_model.model.a.b.lora_A.weight", "peft", "base_model.model.", "a.b", LORA[0]),
        (
            "base_model.model.a.lora_magnitude_vector",
            "peft",
            "base_model.model.",
            "a",
            "dora_scale",
        ),
        ("base_model.model.conv.hada_w1_a", "peft", "base_model.model.", "conv", "hada_w1_a"),
        ("base_model.model.a.unknown", "peft", "base_model.model.", "a", "unknown"),
        ("unet.down.0.to_q.lora_A.weight", "diffusers", "unet.", "down.0.to_q", LORA[0]),
        ("transformer.x.lora_B.default.weight", "diffusers", "transformer.", "x", LORA[1]),
        ("text_encoder_2.x.lora_B.weight", "diffusers", "text_encoder_2.", "x", LORA[1]),
        ("unet.a.to_q.lora.down.weight", "diffusers-old", "unet.", "a.to_q", LORA[0]),
        (
            "unet.a.attn1.processor.to_q_lora.up.weight",
            "diffusers-old",
            "unet.",
            "a.attn1.to_q",
            LORA[1],
        ),
        ("unet.a.processor.to_out_lora.up.weight", "diffusers-old", "unet.", "a.to_out.0", LORA[1]),
        ("unet.a.attn1.to_q_lora.up.weight", "diffusers-old", "unet.", "a.attn1.to_q", LORA[1]),
        (
            "text_encoder.q.lora_linear_layer.up.weight",
            "diffusers-old",
            "text_encoder.",
            "q",
            LORA[1],
        ),
        (
            "diffusion_model.blocks.0.q.lora_A.weight",
            "bfl",
            "diffusion_model.",
            "blocks.0.q",
            LORA[0],
        ),
        (
            "diffusion_model.blocks.0.q.lora_up.weight",
            "comfyui",
            "diffusion_model.",
            "blocks.0.q",
            LORA[1],
        ),
        ("diffusion_model.q.diff_b", "bfl", "diffusion_model.", "q", "diff_b"),
        (
            "text_encoders.clip_g.transformer.a.lora_up.weight",
            "comfyui",
            "text_encoders.clip_g.transformer.",
            "a",
            LORA[1],
        ),
        ("blocks.0.attn.lora_A", "bare", "", "blocks.0.attn", LORA[0]),
        ("blocks.0.processor.to_q_lora.down.weight", "bare", "", "blocks.0.to_q", LORA[0]),
    ],
)
def test_a_key_is_taken_apart(key, dialect, prefix, path, suffix):
    found = parse_key(key)
    assert (found.dialect.name, *found[1:]) == (dialect, prefix, path, suffix)
    assert found.module == prefix + path


@pytest.mark.parametrize(
    "key, why",
    [
        ("double_blocks.0.processor.qkv_lora1.down.weight", "is named as by x-labs, which is not"),
        ("bundle_emb.cat.string_to_param", "is named as by trainers that bundle embeddings"),
        ("model.layers.0.weight", "is in no dialect that is known"),
        ("lora_A.weight", "is in no dialect"),
        ("lycoris_x", "is in no dialect"),
        ("", "is in no dialect"),
    ],
)
def test_what_is_not_read_is_explained(key, why):
    assert parse_key(key) is None
    assert unread(key).startswith(why) and "lycoris, kohya" in unread(key)


@given(
    st.sampled_from(sorted(DIALECTS)),
    st.lists(st.sampled_from(["a", "0", "to_q", "net"]), min_size=1, max_size=4),
    st.sampled_from(LORA),
    st.data(),
)
def test_what_a_dialect_writes_it_reads(name, path, suffix, data):
    dialect = DIALECTS[name]
    prefix = data.draw(st.sampled_from(sorted(dialect.prefixes)))
    part = (dialect.prefixes[prefix] or (None,))[0]
    module = prefix + (".".join(path) if dialect.dotted else "_".join(path))
    key = parse_key(f"{module}.{dialect.word(suffix, part)}")
    assert (key.module, key.suffix, key.prefix) == (module, suffix, prefix)
    # Prefixes that two dialects share are read as the first one's.
    assert key.dialect is dialect or prefix in key.dialect.prefixes
    assert dialect.prefix(part) is not None


def test_every_entry_can_be_used():
    for dialect in DIALECTS.values():
        assert (
            dialect.about
            and dialect.prefixes
            and dialect.alpha in ("tensor", "configuration", "folded")
        )
        assert set(dialect.factors) <= set(WORDS)
        assert all(
            prefix.endswith("." if dialect.dotted else "_") or not prefix
            for prefix in dialect.prefixes
        )
        assert dialect.prefix("no such part") is None or None in dialect.prefixes.values()


@given(st.text(max_size=30))
def test_any_key_is_taken_apart_or_explained(key):
    found = parse_key(key)
    assert found is None or (found.path or not found.prefix == "") and found.suffix
    assert found is not None or "the dialects that are read" in unread(key)
