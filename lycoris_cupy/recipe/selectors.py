"""Selectors: which layers are meant, by name or by kind.

A selector is a pattern of fnmatch for a layer's name ('*.attn1.to_q'), or a group with a colon in
front. Groups of kind are told by the layer itself; groups of place by its name, as Stable
Diffusion's U-Nets (both namings), diffusion transformers and text encoders give them, dots or
underscores between the words:

    :linear :conv1x1 :conv :norm                         conv: any extent of the kernel is above 1
    :attention :mlp :transformer :resnet :sampler :ends :text-encoder
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from difflib import SequenceMatcher, get_close_matches
from fnmatch import fnmatchcase
from functools import lru_cache

from ..errors import LycorisError
from ..io.aliases import diffusers_name
from ..io.names import container_of, fold, part_of
from ..layers import LayerShape
from ..norms import NormShape

_KINDS: dict[str, Callable[[LayerShape], bool]] = {
    ":linear": lambda shape: not isinstance(shape, NormShape) and not shape.window.axes,
    ":conv1x1": lambda shape: shape.window.axes > 0 and shape.taps == 1,
    ":conv": lambda shape: shape.taps > 1,
    ":norm": lambda shape: isinstance(shape, NormShape),
}

# In a lower-case folded name with an underscore at both ends. Flux keeps q, k, v and the way into
# the mlp of a single block in linear1, both ways out in linear2 (diffusers: proj_out).
_FLUX = r"_single_blocks_\d+_linear[12]_|_single_transformer_blocks_\d+_proj_out_"
_ATTENTION = (
    r"_[a-z]*attn\d*_|_(?:self_?|cross_?|enc_?dec)?attention_|_(?:add_)?[qkv]_proj_"
    r"|_to_(?:q|k|v|qkv|out|add_out)_|_(?:to_)?qkv(?:_proj)?_|" + _FLUX
)
_MLP = r"_[a-z]*mlp_|_ffn?_|_feed_?forward_|_denserel[a-z]*dense_|_fc\d_|_(?:gate|up|down)_proj_|"
_BLOCKS = (
    r"_attentions_\d+_|_transformer_resblocks_\d+_"
    r"|(?<!_down)(?<!_up)(?<!_input)(?<!_output)(?<!_mid)(?<!_middle)_blocks_\d+_"
    r"|(?<!_in)(?<!_out)(?<!_emb)_layers_\d+_"
)
_PLACES = {
    ":attention": _ATTENTION,
    ":mlp": _MLP + _FLUX,
    ":transformer": "|".join((_ATTENTION, _MLP + _FLUX, _BLOCKS)),
    ":resnet": (
        r"_resnets?_\d+_|(?<!_transformer)_resblocks?_\d+_|_(?:in|out|emb)_layers_\d+_"
        r"|_skip_connection_|_conv_shortcut_"
    ),
    ":sampler": r"_(?:down|up)samplers?_|_(?:down|up)sample_",
    ":ends": r"_conv_in_|_conv_out_",
    ":text-encoder": (
        r"^_(?:lora_)?(?:text_encoder|te)_?\d?_|_text_model_|^_encoder_block_\d+_layer_"
    ),
}
GROUPS = (*_KINDS, *_PLACES)


def is_group(selector: str) -> bool:
    return selector.startswith(":")


def known(selector: str) -> str:
    """The selector itself. Raises LycorisError for a group that there is not."""
    if not selector or (is_group(selector) and selector not in GROUPS):
        near = get_close_matches(selector, GROUPS, 1)
        hint = f", nearest: {near[0]!r}" if near else ""
        raise LycorisError(
            f"{selector!r} is no group of layers{hint}; the groups are {', '.join(GROUPS)}; "
            "anything else is a pattern of names"
        )
    return selector


def matches(selector: str, name: str, shape: LayerShape) -> bool:
    """Whether a selector means a layer."""
    if selector in _KINDS:
        return _KINDS[selector](shape)
    if selector not in _PLACES:
        return fnmatchcase(name, selector)
    if selector == ":text-encoder" and (part_of(name) or "").startswith("te"):
        return True
    return any(re.search(_PLACES[selector], written) for written in _written(name))


@lru_cache(maxsize=2**14)  # every group looks at every layer of a network
def _written(name: str) -> tuple[str, ...]:
    """A layer's name as the patterns of places read it, and diffusers' name of it if it has one."""
    other = diffusers_name(fold(name[len(container_of(name)) :]))
    return (f"_{fold(name).lower()}_", *([f"_{other}_"] if other else []))


def meant(selector: str, shapes: Mapping[str, LayerShape]) -> list[str]:
    """The layers that a selector means, in their order."""
    return [name for name, shape in shapes.items() if matches(selector, name, shape)]


def nearest(pattern: str, names: Sequence[str], count: int = 3) -> list[str]:
    """The layers whose names have the words most like those of a pattern that matches none."""
    # One name of each form: thousands of names differ in numbers alone, and difflib is slow.
    forms: dict[str, tuple[str, set[str]]] = {}
    for name in names:
        form = re.sub(r"\d+", "#", name)
        forms.setdefault(form, (name, set(_words(form))))
    all_words = {word for _, words in forms.values() for word in words}
    likeness: list[dict[str, float]] = []
    for word in _words(re.sub(r"\d+", "#", re.sub(r"[*?\[\]!]+", ".", pattern))):
        close = get_close_matches(word, all_words, 8, 0.6)
        likeness.append({one: SequenceMatcher(None, word, one).ratio() for one in close})
    scores = {
        name: sum(max([one.get(word, 0.0) for word in words], default=0.0) for one in likeness)
        for name, words in forms.values()
    }
    found = sorted((name for name in scores if scores[name]), key=lambda name: -scores[name])
    return found[:count]


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[._]", name) if word]
