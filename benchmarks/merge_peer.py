"""lycoris-lora's own merge of an SDXL checkpoint, as its users do it: modules with the checkpoint's
weights, `lycoris.utils.merge`, and the state dict saved. Runs in an environment with torch.

    python merge_peer.py BASE STYLE OUT STRENGTH
"""

import os
import sys

import torch
from lycoris.utils import merge
from safetensors import safe_open
from safetensors.torch import load_file, save_file

UNET = "model.diffusion_model."
ENCODERS = ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")


def module_of(tensors: dict) -> torch.nn.Module:
    """A tree of modules with these parameters: Linear and Conv2d where lycoris-lora looks for
    them.
    """
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        path, _, kind = name.rpartition(".")
        if kind == "bias" and f"{path}.weight" in tensors:
            continue
        at = root
        *outer, last = path.split(".")
        for part in outer:
            if part not in at._modules:
                at.add_module(part, torch.nn.Module())
            at = at._modules[part]
        if kind == "weight" and tensor.ndim in (2, 4):
            bias = tensors.get(f"{path}.bias")
            made = _layer(tensor, bias)
            for key, child in (at._modules[last]._modules if last in at._modules else {}).items():
                made.add_module(key, child)
            at.add_module(last, made)
        else:
            if last not in at._modules:
                at.add_module(last, torch.nn.Module())
            at._modules[last].register_parameter(kind, _parameter(tensor))
            if kind == "weight" and f"{path}.bias" in tensors:
                at._modules[last].register_parameter("bias", _parameter(tensors[f"{path}.bias"]))
    return root


def _parameter(tensor):
    return torch.nn.Parameter(tensor, requires_grad=False)


def _layer(weight, bias):
    with torch.device("meta"):
        if weight.ndim == 2:
            layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
        else:
            size = tuple(weight.shape[2:])
            layer = torch.nn.Conv2d(
                weight.shape[1], weight.shape[0], size, padding=size[0] // 2, bias=bias is not None
            )
    layer.weight = _parameter(weight)
    if bias is not None:
        layer.bias = _parameter(bias)
    return layer


def main(base: str, style: str, out: str, strength: str) -> None:
    """Merge and save."""
    with safe_open(base, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(base)
    parts = {}
    for prefix in (UNET, *ENCODERS):
        mine = {n[len(prefix) :]: tensors.pop(n) for n in list(tensors) if n.startswith(prefix)}
        # Parameters without a module of their own stay in the state dict.
        loose = {n: mine.pop(n) for n in list(mine) if "." not in n}
        tensors.update({prefix + n: t for n, t in loose.items()})
        parts[prefix] = module_of(mine)
    with torch.no_grad():
        merge([parts[p] for p in ENCODERS], parts[UNET], load_file(style), float(strength))
    for prefix, module in parts.items():
        tensors.update({prefix + n: t.contiguous() for n, t in module.state_dict().items()})
    save_file(tensors, out, metadata)
    handle = os.open(out, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


if __name__ == "__main__":
    main(*sys.argv[1:])
