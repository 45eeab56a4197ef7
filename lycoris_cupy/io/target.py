"""What a module is called in another dialect, and what that dialect can say.

Dots that became underscores cannot be told from underscores: to go from such names to dotted ones
the base's own names are needed. A prefix that speaks of one part of a model needs to know the part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from ..adapters import Adapter, Biased, DoRA, LoCon
from ..errors import FileFormatError, MatchError
from .aliases import original_name
from .dialects import DIALECTS, Dialect
from .names import HOMES, container_of, fold, part_of, split_folded
from .source import Module

PARTS = tuple(HOMES)


@dataclass(frozen=True)
class Name:
    """A layer in no dialect. part: of a model, None if nothing tells. dotted: path has its dots.
    home: 'unet.' or 'transformer.' where the denoiser is called so. own: the one prefix under which
    the module means what it does.
    """

    part: str | None
    path: str
    dotted: bool
    home: str | None = None
    own: str | None = None

    @classmethod
    def of_module(cls, module: Module, part: str | None) -> Name:
        """From a file alone. part: for modules that do not tell theirs."""
        key = module.key
        own = key.parts[0] if key.parts else None
        if own is None and key.dialect.dotted:
            container = container_of(key.path)
            if part_of(key.path):
                path = key.path[len(container) :]
                return cls(part_of(key.path), path, True, _home(container))
        elif own is None:
            found, rest = split_folded(key.path)
            if found and rest:
                return cls(found, rest, False)
        return cls(own or part, key.path, key.dialect.dotted, _home(key.prefix))

    @classmethod
    def of_layer(cls, layer: str, module: Module, part: str | None) -> Name:
        """From the base's own name of the layer."""
        key = module.key
        own = part_of(layer) or (key.parts[0] if key.parts else None) or part
        container = container_of(layer) if part_of(layer) else ""
        return cls(own, layer[len(container) :], True, _home(container) or _home(key.prefix))


def dialect_named(name: str) -> Dialect:
    """Raises MatchError for a name that is none."""
    if name not in DIALECTS:
        raise MatchError(f"dialect {name!r} is unknown: use one of {', '.join(DIALECTS)}")
    return DIALECTS[name]


def module_names(dialect: Dialect, names: Mapping[str, Name]) -> dict[str, str]:
    """{key: module name in the dialect}.

    Raises MatchError where the dialect has no name for a layer, or one for two.
    """
    parts = {name.part for name in names.values()}
    unet = "unet." if _is_unet(names.values()) else "transformer."
    out, taken = {}, {}
    for key, name in names.items():
        prefix = _prefix(dialect, name, key, parts)
        if prefix == "unet.":
            prefix = name.home or unet
        if dialect.dotted and not name.dotted:
            raise MatchError(
                f"module {key!r} has underscores for dots, and {dialect.name} writes dots: give "
                "the model it is for (--base), whose names tell which are which"
            )
        if prefix == "lora_te1_" or prefix == "lora_te_":  # kohya numbers encoders from the second
            prefix = "lora_te1_" if parts & {"te2", "te3"} else "lora_te_"
        module = prefix + (name.path if dialect.dotted else fold(name.path))
        if module in taken:
            raise MatchError(
                f"{taken[module]!r} and {key!r} would both be {module!r} in {dialect.name}: "
                "convert them one part at a time (--only)"
            )
        taken[module] = key
        out[key] = module
    return out


def _prefix(dialect: Dialect, name: Name, key: str, parts: set[str | None]) -> str:
    if name.own is not None:
        if name.own not in dialect.prefixes:
            raise MatchError(
                f"module {key!r} means what it does under {name.own} only, which {dialect.name} "
                "does not write"
            )
        return name.own
    prefix = dialect.prefix(name.part)
    if prefix is None and name.part is None:
        raise MatchError(
            f"module {key!r} does not say which part of a model it is for, and {dialect.name} "
            f"does: give it (--part {', '.join(PARTS)})"
        )
    if prefix is None:
        raise MatchError(
            f"{dialect.name} has no name for {name.part}, of which {key!r} is: leave "
            "it out (--only)"
        )
    known = parts - {None}
    if dialect.prefixes[prefix] is None and len(known) > 1:
        if dialect.alpha == "configuration":
            raise MatchError(
                f"{dialect.name} keeps one part of a model a folder, and the file has "
                f"{', '.join(sorted(map(str, known)))}: convert one (--only)"
            )
        home = HOMES[name.part] if name.part not in (None, "unet") else ""
        return prefix + (home if dialect.dotted else home.replace(".", "_"))
    return prefix


def _home(prefix: str) -> str | None:
    return prefix if prefix in ("unet.", "transformer.") else None


def _is_unet(names: Iterable[Name]) -> bool:
    """Whether diffusers would call the denoiser `unet`: by its U-Nets' layer names."""
    return any(
        original_name(fold(name.path), set()) for name in names if name.part in (None, "unet")
    )


def require_expressible(dialect: Dialect, adapter: Adapter, module: str) -> None:
    """Raise FileFormatError for an adapter that the dialect's readers do not know."""
    known = dialect.algorithms
    if isinstance(adapter, Biased):
        adapter = adapter.on
    if isinstance(adapter, DoRA):
        if known is not None and not isinstance(adapter.on, LoCon):
            raise FileFormatError(
                f"module {module!r} is {adapter.title}, and {dialect.name} knows dora on locon "
                "only: --algorithm lora makes it plain LoRA with dora"
            )
        adapter = adapter.on
    if known is not None and adapter.algorithm not in known:
        raise FileFormatError(
            f"module {module!r} is {adapter.algorithm}, and {dialect.name} knows "
            f"{', '.join(known)} only: --algorithm lora makes it plain LoRA"
        )
    if isinstance(adapter, LoCon) and (
        (adapter.tucker and known is not None) or (adapter.per_tap and dialect.name != "lycoris")
    ):
        what = "a Tucker core" if adapter.tucker else "an up for each tap"
        raise FileFormatError(
            f"module {module!r} has {what}, which {dialect.name} does not know: --algorithm lora "
            "makes it plain LoRA"
        )


def spelled(dialect: Dialect, part: str | None, tensors: Mapping[str, np.ndarray]) -> dict:
    """LyCORIS's words and shapes as the dialect has them."""
    out = {}
    for suffix, tensor in tensors.items():
        word = dialect.word(suffix, part)
        out[word] = magnitude(tensor) if word == "lora_magnitude_vector" else tensor
    return out


def magnitude(scale: np.ndarray) -> np.ndarray:
    """LyCORIS's dora_scale (O, 1) or (O, 1, 1, 1) as PEFT's magnitude (O,) or (1, O, 1, 1).

    Raises FileFormatError for one along the inputs, which PEFT does not have.
    """
    if scale.ndim > 1 and any(n != 1 for n in scale.shape[1:]):
        raise FileFormatError(
            f"dora_scale has shape {tuple(scale.shape)}: a magnitude of each input, and PEFT knows "
            "those of outputs only"
        )
    outputs = scale.shape[:1]
    return scale.reshape(outputs if scale.ndim <= 2 else (1, *outputs, *scale.shape[2:]))


def most_common(values: Iterable) -> object:
    """The value that stands most often; the first of equals."""
    return Counter(values).most_common(1)[0][0]
