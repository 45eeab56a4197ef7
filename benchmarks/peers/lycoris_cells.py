"""lycoris-lora: its modules, and its ways to run one.

`bypass_mode` says whether dW is built (rebuild) or applied beside the layer (bypass);
LYCORIS_KERNEL_BACKEND, read at every call, whether torch does the work or the fused kernels (Triton
from sm_80 on, tuned at the first call). Under torch.compile the torch body is compiled.
"""

from __future__ import annotations

import os

import torch

from .layer import Built, Job

PEER = "lycoris-lora"
# (name, bypass_mode, backend, compiled)
MODES = [
    ("bypass, fused", True, "auto", False),
    ("rebuild, fused", False, "auto", False),
    ("bypass, torch", True, "torch", False),
    ("rebuild, torch", False, "torch", False),
    ("bypass, compiled", True, "torch", True),
    ("rebuild, compiled", False, "torch", True),
]


def build(job: Job, index: int, bypass: bool, backend: str) -> Built:
    """The layer with adapter `index` on it."""
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule

    os.environ["LYCORIS_KERNEL_BACKEND"] = backend
    told = job.told["adapters"][index]
    classes = {"locon": LoConModule, "loha": LohaModule, "lokr": LokrModule}
    base = job.base()
    rank = told["rank"]
    module = classes[told["algorithm"]](
        "layer", base, 1.0, rank, rank, bypass_mode=bypass, use_tucker=told["tucker"],
        factor=told["factor"],
    )  # fmt: skip
    module.to(device=job.device, dtype=torch.bfloat16)
    if job.conv:
        module.to(memory_format=torch.channels_last)
    module.apply_to()
    params = dict(module.named_parameters())
    job.fill(index, params)
    return Built(base, params)


def backend_used(device: str) -> str:
    """What 'auto' means on this device."""
    from lycoris.kernels import resolve_backend

    return resolve_backend("auto", torch.device(device))


def tuned(device: str) -> dict:
    """Kernels that the tuner could not run, and why."""
    if device == "cpu":
        return {}
    from lycoris.kernels.tuner import tuner

    return {name: reason[:200] for name, reason in tuner.failed.items()}
