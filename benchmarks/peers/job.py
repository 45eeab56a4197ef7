"""What a peer's process is told: the layer, the adapters, and files with the project's own inputs,
factors and f64 results. The project's side; the process knows torch alone.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from lycoris_cupy import Adapter, LoCon, LoHa, LoKr, to_device

from ..adapters import adapters
from ..case import Case
from ..shapes import Shape

# In the order of importance: a run that is out of time has the first ones.
MEASURED = (
    "LoRA r16",
    "LoHa r16",
    "LoKr factor 8",
    "LoCon Tucker r16",
    "LoKr factor 8 r16",
    "LoRA r64",
    "LoKr Tucker factor 8 r16",
    "LoHa Tucker r16",
)
ALGORITHMS = {LoCon: "locon", LoHa: "loha", LoKr: "lokr"}
FACTOR = 8  # of every LoKr in the tables


def describe(shape: Shape, device: str, names=MEASURED) -> dict:
    """The job without files: enough to compile and tune for it on random numbers."""
    groups = adapters(shape.layer)
    return {
        "shape": shape.name,
        "device": device.split(":")[0],
        "kernel": list(shape.weight[:-2]),
        "inputs": shape.weight[-2],
        "outputs": shape.weight[-1],
        "x": list(shape.x),
        "padding": shape.options.get("padding", 0),
        "adapters": [
            {"name": name, **_options(groups[name][0])} for name in names if name in groups
        ],
        "files": None,
    }


def _options(adapter: Adapter) -> dict:
    return {
        "algorithm": ALGORITHMS[type(adapter)],
        "rank": adapter.rank,
        "tucker": getattr(adapter, "tucker", False),
        "factor": FACTOR,
    }


def write(case: Case, folder: Path, names=MEASURED) -> Path:
    """The job with its files in a folder; the path of job.json."""
    job = describe(case.shape, case.device, names)
    host = case.host
    weight = np.moveaxis(host["weight"].view(np.uint16), (-1, -2), (0, 1))  # torch: (O, I, *kernel)
    _save(folder, "weight", np.ascontiguousarray(weight))
    for name in ("bias", "x", "dy"):
        _save(folder, name, host[name].view(np.uint16))
    _save(folder, "at", to_device(case.at, "cpu"))
    for i, told in enumerate(job["adapters"]):
        group = adapters(case.shape.layer)[told["name"]]
        engine = case.adapted(group)
        expected = case.expected(engine, group)
        (_, found), *_ = engine.attachments["a0"].on_host().values()
        grads = {n: to_device(g, "cpu") for n, g in expected["grads"]["a0"].items()}
        told["keys"] = sorted(group[0].save(found))
        for key, value in group[0].save(found).items():
            _save(folder, f"{i}.{key}", np.ascontiguousarray(value).view(np.uint16))
        for key, value in group[0].save(grads).items():
            _save(folder, f"{i}.{key}.grad", value)
        for name in ("y", "dx"):
            _save(folder, f"{i}.{name}", to_device(expected[name], "cpu"))
    job["files"] = str(folder)
    path = folder / "job.json"
    path.write_text(json.dumps(job, indent=1))
    return path


def _save(folder: Path, name: str, array) -> None:
    np.save(folder / f"{name}.npy", array)
