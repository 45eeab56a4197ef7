"""The bare torch layer and the job's tensors; a forward and a step of whatever is built on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..ulp import ulp, worst

# A peer that rounds W + dW into bf16 loses more than a unit here and there; further off is wrong.
MOST_RELATIVE = 2.0**-4


@dataclass
class Built:
    """A callable layer with one adapter: call(x) -> y; params: file key -> tensor that learns."""

    call: Callable
    params: dict[str, torch.Tensor]


class Job:
    """The job's tensors on its device; random ones where it has no files."""

    def __init__(self, job: dict):
        self.told, self.device = job, job["device"]
        self.folder = Path(job["files"]) if job["files"] else None
        self.conv = bool(job["kernel"])
        kernel, x = job["kernel"], job["x"]
        self.weight = self._tensor("weight", (job["outputs"], job["inputs"], *kernel))
        self.bias = self._tensor("bias", (job["outputs"],))
        self.x = self._picture(self._tensor("x", x)).requires_grad_(True)
        self.dy = self._picture(self._tensor("dy", (*x[:-1], job["outputs"])))

    def _picture(self, a):
        """torch's order of axes over the same memory: channels last."""
        return a.permute(0, 3, 1, 2) if self.conv else a

    def _tensor(self, name: str, shape) -> torch.Tensor:
        if self.folder is None:
            scale = 0.02 if name == "weight" else 1.0
            return torch.randn(*shape, device=self.device, dtype=torch.bfloat16) * scale
        bits = torch.from_numpy(np.load(self.folder / f"{name}.npy").view(np.int16))
        return bits.view(torch.bfloat16).to(self.device)

    def base(self) -> nn.Module:
        """A new frozen layer over the job's weight."""
        job = self.told
        if self.conv:
            made = nn.Conv2d(
                job["inputs"], job["outputs"], tuple(job["kernel"]), padding=job["padding"],
                device="meta",
            )  # fmt: skip
        else:
            made = nn.Linear(job["inputs"], job["outputs"], device="meta")
        weight = self.weight
        if self.conv:
            weight = weight.contiguous(memory_format=torch.channels_last)
        made.weight = nn.Parameter(weight, requires_grad=False)
        made.bias = nn.Parameter(self.bias, requires_grad=False)
        return made

    def fill(self, index: int, params: dict[str, torch.Tensor]) -> None:
        """Put the project's factors into a peer's parameters, by their keys in LyCORIS files."""
        keys = self.told["adapters"][index].get("keys")
        if keys is not None and set(keys) != set(params):
            raise ValueError(f"the peer has {sorted(params)}, the file {keys}")
        for key, p in params.items():
            value = self._tensor(f"{index}.{key}", tuple(p.shape))
            with torch.no_grad():
                p.copy_(value.reshape(p.shape) if value.numel() == p.numel() else value)

    def runs(self, built: Built) -> dict[str, Callable]:
        """'forward' as for inference; 'step': forward, dx, and all factor gradients."""
        leaves = [self.x, *built.params.values()]

        def forward():
            with torch.no_grad():
                return built.call(self.x)

        def step():
            y = built.call(self.x)
            return y, torch.autograd.grad(y, leaves, self.dy)

        return {"forward": forward, "step": step}

    def check(self, index: int, built: Built, step) -> dict:
        """Errors in ULP against the project's f64 results; ValueError where they are more."""
        if self.folder is None:
            return {}
        y, (dx, *grads) = step()
        found, relative = {}, {}
        for name, value in (("y", y), ("dx", dx)):
            value = value.permute(0, 2, 3, 1) if self.conv else value
            rows = value.detach().reshape(-1, value.shape[-1])
            rows = rows[torch.from_numpy(np.load(self.folder / "at.npy")).to(rows.device)]
            right = np.load(self.folder / f"{index}.{name}.npy")
            found[name], relative[name] = _compare(rows, right)
        errors = []
        for (key, _), grad in zip(built.params.items(), grads, strict=True):
            right = np.load(self.folder / f"{index}.{key}.grad.npy")
            error, relative[key] = _compare(grad.reshape(right.shape), right)
            errors.append(error)
        found["grads"] = worst(errors)
        wrong = {k: f"{v:.3g}" for k, v in relative.items() if not v <= MOST_RELATIVE}
        if wrong:
            raise ValueError(f"the result is another one, relative error {wrong}")
        return {"ulp": found}


def _compare(value: torch.Tensor, right: np.ndarray):
    value = value.detach().double().cpu().numpy()
    norm = float(np.linalg.norm(value - right) / np.linalg.norm(right))
    return ulp(value, right), norm
