"""The weight builders: W + s dW of every algorithm, as `merged()` makes it, on weights of 32 MiB
and more; GB/s (the weight read and written, the factors read) as a share of the copy bandwidth of
the same run.
"""

from __future__ import annotations

import numpy as np
import pytest

from lycoris_cupy import Engine, bf16, to_device
from lycoris_cupy.arrays import gpu_missing
from lycoris_cupy.attachment import Attachment

from . import reference, timing
from .adapters import builders
from .case import MOST_ULP
from .floors import build_bytes
from .shapes import CPU_WEIGHTS, WEIGHTS
from .ulp import f64, ulp

GPU = not gpu_missing()
CASES = [(w, a) for w in (WEIGHTS if GPU else CPU_WEIGHTS) for a in builders(w.layer)]


@pytest.mark.parametrize(("weight", "name"), CASES, ids=[f"{w.name}, {a}" for w, a in CASES])
def test_build(weight, name, results, benchmark):
    device = "cuda:0" if GPU else "cpu"
    group = builders(weight.layer)[name]
    host = weight.data()
    engine = Engine({"layer": weight.build(host["weight"], None)}, device=device)
    rng = np.random.default_rng(1)
    for i, adapter in enumerate(group):
        made = {
            n: rng.standard_normal(v.shape, np.float32) * 0.1 for n, v in adapter.init(rng).items()
        }
        engine.attachments[f"a{i}"] = Attachment({"layer": (adapter, made)}, device, bf16, 0.7)

    def build():
        return engine.merged().layers["layer"].weight

    row = {"shape": weight.name, "adapter": name, "ulp": _error(engine, group, build())}
    run = build
    if GPU:
        try:
            run = timing.captured(build)
        except Exception as error:  # then gaps between its kernels count
            row["not_captured"] = str(error)[:200]
    row["us"] = timing.device_us(run) if GPU else timing.wall_us(run, False)
    row["bytes"] = build_bytes(weight, group)
    row["gb_s"] = row["bytes"] / row["us"] / 1e3
    if GPU:
        row["copy_share"] = row["gb_s"] / results.data["ceilings"]["copy_gb_s"]
    row["peak_bytes"] = timing.peak_bytes(build, GPU)
    benchmark.extra_info.update(row)
    benchmark.pedantic(
        lambda: (run(), timing.synchronize(GPU)), rounds=3, iterations=1, warmup_rounds=1
    )
    results.add("weights", row)


def _error(engine, group, built) -> dict[str, float]:
    """Of a slice of the input side, in ULP against f64."""
    layer = engine.layers["layer"]
    total = f64(layer.matrix)
    for i, adapter in enumerate(group):
        p = engine.parameters(f"a{i}")["layer"]
        total += reference.delta(adapter, p) * engine.strength[f"a{i}"]
    error = ulp(built.reshape(total.shape), total)
    assert error["max"] <= MOST_ULP, f"{error} ULP from f64"
    return {**error, "weight_mib": to_device(built, "cpu").nbytes / 2**20}
