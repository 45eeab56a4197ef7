"""Presets: LyCORIS's names for parts of a network, in selectors.

LyCORIS goes by the classes of modules; an engine knows a layer's name and kind, so a preset here
takes what those tell. What LyCORIS calls a convolution goes by the first extent of its kernel: a
(1, 3) kernel is a linear layer there and a convolution here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """targets, exclude: selectors. algorithm: the only one it is for. override: selector -> what is
    said of those layers alone.
    """

    targets: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    algorithm: str | None = None
    override: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


_LAST_OF_MLP = ("*ff.net.2", "*mlp.fc2")

PRESETS = {
    "full": Preset(("*",)),
    "full-lin": Preset(("*",), (":conv",)),
    "attn-mlp": Preset((":transformer",), (":conv",)),
    "attn-only": Preset((":attention",), (":conv",)),
    "unet-only": Preset(("*",), (":text-encoder",)),
    "unet-transformer-only": Preset((":transformer",), (":conv", ":text-encoder")),
    "unet-convblock-only": Preset((":resnet", ":sampler", ":ends"), (":text-encoder",)),
    "ia3": Preset(
        ("*to_k", "*to_v", "*k_proj", "*v_proj", *_LAST_OF_MLP),
        (":conv",),
        "ia3",
        {selector: {"on_input": True} for selector in _LAST_OF_MLP},
    ),
}
