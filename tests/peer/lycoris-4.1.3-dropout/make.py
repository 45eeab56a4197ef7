"""Makes values.safetensors: outputs of LyCORIS 4.1.3 in training, with the masks of tests/masks.py.

Needs torch and lycoris-lora 4.1.3: `PYTHONPATH=. python tests/peer/lycoris-4.1.3-dropout/make.py`.
Only its random draws are replaced: torch.rand by numbers on the right side of p, dropout of
elements by x * mask / (1 - p). Where it compares the wrong way (GLoRA, Norm), `turned` draws so
that it keeps what the mask keeps.
"""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from safetensors.numpy import save_file

from tests import masks

HERE = Path(__file__).parent
P, SEED, STEP, STRENGTH = 0.4, 77, 5, 0.75
BYPASS = {"bypass_mode": True}
RANK = {"rank_dropout": P}
SCALED = {"rank_dropout": P, "rank_dropout_scale": True}

# name: module, layer, options, dropout, whether its comparison is turned
CASES = {
    "locon-dropout": (LoConModule, "linear", {**BYPASS, "lora_dim": 5}, {"dropout": P}, False),
    "locon-conv-dropout": (LoConModule, "conv", {**BYPASS, "lora_dim": 5}, {"dropout": P}, False),
    "locon-rank": (LoConModule, "linear", {**BYPASS, "lora_dim": 5}, RANK, False),
    "locon-rank-scaled": (LoConModule, "linear", {**BYPASS, "lora_dim": 5}, SCALED, False),
    "locon-conv-rank": (LoConModule, "conv", {**BYPASS, "lora_dim": 5}, SCALED, False),
    "locon-tucker-rank": (LoConModule, "conv", {**BYPASS, "lora_dim": 5, "use_tucker": True}, SCALED, False),
    "locon-both": (LoConModule, "linear", {**BYPASS, "lora_dim": 5}, {**SCALED, "dropout": P}, False),
    "loha-dropout": (LohaModule, "linear", {**BYPASS, "lora_dim": 3}, {"dropout": P}, False),
    "loha-rank": (LohaModule, "linear", {"lora_dim": 3}, RANK, False),
    "loha-conv-rank": (LohaModule, "conv", {"lora_dim": 3}, SCALED, False),
    "loha-dora-rank": (LohaModule, "linear", {"lora_dim": 3, "weight_decompose": True}, SCALED, False),
    "lokr-dropout": (LokrModule, "linear", {**BYPASS, "lora_dim": 2, "factor": 2}, {"dropout": P}, False),
    "lokr-rank": (LokrModule, "linear", {"lora_dim": 2, "factor": 2}, RANK, False),
    "lokr-conv-rank": (LokrModule, "conv", {"lora_dim": 2, "factor": 2}, SCALED, False),
    "lokr-dora-rank": (LokrModule, "linear", {"lora_dim": 2, "factor": 2, "weight_decompose": True}, SCALED, False),
    "full-rank": (FullModule, "linear", {}, SCALED, False),
    "glora-dropout": (GLoRAModule, "linear", {**BYPASS, "lora_dim": 5}, {"dropout": P}, False),
    "glora-rank": (GLoRAModule, "linear", {**BYPASS, "lora_dim": 5}, SCALED, True),
    "diag-oft-rank": (DiagOFTModule, "linear", {"lora_dim": 4}, RANK, False),
    "norm-rank": (NormModule, "norm", {}, RANK, True),
    # Where it differs from us: its own meanings.
    "other-locon-rebuild-rank": (LoConModule, "linear", {"lora_dim": 5}, RANK, False),
    "other-locon-rebuild-dropout": (LoConModule, "linear", {"lora_dim": 5}, {"dropout": P}, False),
    "other-glora-rank": (GLoRAModule, "linear", {**BYPASS, "lora_dim": 5}, RANK, False),
}  # fmt: skip


def exact(generator, *shape, size=1.0):
    """f64, exact in bf16."""
    value = torch.randn(*shape, generator=generator, dtype=torch.float64) * size
    return value.to(torch.bfloat16).double()


def layer_of(kind, generator):
    if kind == "norm":
        layer = torch.nn.LayerNorm(12)
    elif kind == "conv":
        layer = torch.nn.Conv2d(6, 16, (3, 2), padding=1)
    else:
        layer = torch.nn.Linear(12, 16)
    layer.double().requires_grad_(False)
    for p in layer.parameters():
        p.copy_(exact(generator, *p.shape))
    shape = {"norm": (3, 12), "conv": (2, 6, 4, 5), "linear": (3, 12)}[kind]
    return layer, exact(generator, *shape)


def draws(name, turned):
    """What stands in for torch.rand and for dropout of elements, in the order of the calls."""
    counts = {"rand": 0, "drop": 0}

    def mask(entries, kind, part):
        numbers = {"step": STEP, "tensor": 0, "seed": SEED}
        return masks.mask(entries, P, kind=kind + 256 * part, **numbers)

    def rand(*shape, **_):
        part, counts["rand"] = counts["rand"], counts["rand"] + 1
        m = mask(int(np.prod(shape)), 2, part)
        return torch.from_numpy(np.where((m == 0) == turned, 0.9, 0.1)).reshape(shape)

    def dropout(x, p=0.5, training=True, inplace=False):
        part, counts["drop"] = counts["drop"], counts["drop"] + 1
        m = mask(x.numel(), 2 if name.startswith("diag-oft") else 1, part)
        if x.ndim == 4:  # the mask runs channels last
            n, c, h, w = x.shape
            return x * torch.from_numpy(m.reshape(n, h, w, c)).permute(0, 3, 1, 2) / (1 - p)
        return x * torch.from_numpy(m).to(x).reshape(x.shape) / (1 - p)

    return rand, dropout, counts


def main():
    tensors, cases = {}, {}
    for name, (module, kind, options, knobs, turned) in CASES.items():
        generator = torch.Generator().manual_seed(sum(name.encode()))
        layer, x = layer_of(kind, generator)
        own = module("lora", layer, multiplier=STRENGTH, alpha=2.0, **options, **knobs).double()
        if module is DiagOFTModule:  # computes in float32
            own, layer, x = own.float(), layer.float(), x.float()
        own.org_forward = layer.forward
        with torch.no_grad():
            for n, p in own.named_parameters():
                p.copy_(exact(generator, *p.shape, size=0.5) + (2.0 if n == "dora_scale" else 0))
        if module is FullModule:
            own.is_diff = True
            state = {"diff": own.weight, "diff_b": own.bias}
        else:
            state = own.custom_state_dict() or own.state_dict()
        rand, dropout, counts = draws(name, turned)
        own.train()
        with (
            torch.no_grad(),
            mock.patch("torch.rand", rand),
            mock.patch("torch.nn.functional.dropout", dropout),
        ):
            y = own(x)
        calls = (
            0 if name.endswith("rebuild-dropout") else len(knobs.keys() - {"rank_dropout_scale"})
        )
        assert counts["rand"] + counts["drop"] >= calls, name
        for p_name, p in layer.named_parameters():
            tensors[f"{name}.base.{p_name}"] = p.float().numpy()
        for key, value in state.items():
            tensors[f"{name}.adapter.{key}"] = value.detach().float().numpy().copy()
        tensors[f"{name}.x"], tensors[f"{name}.y"] = x.float().numpy(), y.detach().numpy().copy()
        cases[name] = {"layer": kind, "knobs": knobs}
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, HERE / "values.safetensors")
    told = {"seed": SEED, "step": STEP, "strength": STRENGTH, "cases": cases}
    (HERE / "cases.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
