"""What an adapter costs: forward and step of each algorithm on each shape, over the bare layer's.

    python -m pytest benchmarks --benchmark-enable -n 0

Every measurement first asserts its result. On a GPU `extra_info` holds device and wall microseconds
and the ratio, which must not pass LIMIT, and the table is written to
benchmarks/results/layers-<gpu>.json; without one NumPy is timed on smaller shapes.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import timing
from benchmarks.shapes import CPU_SHAPES, SHAPES
from lycoris_cupy import Engine, Full, LoCon, LoHa, LoKr, bf16, to_device
from lycoris_cupy.arrays import gpu_missing
from lycoris_cupy.attachment import Attachment

LIMIT = 3.0  # times the bare layer, forward and step
GPU = not gpu_missing()
RESULTS = Path(__file__).parent / "results"


def adapters(shape):
    layer = shape.layer
    out = {
        "LoRA r16": LoCon(layer, 16, 16.0),
        "LoHa r16": LoHa(layer, 16, 16.0),
        "LoKr factor 8": LoKr.create(layer, 10**6, factor=8),
        "LoKr factor 8 r16": LoKr.create(layer, 16, 16.0, factor=8),
        "Full": Full(layer),
    }
    if layer.taps > 1:
        out["LoCon Tucker r16"] = LoCon(layer, 16, 16.0, tucker=True)
        out["LoHa Tucker r16"] = LoHa(layer, 16, 16.0, tucker=True)
        out["LoKr Tucker factor 8 r16"] = LoKr.create(layer, 16, 16.0, factor=8, tucker=True)
        out["LoCon r16, an up a tap"] = LoCon(layer, 16, 16.0, per_tap=True)
    return out


CASES = [(s, a) for s in (SHAPES if GPU else CPU_SHAPES) for a in adapters(s)]


@pytest.fixture(scope="module")
def made():
    """(engine without adapter, x, dy, bare forward and step microseconds) of the shape at hand; one
    at a time in memory.
    """
    kept: dict = {}

    def get(shape):
        if kept.get("shape") is not shape:
            kept.clear()
            rng = np.random.default_rng(0)
            fan_in = np.prod(shape.weight[:-1])
            weight = rng.standard_normal(shape.weight, np.float32) / np.sqrt(fan_in)
            layer = shape.build(weight.astype(bf16), np.zeros(shape.weight[-1], bf16))
            engine = Engine({"layer": layer})
            x = to_device(rng.standard_normal(shape.x, np.float32).astype(bf16), engine.device)
            y = engine.forward(x)
            dy = to_device(rng.standard_normal(y.shape, np.float32).astype(bf16), engine.device)
            kept.update(shape=shape, engine=engine, x=x, dy=dy)
            kept.update(bare=measure(engine, x, dy) if GPU else None)
        return kept

    return get


def measure(engine, x, dy):
    """(forward, step) device microseconds captured, and wall microseconds eager."""
    runs = (lambda: engine.forward(x)), (lambda: engine.vjp(x)[1](dy))
    return [(timing.device_us(timing.captured(run)), timing.wall_us(run)) for run in runs]


def check(engine, x):
    """The live output against the changed weight's, on the first rows: they differ by roundings
    alone.
    """
    live, merged = (
        np.asarray(to_device(e.forward(x[:1]), "cpu"), np.float64)
        for e in (engine, engine.merged())
    )
    assert np.linalg.norm(live - merged) <= 2.0**-7 * np.linalg.norm(merged)


@pytest.mark.parametrize(("shape", "name"), CASES, ids=[f"{s.name}, {a}" for s, a in CASES])
def test_layer(shape, name, made, benchmark):
    state = made(shape)
    base, x, dy = state["engine"], state["x"], state["dy"]
    adapter = adapters(shape)[name]
    rng = np.random.default_rng(1)
    factors = {
        n: rng.standard_normal(v.shape, np.float32) * 0.05 for n, v in adapter.init(rng).items()
    }
    engine = Engine(base.layers, device=base.device)
    engine.attachments["a"] = Attachment(
        {"layer": (adapter, factors)}, engine.device, engine.dtype, 1.0
    )
    check(engine, x)
    info = benchmark.extra_info
    info.update(shape=shape.name, adapter=name, route=adapter.route, flops=shape.flops)
    if GPU:
        labels = ("forward", "step")
        for label, (device, wall), (bare, bare_wall) in zip(
            labels, measure(engine, x, dy), state["bare"], strict=True
        ):
            info.update({f"{label}_us": device, f"{label}_wall_us": wall, f"bare_{label}_us": bare})
            info.update({f"bare_{label}_wall_us": bare_wall, f"{label}_ratio": device / bare})
        ROWS.append(dict(info))
    benchmark.pedantic(lambda: engine.forward(x), rounds=3, iterations=1, warmup_rounds=1)
    if GPU:
        assert info["forward_ratio"] <= LIMIT and info["step_ratio"] <= LIMIT


ROWS: list[dict] = []


@pytest.fixture(scope="module", autouse=True)
def written():
    """The table, once all is measured."""
    yield
    if not ROWS:
        return
    import cupy

    gpu = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    head = {"gpu": gpu, "driver": cupy.cuda.runtime.driverGetVersion(), "cupy": cupy.__version__}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"layers-{gpu.lower().replace(' ', '-')}.json"
    path.write_text(json.dumps({**head, "rows": ROWS}, indent=1) + "\n")
    print()
    for row in ROWS:
        print(
            f"{row['shape']:28} {row['adapter']:25} {row['route']:9} "
            f"forward {row['bare_forward_us']:7.0f} -> {row['forward_us']:7.0f} us "
            f"({row['forward_ratio']:.2f}x)  "
            f"step {row['bare_step_us']:7.0f} -> {row['step_us']:7.0f} us "
            f"({row['step_ratio']:.2f}x)"
        )
