"""What a step of an optimizer costs on the 1400 factors of a LoCon of rank 16 on SDXL's attention
and feed-forward layers: device and wall microseconds, GB/s; torch's fused AdamW beside it.

    python -m pytest benchmarks/test_optimizer.py --benchmark-enable -n 0 --peer-seconds 60

Without a GPU NumPy is timed on every tenth layer.
"""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from lycoris_cupy import bf16, to_device
from lycoris_cupy.arrays import gpu_missing
from lycoris_cupy.optim import SGD, AdamW, Lion, Optimizer, Prodigy, ScheduleFreeAdamW

from . import sdxl, timing
from .environment import ROOT
from .peers.run import missing

GPU = not gpu_missing()
RANK = 16
# How often f32 is read or written for a value, the gradient's first reading left out.
METHODS = {
    "AdamW": (AdamW, {}, 6),
    "AdamW, clipped": (AdamW, {"clip": 1.0}, 7),
    "AdamW, bf16 alone": (AdamW, {"seed": 0}, 4),
    "SGD": (SGD, {}, 4),
    "Lion": (Lion, {}, 4),
    "Prodigy": (Prodigy, {}, 11),
    "ScheduleFreeAdamW": (ScheduleFreeAdamW, {}, 8),
}


def shapes() -> dict[str, dict[str, tuple[int, int]]]:
    """layer -> factor -> shape in Flame layout."""
    every = sdxl.shapes()
    layers = sdxl.adapted(every)[0][:: 1 if GPU else 10]
    out = {}
    for layer in layers:
        outputs, inputs = every[f"{layer}.weight"]
        out[layer] = {"down": (inputs, RANK), "up": (RANK, outputs)}
    return out


@pytest.fixture(scope="module")
def factors():
    """(bf16 factors, f32 gradients), each an array of its own as an engine and a pullback have
    them.
    """
    rng = np.random.default_rng(0)
    device = "cuda:0" if GPU else "cpu"

    def drawn(dtype, scale):
        return {
            layer: {
                name: to_device((rng.standard_normal(s, np.float32) * scale).astype(dtype), device)
                for name, s in p.items()
            }
            for layer, p in shapes().items()
        }

    return drawn(bf16, 1.0), drawn(np.float32, 0.01)


@pytest.mark.parametrize("name", METHODS)
def test_step(name, factors, results, benchmark):
    given, grads = factors
    parameters = {layer: {n: v.copy() for n, v in p.items()} for layer, p in given.items()}
    kind, options, moved = METHODS[name]
    optimizer = kind(parameters, **options)
    count = sum(p.size for layer in parameters.values() for p in layer.values())
    row = {"optimizer": name, "factors": 2 * len(parameters), "values": count}
    _check(optimizer, name, parameters, grads)

    def apply():
        optimizer.apply(grads, out=parameters)

    def step():
        optimizer.step(grads, out=parameters)

    if GPU:
        row["us"] = timing.device_us(timing.captured(apply))
        row["eager_us"] = timing.device_us(step)
    row["wall_us"] = timing.wall_us(step, GPU)
    # Factors of bf16 are written; masters that are bf16 are read and written as such.
    row["bytes"] = count * (4 * (moved + 1) + 2 + (4 if options.get("seed") is not None else 0))
    row["gb_s"] = row["bytes"] / row.get("us", row["wall_us"]) / 1e3
    if GPU:
        row["copy_share"] = row["gb_s"] / results.data["ceilings"]["copy_gb_s"]
    benchmark.extra_info.update(row)
    benchmark.pedantic(
        lambda: (step(), timing.synchronize(GPU)), rounds=3, iterations=1, warmup_rounds=1
    )
    results.add("optimizers", row)


def _check(optimizer: Optimizer, name: str, parameters, grads) -> None:
    """AdamW's first step against its formula in f64, on every fiftieth layer; of all, that the
    factors are the masters, rounded.
    """
    layers = list(parameters)[::50]
    before = {k: {n: _host(v) for n, v in parameters[k].items()} for k in layers}
    masters = optimizer.step(grads, out=parameters)
    for layer in layers:
        for factor, p in before[layer].items():
            found, g = _host(masters[layer][factor]), _host(grads[layer][factor])
            rounded = found.astype(bf16).astype(np.float64)
            assert (_host(parameters[layer][factor]) == rounded).all()
            if name == "AdamW":  # m = (1 - b1) g and v = (1 - b2) g^2, both corrected
                expected = p * (1 - 1e-3 * 0.01) - 1e-3 * g / (np.abs(g) + 1e-8)
                np.testing.assert_allclose(found, expected, 1e-6, 1e-6)
            assert (found != p).any()


def _host(array) -> np.ndarray:
    return to_device(array, "cpu").astype(np.float64)


def test_torch(results, pytestconfig):
    """torch.optim.AdamW(fused=True) on the same factors in f32, in a process of its own."""
    seconds = pytestconfig.getoption("--peer-seconds")
    if not seconds:
        pytest.skip("no time for the peers: give --peer-seconds")
    if "torch" in missing().split(", "):
        pytest.fail(
            '--peer-seconds was given, but torch is missing: pip install "lycoris_cupy[peer]"'
        )
    if GPU:
        import cupy

        cupy.get_default_memory_pool().free_all_blocks()
    told = json.dumps([s for p in shapes().values() for s in p.values()])
    command = [sys.executable, "-m", "benchmarks.peers.optimizer", told]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=max(60.0, seconds)
    )
    assert done.returncode == 0, done.stderr[-2000:]
    row = json.loads(done.stdout.splitlines()[-1])
    results.add("optimizers", {"optimizer": "torch, AdamW fused", **row})
