"""Keys of adapter files taken apart: the dialect, the layer's path, LyCORIS's word for the factor.

A folded name ends at its first dot; a dotted one ends where a known word begins. What is in no
dialect is said to be, with the program that it looks like.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from .dialects import DIALECTS, Dialect, Parts

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
            for table in (dialect.factors, dialect.text_factors or {}):
                spelled |= {word: canonical for canonical, word in table.items()}
            for word, canonical in spelled.items():
                out.setdefault(word, {})[dialect.name] = canonical
    return sorted(out.items(), key=lambda item: -len(item[0]))


_WORDS_BY_LENGTH = _words()
