"""The names and shapes of a Stable Diffusion XL checkpoint, from its architecture: the U-Net, both
text encoders and the autoencoder, as `sd_xl_base_1.0.safetensors` names them.

The counts of parameters in PARTS are those of the released model; tests/test_benchmarks.py holds
the shapes against them.
"""

from __future__ import annotations

UNET = "model.diffusion_model."
CLIP_L = "conditioner.embedders.0.transformer.text_model."
CLIP_G = "conditioner.embedders.1.model."
VAE = "first_stage_model."
PARTS = {UNET: 2_567_463_684, CLIP_L: 123_060_480, CLIP_G: 694_659_841, VAE: 83_653_863}

Shapes = dict[str, tuple[int, ...]]


def shapes() -> Shapes:
    """Every float tensor of the checkpoint."""
    return {**_unet(), **_clip_l(), **_clip_g(), **_vae()}


def adapted(all_shapes: Shapes) -> tuple[list[str], list[str]]:
    """The layers of the U-Net that a LoRA (projections of the attention and feed-forward layers)
    and a LoKr (3x3 convolutions) change.
    """
    layers = {n.removesuffix(".weight"): s for n, s in all_shapes.items() if n.endswith(".weight")}
    linear = [n for n, s in layers.items() if ".transformer_blocks." in n and len(s) == 2]
    convolutions = [n for n, s in layers.items() if n.startswith(UNET) and s[2:] == (3, 3)]
    return linear, [n for n in convolutions if min(layers[n][:2]) >= 320]


def _layer(name: str, *weight: int, bias: bool = True) -> Shapes:
    out = {f"{name}.weight": weight}
    return {**out, f"{name}.bias": weight[:1]} if bias else out


def _unet() -> Shapes:
    width, time = 320, 1280
    out = _layer("input_blocks.0.0", width, 4, 3, 3)
    for name, inputs in (("time_embed", width), ("label_emb.0", 2816)):
        out |= _layer(f"{name}.0", time, inputs) | _layer(f"{name}.2", time, time)
    skips, now, block = [width], width, 0
    for level, (wide, depth) in enumerate(((320, 0), (640, 2), (1280, 10))):
        for _ in range(2):
            block += 1
            out |= _residual(f"input_blocks.{block}.0", now, wide, time)
            out |= _transformer(f"input_blocks.{block}.1", wide, depth)
            now = wide
            skips.append(now)
        if level < 2:
            block += 1
            out |= _layer(f"input_blocks.{block}.0.op", now, now, 3, 3)
            skips.append(now)
    out |= _residual("middle_block.0", now, now, time) | _transformer("middle_block.1", now, 10)
    out |= _residual("middle_block.2", now, now, time)
    block = 0
    for level, (wide, depth) in enumerate(((1280, 10), (640, 2), (320, 0))):
        for i in range(3):
            out |= _residual(f"output_blocks.{block}.0", now + skips.pop(), wide, time)
            out |= _transformer(f"output_blocks.{block}.1", wide, depth)
            now = wide
            if level < 2 and i == 2:
                out |= _layer(f"output_blocks.{block}.2.conv", now, now, 3, 3)
            block += 1
    out |= _layer("out.0", now) | _layer("out.2", 4, now, 3, 3)
    return {UNET + name: shape for name, shape in out.items()}


def _residual(name: str, inputs: int, outputs: int, time: int) -> Shapes:
    out = _layer(f"{name}.in_layers.0", inputs)
    out |= _layer(f"{name}.in_layers.2", outputs, inputs, 3, 3)
    out |= _layer(f"{name}.emb_layers.1", outputs, time)
    out |= _layer(f"{name}.out_layers.0", outputs)
    out |= _layer(f"{name}.out_layers.3", outputs, outputs, 3, 3)
    if inputs != outputs:
        out |= _layer(f"{name}.skip_connection", outputs, inputs, 1, 1)
    return out


def _transformer(name: str, wide: int, depth: int) -> Shapes:
    if not depth:
        return {}
    out = _layer(f"{name}.norm", wide) | _layer(f"{name}.proj_in", wide, wide)
    for i in range(depth):
        at = f"{name}.transformer_blocks.{i}"
        for attention, context in (("attn1", wide), ("attn2", 2048)):
            out |= _layer(f"{at}.{attention}.to_q", wide, wide, bias=False)
            out |= _layer(f"{at}.{attention}.to_k", wide, context, bias=False)
            out |= _layer(f"{at}.{attention}.to_v", wide, context, bias=False)
            out |= _layer(f"{at}.{attention}.to_out.0", wide, wide)
        out |= _layer(f"{at}.ff.net.0.proj", 8 * wide, wide)
        out |= _layer(f"{at}.ff.net.2", wide, 4 * wide)
        for norm in ("norm1", "norm2", "norm3"):
            out |= _layer(f"{at}.{norm}", wide)
    return out | _layer(f"{name}.proj_out", wide, wide)


def _clip_l() -> Shapes:
    wide = 768
    out = _layer("embeddings.token_embedding", 49408, wide, bias=False)
    out |= _layer("embeddings.position_embedding", 77, wide, bias=False)
    for i in range(12):
        at = f"encoder.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            out |= _layer(f"{at}.self_attn.{part}", wide, wide)
        out |= _layer(f"{at}.layer_norm1", wide) | _layer(f"{at}.layer_norm2", wide)
        out |= _layer(f"{at}.mlp.fc1", 4 * wide, wide) | _layer(f"{at}.mlp.fc2", wide, 4 * wide)
    return {CLIP_L + n: s for n, s in (out | _layer("final_layer_norm", wide)).items()}


def _clip_g() -> Shapes:
    wide = 1280
    out: Shapes = {
        "positional_embedding": (77, wide),
        "text_projection": (wide, wide),
        "logit_scale": (),
    }
    out |= _layer("token_embedding", 49408, wide, bias=False)
    for i in range(32):
        at = f"transformer.resblocks.{i}"
        out |= {
            f"{at}.attn.in_proj_weight": (3 * wide, wide),
            f"{at}.attn.in_proj_bias": (3 * wide,),
        }
        out |= _layer(f"{at}.attn.out_proj", wide, wide)
        out |= _layer(f"{at}.ln_1", wide) | _layer(f"{at}.ln_2", wide)
        out |= _layer(f"{at}.mlp.c_fc", 4 * wide, wide) | _layer(f"{at}.mlp.c_proj", wide, 4 * wide)
    return {CLIP_G + n: s for n, s in (out | _layer("ln_final", wide)).items()}


def _vae() -> Shapes:
    widths, z = (128, 256, 512, 512), 4
    out = _layer("encoder.conv_in", 128, 3, 3, 3)
    now = 128
    for level, wide in enumerate(widths):
        for i in range(2):
            out |= _vae_block(f"encoder.down.{level}.block.{i}", now, wide)
            now = wide
        if level < 3:
            out |= _layer(f"encoder.down.{level}.downsample.conv", wide, wide, 3, 3)
    out |= _vae_middle("encoder.mid", now) | _layer("encoder.norm_out", now)
    out |= _layer("encoder.conv_out", 2 * z, now, 3, 3) | _layer("quant_conv", 2 * z, 2 * z, 1, 1)
    out |= _layer("post_quant_conv", z, z, 1, 1) | _layer("decoder.conv_in", now, z, 3, 3)
    out |= _vae_middle("decoder.mid", now)
    for level in (3, 2, 1, 0):
        for i in range(3):
            out |= _vae_block(f"decoder.up.{level}.block.{i}", now, widths[level])
            now = widths[level]
        if level:
            out |= _layer(f"decoder.up.{level}.upsample.conv", now, now, 3, 3)
    out |= _layer("decoder.norm_out", now) | _layer("decoder.conv_out", 3, now, 3, 3)
    return {VAE + name: shape for name, shape in out.items()}


def _vae_block(name: str, inputs: int, outputs: int) -> Shapes:
    out = _layer(f"{name}.norm1", inputs) | _layer(f"{name}.conv1", outputs, inputs, 3, 3)
    out |= _layer(f"{name}.norm2", outputs) | _layer(f"{name}.conv2", outputs, outputs, 3, 3)
    if inputs != outputs:
        out |= _layer(f"{name}.nin_shortcut", outputs, inputs, 1, 1)
    return out


def _vae_middle(name: str, wide: int) -> Shapes:
    out = _vae_block(f"{name}.block_1", wide, wide) | _vae_block(f"{name}.block_2", wide, wide)
    out |= _layer(f"{name}.attn_1.norm", wide)
    for part in ("q", "k", "v", "proj_out"):
        out |= _layer(f"{name}.attn_1.{part}", wide, wide, 1, 1)
    return out
