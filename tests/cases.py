"""Layers and adapters of every kind, for the tests that hold for all of them, and the peer's saved
cases.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from lycoris_cupy import (
    BOFT,
    IA3,
    Conv1d,
    Conv2d,
    Conv3d,
    DiagOFT,
    DyLoRA,
    Full,
    GLoRA,
    LayerShape,
    Linear,
    LoCon,
    LoHa,
    LoKr,
    TLoRA,
)
from lycoris_cupy.adapters import Adapter, PeftBOFT, PeftOFT
from lycoris_cupy.ops.window import Window

PEER = Path(__file__).parent / "peer" / "lycoris-4.1.3"
PEER_CASES = json.loads((PEER / "cases.json").read_text())["cases"]


@dataclass(frozen=True)
class Kind:
    """A kind of layer: its constructor's options, the weight's shape in torch's order, an input's
    shape channels first.
    """

    name: str
    build: type
    weight: tuple[int, ...]
    x: tuple[int, ...]
    options: dict

    @property
    def shape(self) -> LayerShape:
        window = Window.of(self.weight[2:], **self.options) if self.weight[2:] else Window()
        return LayerShape(window, self.weight[1], self.weight[0])


KINDS = [
    Kind("linear", Linear, (20, 12), (3, 5, 12), {}),
    Kind("linear odd", Linear, (21, 30), (7, 30), {}),
    Kind("conv1x1", Conv2d, (20, 12, 1, 1), (2, 12, 3, 5), {}),
    Kind("conv3x3", Conv2d, (20, 12, 3, 3), (2, 12, 6, 7), {"padding": 1}),
    Kind("conv3x3 stride", Conv2d, (20, 12, 3, 3), (2, 12, 7, 8), {"stride": (2, 1), "padding": 1}),
    Kind(
        "conv3x2 dilation",
        Conv2d,
        (18, 12, 3, 2),
        (1, 12, 7, 6),
        {"padding": (2, 1), "dilation": (2, 1)},
    ),
    Kind("conv1d", Conv1d, (20, 12, 3), (2, 12, 9), {"padding": 1, "stride": 2}),
    Kind("conv3d", Conv3d, (12, 8, 2, 3, 2), (1, 8, 3, 5, 4), {"padding": (0, 1, 1)}),
    Kind("groups 4", Conv2d, (24, 4, 3, 3), (2, 16, 6, 5), {"padding": 1, "groups": 4}),
    Kind(
        "groups stride",
        Conv2d,
        (12, 6, 3, 3),
        (1, 12, 7, 6),
        {"stride": 2, "padding": 1, "groups": 2},
    ),
    Kind("depthwise", Conv2d, (16, 1, 3, 3), (2, 16, 5, 6), {"padding": 1, "groups": 16}),
    Kind(
        "depthwise 1d",
        Conv1d,
        (16, 1, 4),
        (2, 16, 9),
        {"padding": 2, "dilation": 2, "groups": 8 * 2},
    ),
]


def adapters_for(shape: LayerShape) -> dict[str, Adapter]:
    """Every algorithm and form that this layer takes."""
    out: dict[str, Adapter] = {
        "locon": LoCon(shape, 3, 2.0),
        "locon rank 1": LoCon(shape, 1),
        "loha": LoHa(shape, 2, 3.0),
        "loha large": LoHa(shape, 5, 1.0),
        "lokr w1 w2": LoKr.create(shape, 1000, 2.0, factor=2),
        "lokr w1 w2ab": LoKr.create(shape, 1, 2.0, factor=2),
        "lokr w1ab w2ab": LoKr.create(shape, 1, 0.5, factor=4, decompose_both=True),
        "lokr unbalanced": LoKr.create(shape, 1, 2.0, factor=2, unbalanced_factorization=True),
        "lokr full matrix": LoKr.create(shape, 2, 7.0, full_matrix=True),
        "full": Full(shape),
        "full bias": Full(shape, bias=True),
        "ia3": IA3(shape),
        "ia3 bias": IA3(shape, scales_bias=True),
        "ia3 on input": IA3(shape, on_input=True),
        "dylora": DyLoRA(shape, 4, 2.0),
        "glora": GLoRA(shape, 2, 3.0),
        "diag-oft": DiagOFT.create(shape, 4),
        "diag-oft rescaled": DiagOFT.create(shape, 8, rescaled=True, constraint=0.02),
        "diag-oft reference": DiagOFT.create(shape, 3, rescaled=True, rule="reference"),
    }
    if shape.outputs % 2 == 0:
        out["boft"] = BOFT.create(shape, -1)
        for block in (b for b in (4, 6, 10, 2) if _fits(shape.outputs, b)):
            options = {"block_size": block, "rescaled": True}
            out["boft rescaled"] = BOFT.create(shape, constraint=0.02, **options)
            out["boft reference"] = BOFT.create(shape, rule="reference", **options)
    if shape.taps == shape.window.groups == 1 and shape.inputs % 6 == 0:
        out["oft-peft"] = PeftOFT.create(shape, 3)
        out["oft-peft exact"] = PeftOFT.create(shape, 6, terms=None)
        out["oft-peft shared"] = PeftOFT.create(shape, 3, terms=3, shared=True, rule="reference")
        out["boft-peft"] = PeftBOFT(shape, block_size=3)
        out["boft-peft reference"] = PeftBOFT(shape, block_size=6, rule="reference")
    if shape.taps == shape.window.groups == 1:
        out["tlora"] = TLoRA(shape, 3, 2.0)
        out["tlora more ranks"] = TLoRA(shape, 40, 1.0)
    if shape.taps > 1:
        out["locon tucker"] = LoCon(shape, 3, 2.0, tucker=True)
        out["locon tucker ranks"] = LoCon(shape, 3, 2.0, tucker=True, mid_rank=2)
        out["locon per tap"] = LoCon(shape, 2, 2.0, per_tap=True)
        out["loha tucker"] = LoHa(shape, 2, 3.0, tucker=True)
        out["lokr tucker"] = LoKr.create(shape, 1, 2.0, factor=2, tucker=True)
        out["lokr tucker both"] = LoKr.create(
            shape, 1, 2.0, factor=4, tucker=True, decompose_both=True
        )
    return out


def _fits(outputs: int, block: int) -> bool:
    """Whether boft takes blocks of this size: a power of two of them."""
    return outputs % block == 0 and (outputs // block).bit_count() == 1


PAIRS = [(kind, name) for kind in KINDS for name in adapters_for(kind.shape)]


def channels_last(x: np.ndarray, linear: bool) -> np.ndarray:
    return x if linear else np.ascontiguousarray(np.moveaxis(x, 1, -1))


def channels_first(x: np.ndarray, linear: bool) -> np.ndarray:
    return x if linear else np.ascontiguousarray(np.moveaxis(x, -1, 1))


def peer(name: str):
    """(case, base, adapter tensors, expected tensors) of a saved case."""
    parts = (
        load_file(PEER / folder / f"{name}.safetensors") for folder in ("base", "adapter", "expect")
    )
    return PEER_CASES[name], *parts


def peer_layer(case: dict, base: dict, dtype=np.float64):
    """The case's layer, named 'block.layer' in its engine."""
    build = {"linear": Linear, "conv1d": Conv1d, "conv2d": Conv2d, "conv3d": Conv3d}[
        case["layer"]["kind"]
    ]
    options = {
        k: case["layer"][k]
        for k in ("stride", "padding", "dilation", "groups")
        if k in case["layer"]
    }
    bias = base.get("block.layer.bias")
    weight = base["block.layer.weight"].astype(dtype)
    return build.from_torch(weight, None if bias is None else bias.astype(dtype), **options)
