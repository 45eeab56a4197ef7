"""The dialects of adapter files: how each program writes the name of a layer and of a factor.

A dialect is one entry of DIALECTS: the prefixes and the part of a model each speaks of, whether the
path keeps its dots, its words for the factors where they are not LyCORIS's own, and how it tells
alpha. Everything else (reading, converting, the list in `--help`, the tests) iterates over them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Parts = tuple[str, ...] | None  # None: a prefix that says nothing of the part

_AB = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}


@dataclass(frozen=True)
class Dialect:
    """One program's names.

    prefixes: prefix -> the parts it may speak of; the first of a part is the one written. dotted:
    False where dots become underscores. factors: LyCORIS's word -> this dialect's, where it has
    another. text_factors: the same for text encoders, if they differ. alpha: 'tensor'
    beside the factors, 'configuration' in adapter_config.json, or 'folded' into a factor, as
    readers take a scale of 1. algorithms: those that its readers know; None for any.
    """

    name: str
    about: str
    prefixes: Mapping[str, Parts]
    dotted: bool = False
    factors: Mapping[str, str] = field(default_factory=dict)
    text_factors: Mapping[str, str] | None = None
    alpha: str = "tensor"
    algorithms: tuple[str, ...] | None = None

    def word(self, suffix: str, part: str | None) -> str:
        """This dialect's spelling of LyCORIS's word for a factor."""
        text = part is not None and part.startswith("te") and self.text_factors is not None
        return (self.text_factors if text else self.factors).get(suffix, suffix)  # type: ignore

    def prefix(self, part: str | None) -> str | None:
        """The prefix it writes for a part of a model; None if it has none for it."""
        for prefix, parts in self.prefixes.items():
            if parts is None or (part is not None and part == parts[0]):
                return prefix
        return None


# LyCORIS counts text encoders by position, kohya by kind, so that T5 is te2 in some Flux files and
# te3 in others.
_ENCODERS: dict[str, Parts] = {
    "lora_te_": ("te1",),
    "lora_te1_": ("te1",),
    "lora_te2_": ("te2", "te3"),
    "lora_te3_": ("te3", "te2"),
}
_PIPELINE: dict[str, Parts] = {
    "unet.": ("unet",),
    "transformer.": ("unet",),
    "text_encoder.": ("te1",),
    "text_encoder_2.": ("te2",),
    "text_encoder_3.": ("te3",),
}

DIALECTS: dict[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        Dialect("lycoris", "LyCORIS's own wrapper", {"lycoris_": None}),
        Dialect(
            "kohya",
            "kohya's sd-scripts, and LyCORIS inside it",
            # Two underscores: seen in files for Wan function models. oft_unet_: its own OFT.
            {
                "lora_unet_": ("unet",),
                **_ENCODERS,
                "lora_unet__": ("unet",),
                "oft_unet_": ("unet",),
            },
        ),
        Dialect(
            "onetrainer",
            "OneTrainer's transformers; its other models are named as kohya's",
            {"lora_transformer_": ("unet",), **_ENCODERS},
        ),
        Dialect(
            "cascade",
            "trainers of Stable Cascade",
            {"lora_prior_unet_": ("unet",), "lora_prior_te_": ("te1",)},
        ),
        Dialect(
            "peft",
            "PEFT: a folder with adapter_model.safetensors and adapter_config.json",
            {"base_model.model.": None},
            dotted=True,
            factors={**_AB, "dora_scale": "lora_magnitude_vector"},
            alpha="configuration",
            algorithms=("locon", "loha", "lokr"),
        ),
        Dialect(
            "diffusers",
            "diffusers since it uses PEFT",
            _PIPELINE,
            dotted=True,
            factors={**_AB, "dora_scale": "lora_magnitude_vector"},
            alpha="folded",
            algorithms=("locon",),
        ),
        Dialect(
            "diffusers-old",
            "diffusers before that, attention processors too",
            _PIPELINE,
            dotted=True,
            factors={
                "lora_down.weight": "lora.down.weight",
                "lora_up.weight": "lora.up.weight",
            },
            text_factors={
                "lora_down.weight": "lora_linear_layer.down.weight",
                "lora_up.weight": "lora_linear_layer.up.weight",
            },
            alpha="folded",
            algorithms=("locon",),
        ),
        Dialect(
            "bfl",
            "ai-toolkit, and files in the names of Black Forest Labs",
            {"diffusion_model.": ("unet",)},
            dotted=True,
            factors=_AB,
            alpha="folded",
            algorithms=("locon",),
        ),
        Dialect(
            "comfyui",
            "ComfyUI's own trainer and its LoRA save node",
            {
                "diffusion_model.": ("unet",),
                "text_encoders.clip_l.transformer.": ("te1",),
                "text_encoders.clip_g.transformer.": ("te2",),
                "text_encoders.t5xxl.transformer.": ("te3",),
            },
            dotted=True,
        ),
        Dialect(
            "bare",
            "dotted paths without a prefix, as Mochi's trainer writes them",
            {"": None},
            dotted=True,
            factors={"lora_down.weight": "lora_A", "lora_up.weight": "lora_B"},
            alpha="folded",
            algorithms=("locon",),
        ),
    )
}
