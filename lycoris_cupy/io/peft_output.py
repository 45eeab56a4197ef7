"""PEFT's folder, adapter_model.safetensors and adapter_config.json: whole, or not there."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..adapters import Adapter
from .alpha import CONFIGURATION
from .peft_config import peft_config
from .safetensors import replacing, write
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
    beside = folder.absolute().with_name(f".lycoris-{secrets.token_hex(6)}.tmp")
    try:
        beside.mkdir()
    except OSError as error:
        raise OSError(error.errno, f"cannot be written: {error.strerror}", str(folder)) from None
    try:
        write(beside / PEFT_FILE, tensors, metadata)
        with replacing(beside / CONFIGURATION) as handle:
            handle.write(text.encode())
        os.rename(beside, folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
