"""The names of LyCORIS and kohya for what a recipe says, made this project's own.

A recipe may be written in either, or in both as long as nothing is said twice with two values. What
LyCORIS reads differently from what it says is refused, with what to write instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..adapters import Option
from ..errors import LycorisError

NAMES = {
    "algo": "algorithm",
    "linear_dim": "rank",
    "network_dim": "rank",
    "lora_dim": "rank",
    "dim": "rank",
    "linear_alpha": "alpha",
    "network_alpha": "alpha",
    "conv_dim": "conv_rank",
    "use_tucker": "tucker",
    "use_cp": "tucker",
    "use_conv_cp": "tucker",
    "constrain": "constraint",
    "train_on_input": "on_input",
    "target_name": "targets",
    "unet_target_name": "targets",
    "text_encoder_target_name": "targets",
    "target_module": "targets",
    "unet_target_module": "targets",
    "text_encoder_target_module": "targets",
    "exclude_name": "exclude",
    "name_algo_map": "override",
    "module_algo_map": "override",
    "dora_wd": "dora",
    "weight_decompose": "dora",
}
ALGORITHM_NAMES = {"lora": "locon"}  # one class there
# A rank in these words brings LyCORIS's default for alpha; in the project's own, alpha is the rank.
_BRING_ALPHA = ("linear_dim", "network_dim", "lora_dim", "dim")
DEFAULT_ALPHA = 1.0

# Classes of modules, as far as names and kinds of layers tell them.
CLASSES = {
    "Linear": (":linear",),
    **dict.fromkeys(("Conv1d", "Conv2d", "Conv3d"), (":conv1x1", ":conv")),
    **dict.fromkeys(("LayerNorm", "GroupNorm"), (":norm",)),
    **dict.fromkeys(
        ("Attention", "CrossAttention", "SelfAttention", "CLIPAttention", "CLIPSdpaAttention"),
        (":attention",),
    ),
    **dict.fromkeys(("FeedForward", "CLIPMLP", "MLP"), (":mlp",)),
    **dict.fromkeys(("Transformer2DModel", "BasicTransformerBlock"), (":transformer",)),
    "ResnetBlock2D": (":resnet",),
    **dict.fromkeys(("Downsample2D", "Upsample2D"), (":sampler",)),
}


class _Fixed(NamedTuple):
    """The one value that says what is done here anyway. why: what to know about any other."""

    option: Option
    value: Any
    why: str


_FLAG, _TEXT = "bool", "str"
FIXED = {
    name: _Fixed(Option(name, kind, value), value, why)
    for name, kind, value, why in (
        ("use_scalar", _FLAG, False, "the change starts at 0 by a factor of zeros"),
        ("train_llm_adapter", _FLAG, False, "its layers are chosen by name, in targets"),
        ("train_t5xxl", _FLAG, False, "LyCORIS reads it nowhere; choose layers in targets"),
        ("sig_type", _TEXT, "principal", "a file of any other is read wrong by LyCORIS"),
        ("use_data_init", _FLAG, True, "a file of any other is read wrong by LyCORIS"),
        ("network_module", _TEXT, "lycoris.kohya", "no other is known"),
    )
}
ELSEWHERE = {
    **dict.fromkeys(
        ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio"),
        "a ratio of LoRA+ belongs to the optimizer: optim.rate_factors(parameters, plus=ratio)",
    ),
    "multiplier": "it is the strength of Engine.add",
    "mask_group_id": "the noise level goes to forward, an argument of its own",
    "disable_conv_cp": (
        "LyCORIS turns Tucker cores on for true and for false alike: write tucker = true or "
        "tucker = false"
    ),
}
# Known here, and not this project's words for anything.
BESIDE = ("wd_on_output", "bypass_mode", "enable_conv", "use_fnmatch")
_ARGUMENTS = "network_args"  # kohya's list of 'name=value'
WORDS = (*NAMES, *FIXED, *ELSEWHERE, *BESIDE, _ARGUMENTS)
_PATTERNS = ("target_name", "unet_target_name", "text_encoder_target_name", "exclude_name")
_CONV_ZERO = (
    "LyCORIS then takes that of the linear layers: leave {0} out for that, or exclude = "
    '[":conv"] to leave convolutions out'
)


def translated(table: Mapping[str, Any], default_alpha: bool = True) -> dict[str, Any]:
    """A table in this project's words alone. None says nothing in LyCORIS's words.

    default_alpha: whether a rank in LyCORIS's words brings its alpha. Raises LycorisError for what
    is refused, and for one thing said twice.
    """
    said: dict[str, tuple[str, Any]] = {}
    table = _with_arguments(table)
    for key, value in table.items():
        if (value is None and key in WORDS) or _settled(key, value, table):
            continue
        name = NAMES.get(key, key)
        value = _value(key, name, value, table)
        earlier, before = said.get(name, (key, value))
        if name in ("targets", "override") and earlier != key and {key, earlier} <= NAMES.keys():
            # Of U-Net and text encoder, of names and of classes: the union.
            value = before | value if isinstance(before, dict) else [*before, *value]
        elif before is not value and before != value:
            raise LycorisError(
                f"{earlier} = {before!r} and {key} = {value!r} say the same thing in two ways: "
                "keep one"
            )
        said[name] = key, value
    out = {name: value for name, (_, value) in said.items()}
    brings = "rank" not in table and any(table.get(word) is not None for word in _BRING_ALPHA)
    if default_alpha and brings and "alpha" not in out:
        out["alpha"] = DEFAULT_ALPHA
    if not truth("enable_conv", table.get("enable_conv", True)):
        out["exclude"] = [*_listed("exclude", out.get("exclude", ())), ":conv"]
    return out


def _with_arguments(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table with what `network_args` says in its own place."""
    out = {key: value for key, value in table.items() if key != _ARGUMENTS}
    for one in _listed(_ARGUMENTS, table.get(_ARGUMENTS) or ()):
        key, equals, value = str(one).partition("=")
        if not equals:
            raise LycorisError(f"{_ARGUMENTS} holds {one!r}, expected name=value")
        if key in out:
            raise LycorisError(f"{key} is said twice, the second time in {_ARGUMENTS}: keep one")
        out[key] = value
    return out


def _settled(key: str, value: Any, table: Mapping[str, Any]) -> bool:
    """Whether a key has no word here because it says what is done anyway, or is read beside
    another. Raises LycorisError for one that says what is not done here.
    """
    if key in ELSEWHERE:
        raise LycorisError(f"{key} is no part of a recipe: {ELSEWHERE[key]}")
    if key in FIXED:
        option, fixed, why = FIXED[key]
        if option.parsed(value) != fixed:
            raise LycorisError(f"{key} is {value!r}, but here it is always {fixed!r}: {why}")
        return True
    if key not in BESIDE:
        return False
    on = truth(key, value)
    flags = [word for word in ("dora_wd", "weight_decompose") if word in table]
    if key == "wd_on_output" and not flags:
        raise LycorisError(
            "wd_on_output says nothing without dora_wd; the project's own word for both is "
            'dora = "output" or "input"'
        )
    # Every route here gives what the changed weight gives; LyCORIS's bypass drops DoRA.
    decomposed = table.get("dora") is not None or any(truth(word, table[word]) for word in flags)
    if key == "bypass_mode" and on and decomposed:
        raise LycorisError("bypass_mode beside DoRA: LyCORIS leaves DoRA out there; drop one")
    return True


def _value(key: str, name: str, value: Any, table: Mapping[str, Any]) -> Any:
    """The value of a key, in the words of the name that it stands for."""
    if key in ("dora_wd", "weight_decompose"):
        if not truth(key, value):
            return None
        return "output" if truth("wd_on_output", table.get("wd_on_output", True)) else "input"
    if key in ("conv_dim", "conv_alpha") and str(value).strip() in ("0", "0.0"):
        raise LycorisError(f"{key} is {value}: {_CONV_ZERO.format(key)}")
    if key in (*_PATTERNS, "name_algo_map") and value:
        if not truth("use_fnmatch", table.get("use_fnmatch", False)):
            raise LycorisError(
                f"{key} holds regular expressions unless use_fnmatch = true stands beside it; "
                "patterns here are fnmatch's: write them so, and say use_fnmatch = true"
            )
    if key.endswith("target_module"):
        return [selector for one in _listed(key, value) for selector in _of_class(key, one)]
    if key == "module_algo_map":
        if not isinstance(value, Mapping):
            raise LycorisError(f"{key} is {value!r}, expected a table of classes")
        return {s: what for one, what in value.items() for s in _of_class(key, one)}
    if key in _PATTERNS:
        return _listed(key, value)
    if name == "algorithm" and isinstance(value, str):
        return ALGORITHM_NAMES.get(value, value)
    return value


def _of_class(key: str, name: str) -> tuple[str, ...]:
    if name not in tuple(CLASSES):
        raise LycorisError(
            f"{key} names the class {name!r}: an engine's layers have names and kinds, no classes. "
            f"Known by those are {', '.join(CLASSES)}; write targets for others"
        )
    return CLASSES[name]


def _listed(key: str, value: Any) -> list[str]:
    if not isinstance(value, (str, list, tuple)):
        raise LycorisError(f"{key} is {value!r}, expected a name or a list of them")
    return [value] if isinstance(value, str) else list(value)


def truth(name: str, value: Any) -> bool:
    """True, false, or a text that says so. LyCORIS takes 0, "no" and "" for true: refused."""
    return Option(name, "bool", False).parsed(value)
