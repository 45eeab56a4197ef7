"""Names: a key of an adapter file to (module, suffix), and a module to the layer it means.

LyCORIS and kohya write `<prefix><path>.<suffix>`, with every dot of the path made an underscore:
that cannot be undone, so a module is compared with the folded names of the base, whole, never by a
prefix. What could mean two layers is refused. Other dialects are recognised only to say which one a
file speaks.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable
from difflib import get_close_matches

from ..errors import MatchError

# The part of a model that a prefix speaks of; None: any. LyCORIS counts text encoders by position,
# kohya by kind, so that T5 is te2 in some Flux files and te3 in others.
PREFIXES: dict[str, tuple[str, ...] | None] = {
    "lycoris_": None,
    "lora_unet_": ("unet",),
    "lora_te_": ("te1",),
    "lora_te1_": ("te1",),
    "lora_te2_": ("te2", "te3"),
    "lora_te3_": ("te3", "te2"),
}

# Where checkpoints keep these parts: adapter files leave this much of a tensor's name out. None:
# may be any part.
CONTAINERS: dict[str, str | None] = {
    "model.diffusion_model.": "unet",
    "diffusion_model.": "unet",
    "unet.": "unet",
    "transformer.": "unet",
    "model.": None,
    "cond_stage_model.transformer.": "te1",
    "cond_stage_model.model.": "te1",
    "conditioner.embedders.0.transformer.": "te1",
    "conditioner.embedders.1.model.": "te2",
    "text_encoder.": "te1",
    "text_encoder_2.": "te2",
    "text_encoder_3.": "te3",
    "text_encoders.clip_l.transformer.": "te1",
    "text_encoders.clip_g.transformer.": "te2",
    "text_encoders.t5xxl.transformer.": "te3",
}

_DIALECTS = {
    r"^base_model\.model\.": "PEFT",
    r"^(diffusion_model|transformer)\..*\.lora_[AB]\b": "BFL and ai-toolkit",
    r"\.lora_([AB]\b|embedding_[AB]\b|magnitude_vector)": "PEFT in a diffusers file",
    r"(\.|_)lora\.(down|up)\.weight$": "diffusers",
    r"\.lora_linear_layer\.": "diffusers (text encoder)",
    r"_lora\d?\.(down|up)\.weight$": "x-labs",
    r"^oft_unet_": "kohya's OFT",
    r"^lora_prior_(unet|te)_": "Stable Cascade trainers",
    r"^lora_transformer_": "old OneTrainer",
    r"^bundle_emb\.": "trainers that bundle embeddings",
}


def split_key(key: str) -> tuple[str, str] | None:
    """(module, suffix) at the first dot, if the module has a LyCORIS or kohya prefix; None
    otherwise.
    """
    module, dot, suffix = key.partition(".")
    return (module, suffix) if dot and split_prefix(module) else None


def split_prefix(module: str) -> tuple[str, str] | None:
    """(prefix, folded path) of a module name, or None."""
    for prefix in PREFIXES:
        if module.startswith(prefix):
            return prefix, module[len(prefix) :]
    return None


def foreign(key: str) -> str:
    """Why a key that `split_key` does not take is not read: which dialect it looks like."""
    reads = f"this version reads LyCORIS and kohya names, {', '.join(f'{p}...' for p in PREFIXES)}"
    for pattern, dialect in _DIALECTS.items():
        if re.search(pattern, key):
            return f"is named as by {dialect}; {reads}"
    return f"has an unknown prefix; {reads}"


def fold(name: str) -> str:
    """The name of a layer or of its weight as it stands in a module name: without `.weight`, dots
    made underscores.
    """
    return name.removesuffix(".weight").replace(".", "_")


def container_of(name: str) -> str:
    """The longest entry of CONTAINERS that the name starts with; empty if none."""
    return max((c for c in CONTAINERS if name.startswith(c)), key=len, default="")


class BaseNames:
    """The layers of an engine or a checkpoint, by folded name."""

    def __init__(self, names: Iterable[str]):
        self._whole: dict[str, list[str]] = {}
        self._inner: dict[str, list[str]] = {}
        for name in names:
            self._whole.setdefault(fold(name), []).append(name)
            if container := container_of(name):
                self._inner.setdefault(fold(name[len(container) :]), []).append(name)
        self._folded = self._inner | self._whole
        self._sorted = {
            False: sorted(self._folded),
            True: sorted(name[::-1] for name in self._folded),
        }
        self._lookups = 200  # of `nearest`: about 1 ms each, and nobody reads more

    def resolve(self, module: str) -> str | None:
        """The one layer a module means, or None. A name in full goes before one without its
        container.

        Raises MatchError, with the candidates, when there are several.
        """
        parts = split_prefix(module)
        if parts is None:
            return None
        prefix, path = parts
        for table in (self._whole, self._inner):
            found = [name for name in table.get(path, ()) if _speaks_of(prefix, name)]
            if len(found) > 1:
                raise MatchError(
                    f"module {module!r} could mean any of {', '.join(map(repr, found))}: rename "
                    "all but one"
                )
            if found:
                return found[0]
        return None

    def nearest(self, module: str) -> str | None:
        """The layer whose name is most like the module's, to show beside an unmatched one; None if
        none is.
        """
        self._lookups -= 1
        if self._lookups < 0:
            return None
        path = (split_prefix(module) or ("", fold(module)))[1]
        # difflib against thousands of names takes seconds: look at those that share its beginning
        # or its end.
        near = set()
        for turned, names in self._sorted.items():
            at = bisect_left(names, path[::-1] if turned else path)
            near |= {name[::-1] if turned else name for name in names[max(at - 8, 0) : at + 8]}
        close = get_close_matches(path, sorted(near), n=1, cutoff=0.5)
        return self._folded[close[0]][0] if close else None


def _speaks_of(prefix: str, name: str) -> bool:
    wanted, part = PREFIXES[prefix], CONTAINERS.get(container_of(name))
    return wanted is None or part is None or part in wanted
