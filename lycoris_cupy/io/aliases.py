"""Layers that two programs name differently, where both names are published: a base in one naming
answers to the other.

A module of a file means one or several `Share`s: a whole layer, rows of a layer that another
program keeps fused (q, k and v in one weight), or layers that each take some rows of the module.
Names are compared folded (dots made underscores); `#` stands for a block's number. Sources: the
loaders of diffusers and ComfyUI, kohya's conversion tables.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from ..layers import LayerShape

Rows = tuple[tuple[int, int], ...]  # ranges of a layer's outputs, in the order of the adapter's


class Share(NamedTuple):
    """What a module of a file means for one layer.

    rows: those of the layer that it changes, None for all. of: the range of the module's own
    outputs that the layer takes, None for all.
    """

    layer: str
    rows: Rows | None = None
    of: tuple[int, int] | None = None


_ALL = None
_Q, _K, _V, _REST = ((0, 1),), ((1, 2),), ((2, 3),), ((3, None),)
_SWAPPED = ((1, 2), (0, 1))  # scale and shift stand the other way round

# fused or renamed -> (split name, its rows in units of the layer's inputs).
_FUSED: dict[str, tuple[tuple[str, tuple | None], ...]] = {
    # Flux: Black Forest Labs -> diffusers
    "double_blocks_#_img_attn_qkv": (
        ("transformer_blocks_#_attn_to_q", _Q),
        ("transformer_blocks_#_attn_to_k", _K),
        ("transformer_blocks_#_attn_to_v", _V),
    ),
    "double_blocks_#_txt_attn_qkv": (
        ("transformer_blocks_#_attn_add_q_proj", _Q),
        ("transformer_blocks_#_attn_add_k_proj", _K),
        ("transformer_blocks_#_attn_add_v_proj", _V),
    ),
    "single_blocks_#_linear1": (
        ("single_transformer_blocks_#_attn_to_q", _Q),
        ("single_transformer_blocks_#_attn_to_k", _K),
        ("single_transformer_blocks_#_attn_to_v", _V),
        ("single_transformer_blocks_#_proj_mlp", _REST),
    ),
    "double_blocks_#_img_attn_proj": (("transformer_blocks_#_attn_to_out_0", _ALL),),
    "double_blocks_#_txt_attn_proj": (("transformer_blocks_#_attn_to_add_out", _ALL),),
    "double_blocks_#_img_mlp_0": (("transformer_blocks_#_ff_net_0_proj", _ALL),),
    "double_blocks_#_img_mlp_2": (("transformer_blocks_#_ff_net_2", _ALL),),
    "double_blocks_#_txt_mlp_0": (("transformer_blocks_#_ff_context_net_0_proj", _ALL),),
    "double_blocks_#_txt_mlp_2": (("transformer_blocks_#_ff_context_net_2", _ALL),),
    "double_blocks_#_img_mod_lin": (("transformer_blocks_#_norm1_linear", _ALL),),
    "double_blocks_#_txt_mod_lin": (("transformer_blocks_#_norm1_context_linear", _ALL),),
    "single_blocks_#_linear2": (("single_transformer_blocks_#_proj_out", _ALL),),
    "single_blocks_#_modulation_lin": (("single_transformer_blocks_#_norm_linear", _ALL),),
    "img_in": (("x_embedder", _ALL),),
    "txt_in": (("context_embedder", _ALL),),
    "time_in_in_layer": (("time_text_embed_timestep_embedder_linear_1", _ALL),),
    "time_in_out_layer": (("time_text_embed_timestep_embedder_linear_2", _ALL),),
    "vector_in_in_layer": (("time_text_embed_text_embedder_linear_1", _ALL),),
    "vector_in_out_layer": (("time_text_embed_text_embedder_linear_2", _ALL),),
    "guidance_in_in_layer": (("time_text_embed_guidance_embedder_linear_1", _ALL),),
    "guidance_in_out_layer": (("time_text_embed_guidance_embedder_linear_2", _ALL),),
    "final_layer_linear": (("proj_out", _ALL),),
    "final_layer_adaLN_modulation_1": (("norm_out_linear", _SWAPPED),),
    # CLIP-G: OpenCLIP -> transformers
    "transformer_resblocks_#_attn_in_proj_weight": (
        ("text_model_encoder_layers_#_self_attn_q_proj", _Q),
        ("text_model_encoder_layers_#_self_attn_k_proj", _K),
        ("text_model_encoder_layers_#_self_attn_v_proj", _V),
    ),
    "transformer_resblocks_#_attn_out_proj": (
        ("text_model_encoder_layers_#_self_attn_out_proj", _ALL),
    ),
    "transformer_resblocks_#_mlp_c_fc": (("text_model_encoder_layers_#_mlp_fc1", _ALL),),
    "transformer_resblocks_#_mlp_c_proj": (("text_model_encoder_layers_#_mlp_fc2", _ALL),),
}

# Stable Diffusion 1, 2 and XL: diffusers -> the original's names.
_PLAIN = {
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "time_embedding_linear_1": "time_embed_0",
    "time_embedding_linear_2": "time_embed_2",
    "add_embedding_linear_1": "label_emb_0_0",
    "add_embedding_linear_2": "label_emb_0_2",
}
_RESNET = {
    "norm1": "in_layers_0",
    "conv1": "in_layers_2",
    "time_emb_proj": "emb_layers_1",
    "norm2": "out_layers_0",
    "conv2": "out_layers_3",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(
    r"(down|up)_blocks_(\d+)_(resnets|attentions|downsamplers|upsamplers)_(\d+)_(.+)"
)
_MIDDLE = re.compile(r"mid_block_(resnets|attentions)_(\d+)_(.+)")


def aliases(layers: Mapping[str, str], shapes: Mapping[str, LayerShape]) -> dict[str, list[Share]]:
    """{another program's folded name: what it means} for the layers of a base.

    layers: folded name, without the part of the model that holds it -> the layer's name.
    """
    out = dict(_of_unet(layers))
    for fused, splits in _FUSED.items():
        pattern = re.compile(re.escape(fused).replace(r"\#", r"(\d+)"))
        for folded in [name for name in layers if pattern.fullmatch(name)]:
            out |= _of_fused(layers[folded], splits, _number(pattern, folded), shapes)
        pattern = re.compile(re.escape(splits[0][0]).replace(r"\#", r"(\d+)"))
        for folded in [name for name in layers if pattern.fullmatch(name)]:
            number = _number(pattern, folded)
            names = [name.replace("#", number) for name, _ in splits]
            if all(name in layers for name in names):
                shares = _of_splits([layers[name] for name in names], splits, shapes)
                if shares:
                    out[fused.replace("#", number)] = shares
    return {name: shares for name, shares in out.items() if name not in layers}


def _of_fused(layer: str, splits, number: str, shapes) -> Iterator[tuple[str, list[Share]]]:
    """A base that keeps a layer fused answers to the names of its parts."""
    for name, units in splits:
        rows = None
        if units is not None:
            shape = shapes.get(layer)
            if shape is None:
                continue
            rows = _ranges(units, shape)
            if rows is None:
                continue
        yield name.replace("#", number), [Share(layer, rows)]


def _of_splits(names: list[str], splits, shapes: Mapping[str, LayerShape]) -> list[Share]:
    """A base that keeps the parts answers to the fused name: each takes its rows of the adapter."""
    if len(splits) == 1:
        units, shape = splits[0][1], shapes.get(names[0])
        if units is None:
            return [Share(names[0])]
        rows = _ranges(units, shape) if shape else None
        return [Share(names[0], rows)] if rows else []  # a swap is its own inverse
    if not all(name in shapes for name in names):
        return []
    out, begin = [], 0
    for name in names:
        end = begin + shapes[name].outputs
        out.append(Share(name, None, (begin, end)))
        begin = end
    return out


def _ranges(units, shape: LayerShape) -> Rows | None:
    """Units of the layer's inputs as ranges of its outputs; None if it has fewer outputs."""
    step = shape.inputs
    out = tuple((a * step, shape.outputs if b is None else b * step) for a, b in units)
    fits = shape.window.groups == 1 and all(a < b <= shape.outputs for a, b in out)
    return out if fits else None


def _of_unet(layers: Mapping[str, str]) -> Iterator[tuple[str, list[Share]]]:
    """The U-Nets of Stable Diffusion, in both directions."""
    with_attention = {
        match[1] for name in layers if (match := re.match(r"up_blocks_(\d+)_attentions_", name))
    }
    for name, layer in layers.items():
        other = original_name(name, with_attention) or diffusers_name(name)
        if other:
            yield other, [Share(layer)]


def original_name(name: str, with_attention: set[str]) -> str | None:
    """The original's name of a layer that diffusers names so; None if it is none of its U-Nets'.

    with_attention: the numbers of the up blocks that have attention, which moves their upsampler.
    """
    if name in _PLAIN:
        return _PLAIN[name]
    if match := _MIDDLE.fullmatch(name):
        kind, number, rest = match.groups()
        at, rest = (
            ("1", rest) if kind == "attentions" else (str(2 * int(number)), _RESNET.get(rest))
        )
        known = number == "0" or (number == "1" and kind == "resnets")
        return f"middle_block_{at}_{rest}" if rest and known else None
    if not (match := _BLOCK.fullmatch(name)):
        return None
    side, block, kind, number, rest = match.groups()
    i, j = int(block), int(number)
    if kind == "downsamplers":
        return f"input_blocks_{3 * i + 3}_0_op" if rest == "conv" else None
    if kind == "upsamplers":
        at = 2 if block in with_attention else 1
        return f"output_blocks_{3 * i + 2}_{at}_conv" if rest == "conv" else None
    rest = rest if kind == "attentions" else _RESNET.get(rest)
    at = f"input_blocks_{3 * i + j + 1}" if side == "down" else f"output_blocks_{3 * i + j}"
    return f"{at}_{int(kind == 'attentions')}_{rest}" if rest else None


_ORIGINAL = {original: name for name, original in _PLAIN.items()}
_RESNET_BACK = {original: name for name, original in _RESNET.items()}


def diffusers_name(name: str) -> str | None:
    """diffusers' name of a layer of the original's U-Nets; None if it is none of those."""
    if name in _ORIGINAL:
        return _ORIGINAL[name]
    match = re.fullmatch(r"(input|output|middle)_blocks?_(\d+)_?(\d*?)_(\D.*)", name)
    if not match:
        return None
    side, block, at, rest = match.groups()
    inner = _RESNET_BACK.get(rest)
    if side == "middle":
        if at or block not in "012":
            return None
        if block == "1":
            return f"mid_block_attentions_0_{rest}"
        return f"mid_block_resnets_{int(block) // 2}_{inner}" if inner else None
    n = int(block) - (side == "input")
    if n < 0 or at not in ("0", "1", "2"):
        return None
    i, j = divmod(n, 3)
    up = "down" if side == "input" else "up"
    if (side, at, rest) == ("input", "0", "op"):
        return f"down_blocks_{i}_downsamplers_0_conv" if j == 2 else None
    if side == "output" and at in "12" and rest == "conv":
        return f"up_blocks_{i}_upsamplers_0_conv" if j == 2 else None
    if at == "0":
        return f"{up}_blocks_{i}_resnets_{j}_{inner}" if inner else None
    return f"{up}_blocks_{i}_attentions_{j}_{rest}" if at == "1" else None


def _number(pattern: re.Pattern, name: str) -> str:
    match = pattern.fullmatch(name)
    return match[1] if match and match.groups() else ""
