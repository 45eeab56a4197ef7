"""The demo's network in torch, and lycoris-lora's modules on it, with the project's factors."""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from lycoris_cupy.arrays import bf16
from lycoris_cupy.demo.ncnn import NEAREST, Network
from lycoris_cupy.engine import Engine

from .methods import ADAPTER, Method


class TorchNetwork(nn.Module):
    """(N, H, W, 3) -> (N, 2H, 2W, 3): the nodes in their order, as the project runs them, what
    follows the last convolution in f32. Inside, channels are last in memory.
    """

    def __init__(self, network: Network):
        super().__init__()
        self.nodes, self.output = network.nodes, network.output
        for name, layer in network.layers.items():
            shape = layer.shape
            made = nn.Conv2d(
                shape.inputs, shape.outputs, shape.window.kernel, padding=shape.window.padding
            )
            made.weight.data.copy_(torch.from_numpy(layer.weight.transpose(3, 2, 0, 1).copy()))
            made.bias.data.copy_(tensor(layer.bias))
            self.add_module(name, made)
        for name, slope in network.slopes.items():
            made = nn.PReLU(slope.size)
            made.weight.data.copy_(tensor(slope))
            self.add_module(name, made)
        self.last = [node.name for node in network.nodes if node.kind == "Convolution"][-1]
        self.to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        blobs = {}
        for node in self.nodes:
            inputs = [blobs.pop(name) for name in node.inputs]
            out = x.permute(0, 3, 1, 2) if node.kind == "Input" else self._run(node, inputs)
            blobs.update(dict.fromkeys(node.outputs, out))
        return blobs[self.output].permute(0, 2, 3, 1)

    def _run(self, node, inputs: list[torch.Tensor]) -> torch.Tensor:
        x = inputs[0]
        if node.kind in ("Convolution", "PReLU"):
            out = getattr(self, node.name)(x)
            return out.float() if node.name == self.last else out
        if node.kind == "PixelShuffle":
            return functional.pixel_shuffle(x, node.settings[0])
        if node.kind == "Interp" and node.settings[0] == NEAREST:
            return functional.interpolate(x, scale_factor=int(node.settings[1]), mode="nearest")
        if node.kind == "Interp":
            return functional.interpolate(x, scale_factor=0.5, mode="bicubic", align_corners=False)
        if node.kind == "BinaryOp":
            return inputs[0].float() + inputs[1].float()
        return x  # Split


def adapted(network: TorchNetwork, method: Method, engine: Engine, bypass: bool) -> nn.Module:
    """lycoris-lora on every convolution, with the method's options and the engine's factors.

    network: on its device, its weights f32; they are frozen. Returns the module whose parameters
    are trained, f32. bypass: whether changes are applied beside a layer, or added to its weight.
    ValueError where lycoris-lora makes other layers or factors of the same options.
    """
    from lycoris import create_lycoris
    from lycoris.logging import logger

    logger.setLevel(logging.ERROR)  # it tells of every module, and of kinds that a network lacks

    device = next(network.parameters()).device
    network.requires_grad_(False)
    sources = engine.attachments[ADAPTER].on_host()
    rank = method.options.get("rank", 1)  # Full has none, and 0 would mean: on no layer
    made = create_lycoris(
        network,
        1.0,
        linear_dim=rank,
        linear_alpha=rank,
        algo=method.algorithm,
        use_tucker=method.options.get("tucker", False),
        factor=method.options.get("factor", -1),
        bypass_mode=bypass,
    )
    if {lora.lora_name for lora in made.loras} != {f"lycoris_{name}" for name in sources}:
        raise ValueError(f"lycoris-lora adapts {len(made.loras)} layers, not the same ones")
    for lora in made.loras:
        adapter, factors = sources[lora.lora_name.removeprefix("lycoris_")]
        values = adapter.save(factors)
        own = dict(lora.named_parameters())
        if method.algorithm == "full":  # it keeps the changed weight itself, and starts unchanged
            if set(own) != {"weight", "bias"} or any(value.any() for value in values.values()):
                raise ValueError(f"Full has {sorted(own)} there, {sorted(values)} here")
            continue
        if set(own) != set(values):
            raise ValueError(f"lycoris-lora has {sorted(own)}, the project {sorted(values)}")
        for key, p in own.items():
            if tuple(p.shape) != values[key].shape and p.numel() != values[key].size:
                raise ValueError(f"{key} is {tuple(p.shape)} there, {values[key].shape} here")
            p.data.copy_(tensor(values[key]).reshape(p.shape))
    made.apply_to()  # before it moves: until then its modules are not its children
    made.to(device=device, dtype=torch.float32)
    made.to(memory_format=torch.channels_last)
    made.requires_grad_(True)
    if elsewhere := [name for name, p in made.named_parameters() if p.device != device]:
        raise ValueError(f"{elsewhere[0]} does not lie on {device}")
    if not list(made.parameters()):
        raise ValueError("lycoris-lora has nothing to train")
    return made


def tensor(array: np.ndarray) -> torch.Tensor:
    """The same values, copied; NumPy's bf16 as torch's."""
    if array.dtype == bf16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())
