"""Modules in words that only PEFT has, and what its configuration says of others but for alpha.

(IA)^3     ia3_l multiplies outputs, bias included, or the inputs of feedforward_modules;
           it starts at 1, so that w = ia3_l - 1
LoKr       alpha / r holds with both sides full too: lokr_w1 takes it
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..adapters import IA3, Adapter, LoKr
from ..errors import FileFormatError, ShapeError
from ..layers import LayerShape
from ..ops.window import Window
from .alpha import Configuration
from .modules import read_factor
from .source import Module, Source


def read_own_words(
    source: Source, module: Module, shape: LayerShape | None
) -> tuple[Adapter, dict[str, np.ndarray]] | None:
    """The adapter of a module in PEFT's own words, None for one in those of LyCORIS.

    shape: of the layer it sits on, or None to guess it.
    """
    if "ia3_l" not in module.keys:
        return None
    if set(module.keys) != {"ia3_l"}:
        raise FileFormatError(f"ia3_l stands beside {', '.join(sorted(set(module.keys)))}")
    stored = read_factor(source.file, module.keys["ia3_l"], "ia3_l")
    return _ia3(stored, source.alphas.configuration, module, shape)


def scaled_by_configuration(
    adapter: Adapter, params: Mapping[str, np.ndarray], configuration: Configuration, path: str
) -> dict[str, np.ndarray]:
    """The factors of a LoKr whose sides are both full with PEFT's alpha / r in the first, in f32 or
    wider; those of any other adapter as they are.
    """
    scale = configuration.scale(path)
    if not isinstance(adapter, LoKr) or adapter.has_rank or scale in (None, 1.0):
        return dict(params)
    return {**params, "w1": _wide(params["w1"]) * scale}


def _ia3(
    stored: np.ndarray, configuration: Configuration | None, module: Module, shape
) -> tuple[Adapter, dict[str, np.ndarray]]:
    values = configuration.values if configuration is not None else {}
    on_input = _is_feedforward(values.get("feedforward_modules") or [], module.key.path)
    if shape is None:
        shape = _guessed(stored.shape, on_input)
    size = shape.channels if on_input else shape.outputs
    linear = (1, size) if on_input else (size, 1)
    expected = (1, size, *(1,) * shape.window.axes) if shape.window.axes else linear
    if tuple(stored.shape) != expected:
        side = "inputs (it is of the feedforward_modules)" if on_input else "outputs"
        raise ShapeError(
            f"ia3_l has shape {tuple(stored.shape)}, expected {expected}: the {side} of {shape}"
        )
    adapter = IA3(shape, on_input=on_input, scales_bias=not on_input)
    (form,) = adapter.factors().values()
    return adapter, {"weight": (_wide(stored) - 1).reshape(adapter.flame_shape(form))}


def _wide(stored: np.ndarray) -> np.ndarray:
    return stored.astype(np.float64 if stored.dtype == np.float64 else np.float32)


def _guessed(stored: tuple[int, ...], on_input: bool) -> LayerShape:
    size, window = max(stored, default=1), Window.of((1,) * min(max(len(stored) - 2, 0), 3))
    return LayerShape(window, size if on_input else 1, 1 if on_input else size)


def _is_feedforward(told: Any, path: str) -> bool:
    """PEFT's own rule: a pattern for the whole path, or a list of its possible ends."""
    if isinstance(told, str):
        return re.fullmatch(told, path) is not None
    return any(path.endswith(str(end)) for end in told)
