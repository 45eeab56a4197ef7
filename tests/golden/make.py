"""Makes the golden files: adapters with the keys that the real programs write, and the change of
each layer as it follows from their formulas.

Nothing of the package is used: files are packed by hand, changes are sums of outer products in
Python's own arithmetic order. Run `python tests/golden/make.py` to make them again; the bytes are
the same every time.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent


def values(name: str, *shape: int) -> np.ndarray:
    """Multiples of 1/8 between -2 and 2, exact in every dtype: a generator seeded by the name."""
    state, out = sum((i + 1) * ord(c) for i, c in enumerate(name)) % 65521, []
    for _ in range(int(np.prod(shape))):
        state = (state * 1103 + 12345) % 65521
        out.append((state % 33 - 16) / 8)
    return np.array(out, np.float64).reshape(shape)


def pack(
    path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None
) -> None:
    """A safetensors file: 8 bytes of length, a JSON header, the bytes."""
    header: dict = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name, array in tensors.items():
        kind = {"float32": "F32", "float16": "F16", "float64": "F64"}[array.dtype.name]
        raw = array.tobytes()
        header[name] = {
            "dtype": kind,
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def lora(module: str, out: int, inputs: int, rank: int, words, alpha=None, kernel=(), half=False):
    """(tensors, change before alpha / rank) of a LoRA. words: of down, up and alpha."""
    ones = (1,) * len(kernel)
    down, up = values(module + "d", rank, inputs, *kernel), values(module + "u", out, rank, *ones)
    change = np.zeros((out, inputs, *kernel))
    for r in range(rank):
        for o in range(out):
            change[o] += up.reshape(out, rank)[o, r] * down[r]
    dtype = np.float16 if half else np.float32
    tensors = {f"{module}.{words[0]}": down.astype(dtype), f"{module}.{words[1]}": up.astype(dtype)}
    if alpha is not None:
        tensors[f"{module}.{words[2]}"] = np.array(alpha, dtype)
    return tensors, change


KOHYA = ("lora_down.weight", "lora_up.weight", "alpha")
AB = ("lora_A.weight", "lora_B.weight")


def case(name: str, folder: bool, parts, base, metadata=None, config=None) -> dict:
    """Write one case. parts: (tensors, {layer: change}). base: layer -> shape of its weight."""
    tensors, changes = {}, {}
    for own, change in parts:
        assert not tensors.keys() & own.keys()
        tensors |= own
        for layer, delta in change.items():
            changes[layer] = changes.get(layer, 0) + delta
    path = HERE / name / "adapter_model.safetensors" if folder else HERE / f"{name}.safetensors"
    pack(path, tensors, metadata)
    if config is not None:
        (path.parent / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
    pack(HERE / "expect" / f"{name}.safetensors", changes)
    return {"file": str(path.relative_to(HERE)) if not folder else name, "base": base}


def rows(change: np.ndarray, begin: int, total: int) -> np.ndarray:
    """The change in some rows of a fused weight."""
    out = np.zeros((total, *change.shape[1:]))
    out[begin : begin + len(change)] = change
    return out


def main() -> None:
    cases = {}
    sd1 = {
        "model.diffusion_model.input_blocks.1.1.proj_in": [6, 6, 1, 1],
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q": [6, 6],
        "model.diffusion_model.input_blocks.3.0.op": [6, 6, 3, 3],
        "model.diffusion_model.output_blocks.2.1.conv": [6, 6, 3, 3],
        "model.diffusion_model.out.2": [4, 6, 3, 3],
        "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj": [5, 5],
    }
    names = list(sd1)
    kohya = []
    for module, layer, alpha in (
        ("lora_unet_down_blocks_0_attentions_0_proj_in", names[0], 1.0),
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", names[1], 2.0),
        ("lora_unet_down_blocks_0_downsamplers_0_conv", names[2], 4.0),
        ("lora_unet_up_blocks_0_upsamplers_0_conv", names[3], 4.0),
        ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", names[5], 0.5),
    ):
        out, inputs, *kernel = sd1[layer]
        own, change = lora(module, out, inputs, 2, KOHYA, alpha, tuple(kernel), half=True)
        kohya.append((own, {layer: change * alpha / 2}))
    record = {"ss_network_module": "networks.lora", "ss_base_model_version": "sd_v1"}
    cases["kohya-sd1"] = case("kohya-sd1", False, kohya, sd1, record)

    sdxl = {
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.1.attn2.to_k": [6, 8],
        "model.diffusion_model.middle_block.1.proj_out": [6, 6],
        "conditioner.embedders.0.transformer.text_model.encoder.layers.2.mlp.fc1": [8, 5],
        "conditioner.embedders.1.model.transformer.resblocks.2.mlp.c_fc": [9, 6],
        "conditioner.embedders.1.model.transformer.resblocks.2.attn.in_proj_weight": [18, 6],
    }
    names = list(sdxl)
    parts = []
    for module, layer, out, begin in (
        ("lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k", names[0], 6, 0),
        ("lora_unet_middle_block_1_proj_out", names[1], 6, 0),
        ("lora_te1_text_model_encoder_layers_2_mlp_fc1", names[2], 8, 0),
        ("lora_te2_text_model_encoder_layers_2_mlp_fc1", names[3], 9, 0),
        ("lora_te2_text_model_encoder_layers_2_self_attn_k_proj", names[4], 6, 6),
        ("lora_te2_text_model_encoder_layers_2_self_attn_v_proj", names[4], 6, 12),
    ):
        own, change = lora(module, out, sdxl[layer][1], 3, KOHYA, 3.0)
        parts.append((own, {layer: rows(change, begin, sdxl[layer][0])}))
    cases["kohya-sdxl"] = case("kohya-sdxl", False, parts, sdxl)

    flux = {
        "double_blocks.0.img_attn.qkv": [12, 4],
        "double_blocks.0.txt_mlp.2": [4, 6],
        "single_blocks.3.linear1": [22, 4],
        "final_layer.adaLN_modulation.1": [8, 4],
    }
    qkv = "transformer.transformer_blocks.0.attn"
    parts = []
    for module, layer, out, begin in (
        (f"{qkv}.to_q", "double_blocks.0.img_attn.qkv", 4, 0),
        (f"{qkv}.to_v", "double_blocks.0.img_attn.qkv", 4, 8),
        ("transformer.transformer_blocks.0.ff_context.net.2", "double_blocks.0.txt_mlp.2", 4, 0),
        ("transformer.single_transformer_blocks.3.attn.to_k", "single_blocks.3.linear1", 4, 4),
        ("transformer.single_transformer_blocks.3.proj_mlp", "single_blocks.3.linear1", 10, 12),
    ):
        own, change = lora(module, out, flux[layer][1], 2, AB)
        parts.append((own, {layer: rows(change, begin, flux[layer][0])}))
    own, change = lora("transformer.norm_out.linear", 8, 4, 2, AB)
    parts.append(
        (own, {"final_layer.adaLN_modulation.1": np.concatenate([change[4:], change[:4]])})
    )
    cases["diffusers-flux-on-bfl"] = case("diffusers-flux-on-bfl", False, parts, flux)

    split = {
        **{f"transformer_blocks.0.attn.to_{x}": [4, 4] for x in "qkv"},
        "transformer_blocks.0.attn.to_out.0": [4, 4],
        "single_transformer_blocks.3.proj_out": [4, 9],
    }
    fused, whole = lora("diffusion_model.double_blocks.0.img_attn.qkv", 12, 4, 3, AB)
    parts = [
        (
            fused,
            {
                f"transformer_blocks.0.attn.to_{x}": whole[4 * i : 4 * i + 4]
                for i, x in enumerate("qkv")
            },
        )
    ]
    own, change = lora("diffusion_model.double_blocks.0.img_attn.proj", 4, 4, 3, AB)
    parts.append((own, {"transformer_blocks.0.attn.to_out.0": change}))
    own, change = lora("diffusion_model.single_blocks.3.linear2", 4, 9, 3, AB)
    parts.append((own, {"single_transformer_blocks.3.proj_out": change}))
    cases["aitoolkit-flux-on-diffusers"] = case("aitoolkit-flux-on-diffusers", False, parts, split)

    unet = {
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0": [6, 6],
        "mid_block.resnets.1.conv2": [6, 6, 3, 3],
        "up_blocks.1.attentions.2.proj_in": [6, 6, 1, 1],
    }
    parts = []
    for layer, (out, inputs, *kernel) in unet.items():
        own, change = lora(f"unet.{layer}", out, inputs, 2, AB, None, tuple(kernel))
        parts.append((own, {layer: change * 2}))
    about = {
        "unet.r": 2,
        "unet.lora_alpha": 4,
        "unet.target_modules": ["to_out.0", "conv2", "proj_in"],
    }
    cases["diffusers-unet"] = case(
        "diffusers-unet",
        False,
        parts,
        unet,
        {"format": "pt", "lora_adapter_metadata": json.dumps(about)},
    )

    old = {
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": [6, 6],
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0": [6, 6],
        "unet.mid_block.attentions.0.proj_in": [6, 6],
        "text_encoder.text_model.encoder.layers.1.self_attn.v_proj": [5, 5],
    }
    names, parts = list(old), []
    attn = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor."
    for module, words, layer in (
        (attn + "to_q_lora", ("down.weight", "up.weight"), names[0]),
        (attn + "to_out_lora", ("down.weight", "up.weight"), names[1]),
        ("unet.mid_block.attentions.0.proj_in.lora", ("down.weight", "up.weight"), names[2]),
        (
            "text_encoder.text_model.encoder.layers.1.self_attn.v_proj.lora_linear_layer",
            ("down.weight", "up.weight"),
            names[3],
        ),
    ):
        own, change = lora(module, *old[layer], 2, words)
        parts.append((own, {layer: change}))
    cases["diffusers-old"] = case("diffusers-old", False, parts, old)

    net = {
        "model.layers.0.self_attn.q_proj": [6, 4],
        "model.layers.1.mlp.up_proj": [8, 4],
        "model.conv": [5, 3, 3, 3],
    }
    parts = []
    for layer, rank, alpha in (
        ("model.layers.0.self_attn.q_proj", 2, 6),
        ("model.layers.1.mlp.up_proj", 4, 8),
        ("model.conv", 4, 6),
    ):
        out, inputs, *kernel = net[layer]
        own, change = lora(f"base_model.model.{layer}", out, inputs, rank, AB, None, tuple(kernel))
        parts.append((own, {layer: change * alpha / rank}))
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 8},
              "use_rslora": False, "target_modules": ["q_proj", "up_proj", "conv"], "bias": "none"}  # fmt: skip
    cases["peft"] = case("peft", True, parts, net, {"format": "pt"}, config)

    comfy = {"diffusion_model.blocks.0.attn.q": [6, 4], "diffusion_model.blocks.0.norm": [6, 6],
             "text_encoders.clip_l.transformer.text_model.fc": [5, 4]}  # fmt: skip
    own, change = lora("diffusion_model.blocks.0.attn.q", 6, 4, 2, KOHYA, 2.0)
    parts = [(own, {"diffusion_model.blocks.0.attn.q": change})]
    diff = values("comfy diff", 6, 6)
    parts.append(
        (
            {"diffusion_model.blocks.0.norm.diff": diff.astype(np.float32)},
            {"diffusion_model.blocks.0.norm": diff},
        )
    )
    own, change = lora("text_encoders.clip_l.transformer.text_model.fc", 5, 4, 2, KOHYA, 2.0)
    parts.append((own, {"text_encoders.clip_l.transformer.text_model.fc": change}))
    cases["comfyui"] = case("comfyui", False, parts, comfy)

    one = {
        "transformer_blocks.0.attn.to_q": [6, 4],
        "text_encoder.text_model.encoder.layers.0.mlp.fc2": [5, 7],
    }
    parts = []
    for module, layer in (
        ("lora_transformer_transformer_blocks_0_attn_to_q", list(one)[0]),
        ("lora_te_text_model_encoder_layers_0_mlp_fc2", list(one)[1]),
    ):
        own, change = lora(module, *one[layer], 2, KOHYA, 1.0)
        parts.append((own, {layer: change / 2}))
    cases["onetrainer"] = case("onetrainer", False, parts, one)

    mochi = {"blocks.0.attn.qkv_x": [12, 4], "blocks.0.attn.proj_x": [4, 4]}
    parts = []
    for layer in mochi:
        own, change = lora(layer, *mochi[layer], 2, ("lora_A", "lora_B"))
        parts.append((own, {layer: change}))
    cases["mochi"] = case("mochi", False, parts, mochi)

    wrap = {
        "blocks.0.conv": [6, 4, 3, 3],
        "blocks.0.lin": [6, 4],
        "blocks.1.lin": [6, 4],
        "blocks.2.lin": [6, 4],
    }
    m = "lycoris_blocks_0_conv"
    w = {
        k: values(m + k, *s)
        for k, s in (
            ("hada_w1_a", (6, 2)),
            ("hada_w1_b", (2, 36)),
            ("hada_w2_a", (6, 2)),
            ("hada_w2_b", (2, 36)),
        )
    }
    loha = (w["hada_w1_a"] @ w["hada_w1_b"]) * (w["hada_w2_a"] @ w["hada_w2_b"]) * 3 / 2
    parts = [
        (
            {f"{m}.{k}": v.astype(np.float32) for k, v in w.items()}
            | {f"{m}.alpha": np.array(3, np.float32)},
            {"blocks.0.conv": loha.reshape(6, 4, 3, 3)},
        )
    ]
    m = "lycoris_blocks_0_lin"
    w = {
        k: values(m + k, *s)
        for k, s in (("lokr_w1", (2, 2)), ("lokr_w2_a", (3, 1)), ("lokr_w2_b", (1, 2)))
    }
    kron = np.kron(w["lokr_w1"], w["lokr_w2_a"] @ w["lokr_w2_b"]) * 4
    parts.append(
        (
            {f"{m}.{k}": v.astype(np.float32) for k, v in w.items()}
            | {f"{m}.alpha": np.array(4, np.float32)},
            {"blocks.0.lin": kron},
        )
    )
    m = "lycoris_blocks_1_lin"  # both sides full: alpha means nothing
    w = {k: values(m + k, *s) for k, s in (("lokr_w1", (2, 2)), ("lokr_w2", (3, 2)))}
    parts.append(
        (
            {f"{m}.{k}": v.astype(np.float32) for k, v in w.items()}
            | {f"{m}.alpha": np.array(9, np.float32)},
            {"blocks.1.lin": np.kron(w["lokr_w1"], w["lokr_w2"])},
        )
    )
    own, change = lora("lycoris_blocks_2_lin", 6, 4, 2, KOHYA, 0.0)  # alpha 0 means the rank
    parts.append((own, {"blocks.2.lin": change}))
    cases["lycoris"] = case("lycoris", False, parts, wrap, {"ss_network_module": "lycoris.kohya"})

    (HERE / "cases.json").write_text(json.dumps(cases, indent=1) + "\n")


if __name__ == "__main__":
    main()
