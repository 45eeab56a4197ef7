"""The benchmark kit: its references, its counts, and what it tells the peers' processes and takes
from them.
"""

import json
import sys
import time

import numpy as np
import pytest

from benchmarks import composed, floors, reference, test_optimizer, timing
from benchmarks.adapters import adapters
from benchmarks.bare import Bare
from benchmarks.case import Case
from benchmarks.peers import job, run
from benchmarks.shapes import SHAPES, Shape
from benchmarks.table import optimizers
from benchmarks.test_peers import Clock
from benchmarks.ulp import ulp, worst
from lycoris_cupy import Engine, LoCon, bf16
from lycoris_cupy.attachment import Attachment

SMALL = Shape("conv 2x5x4 40 -> 48 k3", (3, 3, 40, 48), (2, 5, 4, 40), {"padding": 1})
LINE = Shape("linear 6 x 48 -> 80", (48, 80), (6, 48))
CELLS = [(s, name) for s in (SMALL, LINE) for name in adapters(s.layer)]


def test_a_unit_of_the_last_place():
    right = np.array([1.0, -1.5, 256.0, 0.0])
    off = ulp(right + np.array([2.0**-7, 0, 0, 0]), right)
    # The unit of all but 256 is that of the root mean square, 128: 1 whole.
    assert off["max"] == 2.0**-7
    assert ulp(right * np.array([1, 1, 1 + 2.0**-8, 1]), right)["max"] == 0.5
    assert worst([{"max": 1.0, "rms": 0.5}, {"max": 0.5, "rms": 0.7}]) == {"max": 1.0, "rms": 0.7}
    values = np.random.default_rng(0).standard_normal(20_000)
    assert 0.2 < ulp(values.astype(bf16), values)["rms"] < 0.29


@pytest.mark.parametrize(("shape", "name"), CELLS, ids=[f"{s.name}, {a}" for s, a in CELLS])
def test_the_reference_is_what_an_f64_engine_gives(shape, name):
    """Written from the formulas, it agrees with the package to f64's last places, gradients too."""
    group, host = adapters(shape.layer)[name], {n: v.astype(float) for n, v in shape.data().items()}
    engine = Engine(
        {"layer": shape.build(host["weight"], host["bias"])}, device="cpu", dtype=np.float64
    )
    rng = np.random.default_rng(3)
    for i, adapter in enumerate(group):
        made = {n: rng.standard_normal(v.shape) for n, v in adapter.init(rng).items()}
        engine.attachments[f"a{i}"] = Attachment({"layer": (adapter, made)}, "cpu", np.float64, 1.0)
    y, pullback = engine.vjp(host["x"])
    _, grads = pullback(host["dy"])
    window = shape.layer.window
    dw = reference.weight_gradient(host["x"], host["dy"], window)
    change = 0.0
    for i, adapter in enumerate(group):
        p = engine.parameters(f"a{i}")["layer"]
        change = change + reference.delta(adapter, p)
        for factor, right in reference.gradients(adapter, p, dw).items():
            np.testing.assert_allclose(grads[f"a{i}"]["layer"][factor], right, rtol=1e-9, atol=1e-9)
    merged = host["weight"].reshape(change.shape) + change
    np.testing.assert_allclose(
        engine.merged().layers["layer"].matrix, merged, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("shape", [SMALL, LINE], ids=lambda s: s.name)
def test_a_case_knows_right_from_wrong(shape):
    case = Case(shape, "cpu")
    assert Bare(case).by == {"forward": "own", "step": "own"}  # no library stands beside NumPy
    for group in adapters(shape.layer).values():
        engine = case.adapted(group)
        expected = case.expected(engine, group)
        y, (dx, grads) = case.runs(engine)["step"]()
        errors = case.errors(expected, y, dx, grads)
        assert 0.1 < errors["y"]["rms"] < 0.6
        # A route rounds once less than the composition does.
        for what, composition in expected["composed"].items():
            assert errors[what]["rms"] < 1.15 * composition["rms"], what
    off = y.copy()
    off[..., 0] += 1
    with pytest.raises(AssertionError, match="y is .* ULP from f64"):
        case.errors(expected, off, dx, grads)
    swapped = {"a0": grads["a0"], "a1": {"layer": {n: -g for n, g in grads["a1"]["layer"].items()}}}
    with pytest.raises(AssertionError, match="grads is .* ULP from f64"):
        case.errors(expected, y, dx, swapped)


def test_the_composition_without_roundings_is_the_reference(monkeypatch):
    monkeypatch.setattr(composed, "_rounded", lambda a: a)
    for shape in (SMALL, LINE):
        case = Case(shape, "cpu")
        for group in adapters(shape.layer).values():
            engine = case.adapted(group)
            for i, adapter in enumerate(group):
                p = engine.parameters(f"a{i}")["layer"]
                delta = reference.delta(adapter, p)
                right = np.tensordot(case.x_patches, delta, axes=((1, 2), (0, 1)))
                np.testing.assert_allclose(
                    composed.change(adapter, p, case.x_patches), right, rtol=1e-9, atol=1e-12
                )
                right = np.tensordot(case.dy_patches, delta, axes=((1, 2), (0, 2)))
                back = composed.change(adapter, p, case.dy_patches, mirrored=True)
                np.testing.assert_allclose(back, right, rtol=1e-9, atol=1e-12)


def test_the_change_is_half_the_output():
    case = Case(LINE, "cpu")
    for name, group in adapters(LINE.layer).items():
        change = case.expected(case.adapted(group), group)["y"] - case.base_y
        share = np.sqrt((change**2).mean() / (case.base_y**2).mean())
        assert 0.3 < share < 0.8, name


def test_floors():
    shape = Shape("linear 8 x 100 -> 200", (100, 200), (8, 100))
    group = (LoCon(shape.layer, 16, 16.0),)
    both = floors.floors(shape, group)
    product, thin = 2 * 8 * 100 * 200, 2 * 8 * 16 * (100 + 200)
    assert both["forward"].flops == product + thin
    assert both["step"].flops == 2 * product + 3 * thin
    factors = 16 * (100 + 200)
    moved = 2 * (100 * 200 + 8 * 100 + 8 * 200 + 200 + factors)
    assert both["forward"].bytes == moved
    # dy, the weight and x again, dx written; the factors read, their gradients written in f32.
    backward = 2 * (8 * 200 + 100 * 200 + 8 * 100 + 8 * 100) + 6 * factors
    assert both["step"].bytes == moved + backward
    assert both["step"].us(1.0, 1.0) == max(both["step"].flops / 1e6, both["step"].bytes / 1e3)
    allowed = floors.step_memory(shape, group, 1000)
    assert allowed == 1000 + 4 * factors + 2 * 8 * 16 * 2 + 64 * 512
    lines = floors.table().splitlines()
    assert len(lines) == 2 + sum(1 + len(adapters(s.layer)) for s in SHAPES)


def test_peak_bytes_counts_what_is_held_at_once():
    def run():
        for _ in range(3):
            kept = np.ones(1 << 20, np.uint8) + np.ones(1 << 20, np.uint8)
        return kept[:1].copy()

    assert 3 << 20 <= timing.peak_bytes(run, gpu=False) < (4 << 20) + 10_000


def test_a_job_says_all_a_peer_needs(tmp_path):
    told = job.describe(SMALL, "cpu")
    assert json.loads(json.dumps(told)) == told
    assert told["files"] is None and told["kernel"] == [3, 3] and told["padding"] == 1
    assert {a["name"]: a["algorithm"] for a in told["adapters"]}["LoCon Tucker r16"] == "locon"
    names = [a["name"] for a in told["adapters"]]
    assert names == sorted(names, key=job.MEASURED.index)
    path = job.write(Case(SMALL, "cpu"), tmp_path, ("LoRA r16", "LoKr factor 8"))
    told = json.loads(path.read_text())
    assert [a["keys"] for a in told["adapters"]] == [
        ["lora_down.weight", "lora_up.weight"], ["lokr_w1", "lokr_w2"],
    ]  # fmt: skip
    load = {p.stem: np.load(p) for p in tmp_path.glob("*.npy")}
    assert load["weight"].shape == (48, 40, 3, 3) and load["weight"].dtype == np.uint16
    assert load["0.lora_down.weight"].shape == load["0.lora_down.weight.grad"].shape
    assert load["0.lora_down.weight"].shape == (16, 40, 3, 3)
    assert load["1.lokr_w1"].shape == (6, 5) and load["1.lokr_w2.grad"].dtype == np.float64
    assert load["0.y"].shape == (len(load["at"]), 48) and load["0.dx"].shape == (
        len(load["at"]),
        40,
    )


FAKE = """#!{python}
import json, sys, time
assert sys.argv[1:4] == ["-m", "benchmarks.peers.worker", "--job"]
told = json.load(open(sys.argv[4]))
for adapter in told["adapters"]:
    print(json.dumps({{"shape": told["shape"], "adapter": adapter["name"], "forward_us": 1.0}}), flush=True)
print('{{"cut off', flush=True)
{end}
"""


@pytest.mark.parametrize(
    ("end", "says"),
    [
        ("", None),
        ("sys.exit(3)", "ended with status 3"),
        ("time.sleep(60)", "ended: it took too long"),
    ],
)
def test_a_process_that_ends_early_leaves_its_rows(tmp_path, monkeypatch, end, says):
    monkeypatch.setattr(run, "GRACE", 1.0)
    python = tmp_path / "python"
    python.write_text(FAKE.format(python=sys.executable, end=end))
    python.chmod(0o755)
    rows = run.measure(Case(LINE, "cpu"), 1.0, ("LoRA r16", "LoHa r16"), str(python))
    assert [r["adapter"] for r in rows[:2]] == ["LoRA r16", "LoHa r16"]
    assert [r.get("error") for r in rows[2:]] == ([] if says is None else [says])


def test_what_is_warm_is_not_warmed_again(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "WARMED", tmp_path / "warmed.json")
    started, codes = [], {"LoRA r16": 0, "LoHa r16": 3}

    def start(command, environment, out, seconds):
        name = command[command.index("--only") + 1]
        started.append(name)
        assert "--warm" in command and environment["LYCORIS_KERNEL_CACHE_DIR"] and seconds <= 60
        return codes.get(name)  # None: ended

    monkeypatch.setattr(run, "_start", start)
    names = [a["name"] for a in job.describe(LINE, "cpu")["adapters"]]
    assert run.warm([LINE], "cpu", 60.0) == 1 and sorted(started) == sorted(names)
    started.clear()
    assert run.warm([LINE], "cpu", 60.0) == 0 and sorted(started) == sorted(names[1:])
    started.clear()
    assert run.warm([LINE], "cpu", 5.0) == 0 and not started  # no time for a process


def test_time_for_the_peers_is_shared_out(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = Clock(90.0, 3)
    assert clock.part() == 30.0
    now[0] += 10  # what a shape does not need is for the others
    assert clock.part() == 40.0
    now[0] += 100
    assert clock.part() == 0.0


@pytest.mark.skipif(bool(run.missing()), reason="the extra peer is not installed")
def test_the_peers_give_what_the_project_gives():
    rows = run.measure(Case(LINE, "cpu"), 60.0, ("LoRA r16", "LoKr factor 8"))
    ended = [r["error"] for r in rows if "mode" not in r]
    if any("too long" in why for why in ended):
        pytest.skip("the peers had too little of this machine to finish")
    assert not ended, ended
    cells = {(r["adapter"], r["peer"], r["mode"]): r for r in rows}
    assert cells["none", "torch", "eager"]["step_us"] > 0
    for cell in (
        ("LoRA r16", "lycoris-lora", "bypass, torch"),
        ("LoRA r16", "peft", "eager"),
        ("LoKr factor 8", "lycoris-lora", "rebuild, torch"),
    ):
        assert cells[cell]["ulp"]["y"]["max"] < 8 and cells[cell]["step_us"] > 0, cells[cell]
    assert all("forward_us" in row or "error" in row for row in rows)  # none is hidden


def test_the_table_of_optimizers():
    rows = [
        {"optimizer": "AdamW", "us": 500.0, "wall_us": 900.0, "gb_s": 2500.0, "copy_share": 0.9},
        {"optimizer": "torch", "step_and_copy_us": 700.0, "step_and_copy_wall_us": 4000.0},
        {"optimizer": "SGD", "wall_us": 40.0, "gb_s": 3.0},
    ]
    assert optimizers({"optimizers": rows}).splitlines()[2:] == [
        "| AdamW | 500 | 900 | 2500 | 90% |",
        "| torch | 700 | 4000 |  |  |",
        "| SGD |  | 40 | 3 |  |",
    ]
    assert optimizers({}) == ""


def test_the_factors_of_an_optimizer_benchmark():
    found = test_optimizer.shapes()
    layers = 700 if test_optimizer.GPU else 70
    assert len(found) == layers and all(set(p) == {"down", "up"} for p in found.values())
    assert {p["down"][1] for p in found.values()} == {test_optimizer.RANK}
