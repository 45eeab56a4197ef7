"""What an adapter costs: forward and step of each algorithm on each shape, over the bare layer's.

    python -m pytest benchmarks --benchmark-enable -n 0

Every benchmark asserts its result against f64 and holds in `extra_info` (and in the results file):
device, warm and wall microseconds, bytes, FLOPs, the share of the roofline, errors in ULP, memory.
Without a GPU NumPy is timed on smaller shapes.
"""

from __future__ import annotations

import pytest

from lycoris_cupy.arrays import gpu_missing

from . import plain, timing
from .adapters import adapters
from .floors import COPY_GB_S, PRODUCT_TFLOP_S, floors, step_memory
from .shapes import CPU_SHAPES, SHAPES

GPU = not gpu_missing()
CASES = [(s, a) for s in (SHAPES if GPU else CPU_SHAPES) for a in adapters(s.layer)]


@pytest.mark.parametrize(("shape", "name"), CASES, ids=[f"{s.name}, {a}" for s, a in CASES])
def test_layer(shape, name, cases, results, benchmark):
    case, bare = cases(shape)
    group = adapters(shape.layer)[name]
    engine = case.adapted(group)
    engine.warmup(case.x)  # compiles in threads
    expected = case.expected(engine, group)
    runs = case.runs(engine)
    row = {"shape": shape.name, "adapter": name, "route": ", ".join(a.route for a in group)}
    row.update(_errors(case, expected, runs, "ulp"))
    row["ulp_composed"] = expected["composed"]
    row.update(case.measure(runs, bare.yardstick))
    if GPU:  # as people call it: the input is checked and copied into the graph's
        call = engine.capture(case.x)
        row["capture_wall_us"] = timing.wall_us(lambda: call(case.x), True)
    row.update(_peaks(case, bare, group, runs))
    row.update(_merged(case, engine, expected))
    if GPU and shape.kind == "linear" and name.startswith("LoRA r") and len(group) == 1:
        composed = plain.composition(case, engine)
        row.update(_errors(case, expected, composed, "ulp_plain"))
        row.update({f"plain_{k}": v for k, v in case.measure(composed).items()})
    row.update(_costs(shape, group, row, results.data.get("ceilings", {})))
    benchmark.extra_info.update(row)
    for key, value in results.data.items():
        if isinstance(value, str):  # GPU, versions, commit
            benchmark.extra_info[key] = value
    run = timing.captured(runs["forward"]) if GPU else runs["forward"]
    benchmark.pedantic(
        lambda: (run(), timing.synchronize(GPU)), rounds=3, iterations=1, warmup_rounds=1
    )
    results.add("rows", row)


def _errors(case, expected, runs, name: str) -> dict:
    y, (dx, grads) = runs["step"]()
    return {name: case.errors(expected, y, dx, grads)}


def _peaks(case, bare, group, runs) -> dict:
    own = timing.peak_bytes(case.runs(case.engine)["step"], case.gpu)
    return {
        "bare_step_bytes": own,
        "step_bytes": timing.peak_bytes(runs["step"], case.gpu),
        "step_bytes_allowed": step_memory(case.shape, group, own),
    }


def _merged(case, engine, expected) -> dict:
    """The forward of the merged engine, whose weight is rounded: checked more loosely than a route,
    since W + dW loses up to half a unit of every weight.
    """
    merged = engine.merged()
    error = case.errors({"y": expected["y"], "dx": expected["dx"]}, *_y_dx(case, merged), None)
    found = case.measure({"forward": lambda: merged.forward(case.x)})
    return {
        "merged_forward_us": found["forward_us"],
        "ulp_merged": error,
    }


def _y_dx(case, engine):
    y, (dx, _) = case.runs(engine)["step"]()
    return y, dx


def _costs(shape, group, row, ceilings) -> dict:
    """FLOPs, bytes, ratios over the bare layer, and the share of the roofline."""
    out = {}
    peaks = ceilings.get("product_tflop_s", PRODUCT_TFLOP_S), ceilings.get("copy_gb_s", COPY_GB_S)
    for label, floor in floors(shape, group).items():
        out[f"{label}_flops"], out[f"{label}_bytes_moved"] = floor.flops, floor.bytes
        out[f"{label}_ratio"] = row[f"{label}_us"] / row[f"bare_{label}_us"]
        if GPU:
            out[f"{label}_roofline"] = floor.us(*peaks) / row[f"{label}_us"]
    return out
