"""The adapter_config.json that makes PEFT build adapters of these shapes and scales.

PEFT has one rank and alpha for all modules, and patterns for those that differ. LoHa and LoKr are
built by options that hold for all modules: where no options give all the shapes of a file, it is
refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..adapters import Adapter, DoRA, LoKr
from ..errors import FileFormatError
from .target import most_common

_TYPES = {"locon": "LORA", "loha": "LOHA", "lokr": "LOKR"}


def peft_config(adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    """adapters: path of a module -> adapter. Raises FileFormatError for what PEFT cannot build."""
    kinds = {adapter.algorithm for adapter in adapters.values()}
    if len(kinds) != 1:
        raise FileFormatError(
            f"PEFT keeps one algorithm a folder, and the file has {', '.join(sorted(kinds))}: "
            "--algorithm lora makes all plain LoRA"
        )
    (kind,) = kinds
    ranks = {path: _rank(adapter) for path, adapter in adapters.items()}
    alphas = {path: adapter.reported_scale * ranks[path] for path, adapter in adapters.items()}
    rank, alpha = most_common(ranks.values()), most_common(alphas.values())
    out = {
        "peft_type": _TYPES[kind],
        "r": rank,
        "lora_alpha" if kind == "locon" else "alpha": _plain(alpha),
        "rank_pattern": _patterns(ranks, rank),
        "alpha_pattern": _patterns(alphas, alpha),
        "target_modules": sorted(adapters),
        "task_type": None,
        "inference_mode": True,
        "base_model_name_or_path": None,
    }
    if kind == "locon":
        return out | {"bias": "none", "fan_in_fan_out": False, "use_rslora": False,
                      "use_dora": _decomposed(adapters), "lora_dropout": 0.0}  # fmt: skip
    tucker = {a.tucker for a in adapters.values() if a.shape.taps > 1}  # type: ignore
    if len(tucker) > 1:
        raise FileFormatError(
            "PEFT has cores for all convolutions or for none, and some of the file's have one: "
            "--algorithm lora makes all plain LoRA"
        )
    out |= {"use_effective_conv2d": tucker == {True}, "rank_dropout": 0.0, "module_dropout": 0.0}
    return out | _kronecker(adapters, ranks) if kind == "lokr" else out


def _decomposed(adapters: Mapping[str, Adapter]) -> bool:
    kinds = {isinstance(adapter, DoRA) for adapter in adapters.values()}
    if len(kinds) > 1:
        raise FileFormatError(
            "PEFT has DoRA on all modules of a folder or on none, and some of the file's have it"
        )
    return kinds == {True}


def _rank(adapter: Adapter) -> int:
    # A LoKr with both sides full is what PEFT makes of a rank that is large enough.
    return (
        max(adapter.split) if isinstance(adapter, LoKr) and not adapter.has_rank else adapter.rank
    )


def _kronecker(adapters: Mapping[str, Adapter], ranks: Mapping[str, int]) -> dict[str, Any]:
    """The options that give every split of the file."""
    factors = {-1} | {n for a in adapters.values() if isinstance(a, LoKr) for n in a.split}
    for factor in sorted(factors):
        for both in (False, True):
            if all(_same(a, ranks[path], factor, both) for path, a in adapters.items()):
                return {"decompose_factor": factor, "decompose_both": both}
    raise FileFormatError(
        "PEFT has one decompose_factor for all modules, and none gives the shapes of this file: "
        "--algorithm lora makes all plain LoRA"
    )


def _same(adapter: Adapter, rank: int, factor: int, both: bool) -> bool:
    assert isinstance(adapter, LoKr)
    made = LoKr.create(
        adapter.shape, rank, factor=factor, decompose_both=both, tucker=adapter.tucker
    )
    forms = [{n: f.in_file(adapter.shape) for n, f in a.factors().items()} for a in (made, adapter)]
    return forms[0] == forms[1]


def _patterns(values: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    """{pattern: value} of the modules that are not as usual. PEFT takes the first pattern that is
    the end of a module's name, so that longer names go first, and usual ones that end like an
    unusual one are named too.
    """
    odd = {path for path, value in values.items() if value != usual}
    alike = {path for path in values if any(path.endswith(f".{one}") for one in odd)}
    named = sorted(odd | alike, key=lambda path: -len(path))
    return {re.escape(path): _plain(values[path]) for path in named}


def _plain(value: Any) -> Any:
    return int(value) if float(value).is_integer() else float(value)
