"""PEFT's folder, adapter_model.safetensors and adapter_config.json: whole, or not there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..adapters import Adapter
from .alpha import CONFIGURATION
from .atomic import new_folder
from .peft_config import peft_config
from .safetensors import write
from .source import PEFT_FILE


def write_folder(
    folder: Path,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    adapters: Mapping[str, Adapter],
) -> None:
    """A new folder, made beside and renamed. adapters: path of the module -> adapter, for the
    configuration. Raises FileFormatError for what PEFT cannot build, OSError where it cannot write.
    """
    text = json.dumps(peft_config(adapters), indent=2)
    with new_folder(folder) as beside:
        write(beside / PEFT_FILE, tensors, metadata)
        (beside / CONFIGURATION).write_text(text, "utf-8")
