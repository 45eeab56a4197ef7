"""What a trained adapter's file says of its training: kohya's `ss_*` keys where it has them, and
`lycoris_cupy.training`, JSON of all that is needed to go on or to do it again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .. import __version__
from ..adapters import Adapter
from ..optim import Optimizer

OWN = "lycoris_cupy.training"


def training_metadata(
    name: str,
    adapters: Mapping[str, Adapter],
    optimizer: Optimizer,
    state: Mapping[str, Any],
) -> dict[str, str]:
    """state: step, steps, best, base and configuration."""
    configuration = state["configuration"]
    ranked = [adapter for adapter in adapters.values() if adapter.has_rank]
    ranks = {str(adapter.rank) for adapter in ranked}
    alphas = {f"{adapter.rank if adapter.alpha is None else adapter.alpha:g}" for adapter in ranked}
    notes: dict[str, Any] = {
        "ss_output_name": name,
        "ss_network_dim": ranks.pop() if len(ranks) == 1 else None,
        "ss_network_alpha": alphas.pop() if len(alphas) == 1 else None,
        "ss_optimizer": f"lycoris_cupy.optim.{type(optimizer).__name__}",
        "ss_learning_rate": None if callable(optimizer.lr) else optimizer.lr,
        "ss_lr_scheduler": getattr(optimizer.lr, "__qualname__", "function").split(".")[0]
        if callable(optimizer.lr)
        else "constant",
        "ss_max_grad_norm": optimizer.clip,
        "ss_steps": state["step"],
        "ss_max_train_steps": state["steps"],
        "ss_gradient_accumulation_steps": configuration["accumulate"],
        "ss_scale_weight_norms": configuration["max_norm"],
        "ss_mixed_precision": {"bfloat16": "bf16"}.get(configuration["dtype"], "no"),
        "ss_seed": configuration.get("seed"),
    }
    told = {key: str(value) for key, value in notes.items() if value is not None}
    told[OWN] = json.dumps({"version": __version__, **state})
    return told
