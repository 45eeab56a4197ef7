"""Snapshots as tensors and text: nested containers of arrays and numbers, and back, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..arrays import Array, on_gpu, to_device


def packed(tree: Any, arrays: dict[str, np.ndarray], path: str) -> Any:
    """A skeleton of `tree` that JSON holds; its arrays go into `arrays` under names that begin with
    `path`. Mappings have text as keys.
    """
    if isinstance(tree, np.ndarray) or on_gpu(tree):
        arrays[path] = to_device(tree, "cpu")
        return {"array": path}
    if isinstance(tree, Mapping):
        return {"dict": {k: packed(v, arrays, f"{path}.{k}") for k, v in tree.items()}}
    if isinstance(tree, (list, tuple)):
        kind = "list" if isinstance(tree, list) else "tuple"
        return {kind: [packed(v, arrays, f"{path}.{i}") for i, v in enumerate(tree)]}
    return tree.item() if isinstance(tree, np.generic) else tree


def unpacked(skeleton: Any, arrays: Mapping[str, Array], device: str) -> Any:
    """The tree of a skeleton, its arrays on a device. Raises KeyError for an array that is not
    there, TypeError or ValueError for what is no skeleton.
    """
    if not isinstance(skeleton, dict):
        return skeleton
    ((kind, content),) = skeleton.items()
    if kind == "array":
        return to_device(arrays[content], device)
    if kind == "dict":
        return {k: unpacked(v, arrays, device) for k, v in content.items()}
    parts = [unpacked(v, arrays, device) for v in content]
    if kind not in ("list", "tuple"):
        raise ValueError(f"{kind!r} is no container")
    return parts if kind == "list" else tuple(parts)
