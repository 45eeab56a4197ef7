"""PEFT's adapter_config.json as a whole: options by which an adapter means another change than its
factors and alpha tell are refused.
"""

from __future__ import annotations

from ..errors import FileFormatError
from .alpha import Configuration

# Starts that take the adapter out of the base's own weight: the file belongs to what is left of it.
_REBASED = ("pissa", "olora", "corda", "loftq", "lora_ga")
_VARIANTS = {
    "use_qalora": "its inputs are pooled",
    "use_bdlora": "its factors are block-diagonal",
    "alora_invocation_tokens": "it acts on some tokens only",
    "arrow_config": "it is routed by its inputs",
    "kasa_config": "the base is truncated",
    "monteclora_config": "its factors are sampled",
    "layer_replication": "layers of the base are repeated",
    "target_parameters": "it changes parameters that are no layer's weight",
    "coft": "its rotations are held near the identity while it runs",
    "fan_in_fan_out": "the base keeps its weights as (in, out)",
}


def check_options(configuration: Configuration) -> None:
    """Raise FileFormatError for an option that changes what the factors mean."""
    values, name = configuration.values, configuration.name
    start = values.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_REBASED):
        raise FileFormatError(
            f"{name}: init_lora_weights is {start!r}, which changes the base's weights: save the "
            "adapter again with PEFT's path_initial_model_for_weight_conversion"
        )
    for option, why in _VARIANTS.items():
        if values.get(option):
            raise FileFormatError(f"{name}: {option} is set: {why}, which is not supported")
