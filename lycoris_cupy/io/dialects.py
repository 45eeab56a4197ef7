"""The dialects of adapter files: how each program writes the name of a layer and of a factor.

A dialect is one entry of DIALECTS: the prefixes and the part of a model each speaks of, whether the
path keeps its dots, its words for the factors where they are not LyCORIS's own, and how it tells
alpha. Everything else (reading, converting, the list in `--help`, the tests) iterates over them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

Parts = tuple[str, ...] | None  # None: a prefix that says nothing of the part

_NONE: Mapping[str, str] = MappingProxyType({})
_AB = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
_READ = {  # factors that are understood wherever they stand
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora_A.default.weight": "lora_down.weight",
    "lora_B.default.weight": "lora_up.weight",
    "lora_A": "lora_down.weight",
    "lora_B": "lora_up.weight",
    "lora.down.weight": "lora_down.weight",
    "lora.up.weight": "lora_up.weight",
    "lora_linear_layer.down.weight": "lora_down.weight",
    "lora_linear_layer.up.weight": "lora_up.weight",
    "lora_magnitude_vector": "dora_scale",
    "lora_B.bias": "lora_up.bias",
    "lora_B.default.bias": "lora_up.bias",
}


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

# Words that end a dotted key: those of LyCORIS, built or not, and each dialect's own.
WORDS = (
    *("lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", "dora_scale", "scalar"),
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    *("diff", "diff_b", "w_norm", "b_norm", "on_input", "oft_blocks", "rescale"),
    *("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight"),
    *("lambda_layer", "q_layer.weight", "p_layer.weight", "set_weight", "reshape_weight"),
    *("lora_embedding_A", "lora_embedding_B", "lora_B.bias", "lora_up.bias"),
    *("oft_R.weight", "boft_R", "boft_s", "ia3_l"),
)

# Spellings that hide the layer's name in the word; `to_out` is a list there, whose first is meant.
_REWRITTEN = (
    (re.compile(r"\.processor\.to_out_lora\.(down|up)\.weight$"), r".to_out.0.lora.\1.weight"),
    (re.compile(r"(?:\.processor)?\.(\w+)_lora\.(down|up)\.weight$"), r".\1.lora.\2.weight"),
    (re.compile(r"\.processor\.to_out\.(lora\w*\.)"), r".to_out.0.\1"),
    (re.compile(r"\.processor\.(to_\w+\.)"), r".\1"),
)

# Dialects that are known but not read, to say which one a file speaks.
_FOREIGN = {
    r"processor\.\w+_lora\d\.(down|up)\.weight$": "x-labs",
    r"^bundle_emb\.": "trainers that bundle embeddings",
}


class Key(NamedTuple):
    """A key of a file. module: prefix and path as they stand. suffix: LyCORIS's word."""

    dialect: Dialect
    prefix: str
    path: str
    suffix: str

    @property
    def module(self) -> str:
        return self.prefix + self.path

    @property
    def parts(self) -> Parts:
        return self.dialect.prefixes[self.prefix]


def parse_key(key: str) -> Key | None:
    """A key taken apart, or None if it is in no dialect that is read."""
    if any(re.search(pattern, key) for pattern in _FOREIGN):
        return None
    for prefix in _FOLDED:
        if key.startswith(prefix):
            module, dot, suffix = key.partition(".")
            path, suffix = module[len(prefix) :], _READ.get(suffix, suffix)
            return Key(_FOLDED[prefix], prefix, path, suffix) if dot else None
    for pattern, replacement in _REWRITTEN:
        key = pattern.sub(replacement, key)
    for word, dialects in _WORDS_BY_LENGTH:
        if key.endswith(word) and key[: -len(word)].endswith("."):
            return _dotted(key[: -len(word) - 1], word, dialects)
    return _of_prefix(key)


def _dotted(module: str, word: str, dialects: Mapping[str, str]) -> Key | None:
    """Of the dialects with such a prefix: the one with the longest, that has this word itself."""
    known = [
        (len(prefix), DIALECTS[name].word(canonical, "te1" if "text" in prefix else "unet") == word)
        + (name, prefix, canonical)
        for name, canonical in dialects.items()
        for prefix in DIALECTS[name].prefixes
        if module.startswith(prefix) and len(module) > len(prefix)
    ]
    if not known:
        return None
    longest = max(length for length, *_ in known)
    # max keeps the first of equals: the order of DIALECTS decides.
    _, _, name, prefix, canonical = max(
        (entry for entry in known if entry[0] == longest), key=lambda entry: entry[1]
    )
    return Key(DIALECTS[name], prefix, module[len(prefix) :], canonical)


def _of_prefix(key: str) -> Key | None:
    """A key that ends in no known word, under a prefix that only adapter files have."""
    for dialect in DIALECTS.values():
        for prefix in dialect.prefixes if dialect.dotted else ():
            if prefix and key.startswith(prefix) and dialect.name in ("peft", "bfl"):
                path, dot, word = key[len(prefix) :].rpartition(".")
                return Key(dialect, prefix, path, word) if dot else None
    return None


def unread(key: str) -> str:
    """Why a key that `parse_key` does not take is not read."""
    reads = f"the dialects that are read: {', '.join(DIALECTS)}"
    for pattern, who in _FOREIGN.items():
        if re.search(pattern, key):
            return f"is named as by {who}, which is not read; {reads}"
    return f"is in no dialect that is known; {reads}"


_FOLDED = {  # the longest first
    prefix: dialect
    for prefix, dialect in sorted(
        ((p, d) for d in reversed(DIALECTS.values()) if not d.dotted for p in d.prefixes),
        key=lambda pair: -len(pair[0]),
    )
}


FOLDED_PREFIXES = tuple(sorted(_FOLDED))
OWNED = ("oft_unet_",)  # what a module under one of these means, only its own dialect writes


def _words() -> list[tuple[str, dict[str, str]]]:
    """(word, {dialect: LyCORIS's word}) of all dotted dialects, the longest word first."""
    out: dict[str, dict[str, str]] = {}
    for dialect in DIALECTS.values():
        if dialect.dotted:
            spelled = {word: word for word in WORDS} | _READ
            for table in (dialect.factors, dialect.text_factors or _NONE):
                spelled |= {word: canonical for canonical, word in table.items()}
            for word, canonical in spelled.items():
                out.setdefault(word, {})[dialect.name] = canonical
    return sorted(out.items(), key=lambda item: -len(item[0]))


_WORDS_BY_LENGTH = _words()
