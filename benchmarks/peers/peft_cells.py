"""peft: LoRA beside the layer, LoHa and LoKr through a built dW; eager and compiled."""

from __future__ import annotations

import torch
from torch import nn

from .layer import Built, Job

PEER = "peft"
MODES = [("eager", False), ("compiled", True)]


class _Holder(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def build(job: Job, index: int) -> Built:
    """The layer with adapter `index` on it."""
    from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model

    told = job.told["adapters"][index]
    rank, tucker = told["rank"], told["tucker"]
    if told["algorithm"] == "locon":
        if tucker:
            raise NotImplementedError("peft's LoRA has no Tucker core")
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["layer"])
    elif told["algorithm"] == "loha":
        config = LoHaConfig(
            r=rank, alpha=rank, target_modules=["layer"], use_effective_conv2d=tucker
        )
    else:
        config = LoKrConfig(
            r=rank, alpha=rank, target_modules=["layer"], use_effective_conv2d=tucker,
            decompose_factor=told["factor"],
        )  # fmt: skip
    model = inject_adapter_in_model(config, _Holder(job.base()))
    model.to(device=job.device, dtype=torch.bfloat16)
    if job.conv:
        model.to(memory_format=torch.channels_last)
    params = {
        _key(name): p.requires_grad_(True)
        for name, p in model.named_parameters()
        if "base_layer" not in name
    }
    job.fill(index, params)
    return Built(model, params)


def _key(name: str) -> str:
    """The key of a LyCORIS file: layer.lora_A.default.weight -> lora_down.weight."""
    name = name.removeprefix("layer.").replace(".default", "")
    return name.replace("lora_A", "lora_down").replace("lora_B", "lora_up")
