"""The comparison on the demo's network: the same training here and in torch, the command from end to
end on two steps, and tables and verdicts of results made up here.
"""

import dataclasses
import json
import sys
from importlib.util import find_spec

import numpy as np
import pytest

import benchmarks.restoration as restoration
from benchmarks.environment import environment
from benchmarks.restoration.data import Task
from benchmarks.restoration.methods import FINE_TUNING, METHODS
from benchmarks.restoration.table import OURS, TARGETS, against_torch, page, spread, table
from benchmarks.results import FOLDER
from lycoris_cupy.demo import extra
from lycoris_cupy.losses import mse
from tests.pages import PAGES

installed = all(find_spec(module) for module in extra.PACKAGES)
needs_extra = pytest.mark.skipif(not installed, reason="the extra demo is not installed")
needs_torch = pytest.mark.skipif(
    not (find_spec("torch") and find_spec("lycoris")), reason="the extra peer is not installed"
)
NONE = ("Full", "bypass")  # which lycoris-lora does not have
TASK = {"steps": 4, "patches": 2, "patch": 12, "batches": 3}


@needs_extra
@needs_torch
@pytest.mark.filterwarnings("default")  # of torch and lycoris-lora
@pytest.mark.parametrize(
    "name, way",
    [(name, way) for name in METHODS for way in ("rebuild", "bypass") if (name, way) != NONE],
)
def test_torch_takes_the_same_steps(name, way):
    """From the same factors on the same batches in f32: losses and what was learned are equal up to
    rounding, so that curves on a GPU can be compared.
    """
    from benchmarks.restoration.data import Task, mean_squared_error
    from benchmarks.restoration.methods import ADAPTER
    from benchmarks.restoration.ours import optimizer_of
    from benchmarks.restoration.torch_side import Worker
    from lycoris_cupy.demo.upscaler import build_engine

    told = {"methods": [], "seeds": 1, "device": "cpu", "dtype": "f32", "modes": []}
    worker = Worker({**told, "task": TASK}, float("inf"))
    task, method = Task(**TASK), METHODS[name]
    trainer = worker.trainer(name, 0, way)
    theirs = [float(trainer.step(*pair)) for pair in worker.moved(task.training(0))]
    engine = method.on(build_engine(worker.network, "cpu", "f32"), 0)
    optimizer = optimizer_of(engine, method, task)
    ours = []
    for low, original in task.training(0):
        y, pullback = engine.vjp(low)
        value, dy = mse(y, original)
        _, grads = pullback(dy)
        engine.set_parameters(ADAPTER, optimizer.step(grads[ADAPTER]))
        ours.append(float(value))
    assert ours[-1] < ours[0]
    # Adam divides by the root of the second moment: where a gradient is nearly 0, its sign is noise.
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    after = [mean_squared_error(side, task.validation()[:2]) for side in (engine, trainer)]
    np.testing.assert_allclose(*after, rtol=1e-4)


@needs_extra
def test_batches_are_a_seed_s_own():
    from benchmarks.restoration.data import Task, _pairs

    task = Task(**TASK)
    once, (low, original) = task.training(1), task.training(1)[0]
    _pairs.cache_clear()
    again = Task(**TASK).training(1)
    assert len(once) == 3 and low.shape == (2, 12, 12, 3) and original.shape == (2, 24, 24, 3)
    assert low.dtype == "bfloat16" and original.dtype == np.float32
    same = [
        a.tobytes() == b.tobytes()
        for p, q in zip(once, again, strict=True)
        for a, b in zip(p, q, strict=True)
    ]
    assert all(same)
    others = [*task.training(2), *task.validation()]
    assert all(original.tobytes() != other.tobytes() for _, other in others)


def call(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["restoration", *map(str, words)])
    return restoration.main()


@needs_extra
def test_the_command_trains_times_and_writes(tmp_path, monkeypatch, capsys, device):
    from lycoris_cupy.demo import photographs
    from lycoris_cupy.demo.photographs import read_picture

    monkeypatch.setattr(photographs, "SIZE", 64)
    monkeypatch.setattr(photographs, "HELD_OUT", {"cat": photographs.HELD_OUT["cat"]})
    monkeypatch.setattr("lycoris_cupy.demo.picture.CROP", 32)
    monkeypatch.setattr("benchmarks.restoration.data.VALIDATED", 2)
    words = ("--device", device[:4], "--steps", 2, "--patches", 1, "--cpu-steps", 1)
    out = tmp_path / "new"
    done = call(monkeypatch, "--out", out, "--algorithms", "LoCon", "--seeds", 2, *words)
    printed = capsys.readouterr().out
    assert done == 0, printed
    assert "| gain on held-out photographs, dB | 3.00 |  | " in printed
    data = json.loads((out / "restoration.json").read_text())
    runs = [(row["method"], row["seed"], len(row["losses"])) for row in data["runs"]]
    assert runs == [("LoCon", 0, 2), ("LoCon", 1, 2)]
    assert data["runs"][0]["parameters"] == 87640
    assert data["runs"][0]["loss"] != data["runs"][1]["loss"]
    assert data["runs"][0]["file_bytes"] == (out / "locon.safetensors").stat().st_size
    gpu = [] if device == "cpu" else ["cuda"]
    assert [row["device"] for row in data["timings"]] == [*gpu, "cpu"]
    assert (out / "table.md").read_text() == page(data)
    assert read_picture(out / "crops.png").shape[1] == 5 * 68 - 4
    names = "restoration.json table.md crops.png locon.safetensors"
    assert sorted(path.name for path in out.iterdir()) == sorted(names.split())


@needs_extra
def test_one_side_again_keeps_what_there_is(tmp_path, monkeypatch, capsys):
    """The other side's rows stay, one's are run anew; another task, or nothing there, is refused."""
    from benchmarks.restoration import run

    monkeypatch.setattr(run, "find_spec", lambda name: True)
    row = {"section": "timings", "side": "torch", "method": "LoCon", "error": "no GPU"}
    script = f"print({json.dumps(json.dumps(row))})"
    monkeypatch.setattr(run, "torch_command", lambda job, seconds: [sys.executable, "-c", script])
    words = ("--device", "cpu", "--steps", 1, "--seeds", 1, "--algorithms", "LoCon")
    words += ("--again", "torch")
    assert call(monkeypatch, "--out", tmp_path, *words) == 2
    assert "--again keeps the results of" in capsys.readouterr().err
    head = {
        "gpu": environment()["gpu"],
        "seeds": 1,
        "dtype": "bf16",
        "commit": "as it was",
        "log_every": 1,
    }
    task = dataclasses.asdict(Task(1, 16, rate_factor=1.0))
    versions = {"version": "2.11", "lycoris_lora": "4.1.3"}
    own = {"side": OURS, "method": "LoCon", "error": "kept"}
    old = {"side": "torch", "method": "LoCon", "error": "old", **versions}
    other = {"side": "torch", "method": "LoHa", "error": "not run again", **versions}
    path = tmp_path / "restoration.json"
    rows = {"runs": [own, old, other], "timings": [old]}
    kept = {
        "before": {"cat": 1.0},
        "cpu": {"name": "a processor", "cores": 2},
        "torch_backend": "torch",
    }
    path.write_text(json.dumps({**head, "task": task, **kept, **rows}))
    call(monkeypatch, "--out", tmp_path, *words)
    data = json.loads(path.read_text())
    assert data["runs"] == [own, other] and data["commit"] == "as it was"
    assert [r["error"] for r in data["timings"]] == ["no GPU"]
    assert call(monkeypatch, "--out", tmp_path, *words[:3], 2, *words[4:]) == 2
    assert "was measured with task" in capsys.readouterr().err
    found = {**data, "runs": [own, old, other], "timings": [old]}
    path.write_text(json.dumps(found))
    anew = run._kept(path, {**head, "task": task, "commit": "new"}, "project", ["LoCon"])
    assert anew["runs"] == [old, other] and anew["timings"] == [old] and anew["commit"] == "new"


@needs_extra
def test_what_fails_or_comes_too_late_is_kept(tmp_path, monkeypatch, capsys):
    from benchmarks.restoration import run
    from lycoris_cupy.demo import photographs

    def broken(*_):
        raise ValueError("no such luck")

    monkeypatch.setattr(photographs, "SIZE", 32)
    monkeypatch.setattr(run, "trained", broken)
    words = ("--device", "cpu", "--steps", 1, "--seeds", 1, "--algorithms", "LoCon")
    for extra_words, message in (((), "ValueError: no such luck"), (("--seconds", 0), "not run")):
        assert call(monkeypatch, "--out", tmp_path, "--cpu-steps", 0, *words, *extra_words) == 1
        data = json.loads((tmp_path / "restoration.json").read_text())
        assert message in data["runs"][0]["error"]
        assert f"LoCon: {data['runs'][0]['error']}" in capsys.readouterr().out


@needs_extra
def test_what_torch_s_process_says_is_kept_also_when_it_dies(tmp_path, monkeypatch, capsys):
    from benchmarks.restoration import run
    from lycoris_cupy.demo import photographs

    rows = [
        {"section": "timings", "method": "LoCon", "error": "RuntimeError: waits for the device"},
        {"section": "runs", "method": "LoCon", "seed": 0, "loss": 0.5, "decibels": {"cat": 9.0}},
    ]
    rows[1] |= {"train_seconds": 1.0, "version": "2", "lycoris_lora": "4.1.3", "parameters": 1}
    lines = "".join(json.dumps({"side": "torch", "mode": "eager", **row}) + "\n" for row in rows)
    script = f"import sys; sys.stdout.write({lines!r}); open(sys.argv[1]).read(); sys.exit(3)"
    command = [sys.executable, "-c", script]
    monkeypatch.setattr(run, "torch_command", lambda job, seconds: [*command, str(job)])
    monkeypatch.setattr(run, "find_spec", lambda name: True)
    monkeypatch.setattr(run, "_ours", lambda session: {})
    monkeypatch.setattr(photographs, "SIZE", 32)
    words = ("--device", "cpu", "--steps", 1, "--seeds", 1, "--algorithms", "LoCon")
    assert call(monkeypatch, "--out", tmp_path, "--torch", *words) == 1
    data = json.loads((tmp_path / "restoration.json").read_text())
    assert data["timings"][0]["error"] == "RuntimeError: waits for the device"
    assert data["runs"][0]["loss"] == 0.5
    printed = capsys.readouterr().out
    assert "torch LoCon eager: seed 0, loss 0.500000, 9.00 dB" in printed
    assert "the process of torch ended with status 3" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["restoration.json", "table.md"]


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ("--algorithms", "LoCon,LoRa"),
            "--algorithms: 'LoRa' is unknown: use LoCon, LoCon Tucker",
        ),
        (("--steps", 0), "--steps is 0, expected at least 1"),
        (("--rate-factor", 0), "--rate-factor is 0.0, expected a number above 0"),
        (("--torch-modes", "jit"), "--torch-modes: 'jit' is unknown: use eager, graph, compiled"),
    ],
)
def test_wrong_options_are_refused(words, message, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, "--out", tmp_path, *words)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_a_missing_torch_is_said(tmp_path, monkeypatch, capsys):
    from benchmarks.restoration import run

    monkeypatch.setattr(run, "find_spec", lambda name: None)
    assert call(monkeypatch, "--out", tmp_path, "--torch") == 2
    assert "error: --torch needs torch, lycoris: install the extra" in capsys.readouterr().err


def measured(**changes):
    """Two of the methods and full fine-tuning, by both sides; changes: of the project's LoCon."""
    data = {
        "gpu": "A GPU", "cpu": {"name": "a CPU", "cores": 2}, "seeds": 3, "dtype": "bf16",
        "torch_backend": "torch", "before": {"a": 15.0, "b": 16.0}, "runs": [], "timings": [],
        "task": {"steps": 9, "patches": 2, "patch": 32, "batches": 5},
    }  # fmt: skip
    for side, best in (("lycoris_cupy", 30.0), ("torch", 30.1)):
        for method in ("LoCon", "Full", *([FINE_TUNING] if side == "torch" else [])):
            own = changes if (side, method) == ("lycoris_cupy", "LoCon") else {}
            for seed in range(3):
                loss = 1e-3 + seed * 1e-5 + own.get("loss", 0)
                reached = own.get("reached", best + (method != "LoCon"))
                row = {
                    "side": side,
                    "method": method,
                    "seed": seed,
                    "loss": loss,
                    "parameters": 1234,
                }
                row |= {
                    "decibels": {"a": reached - 1, "b": reached + 1},
                    "version": "2",
                    "lycoris_lora": "4.1.3",
                }
                data["runs"].append(row | ({"file_bytes": 2600} if side != "torch" else {}))
            for mode, us in (("graph", 1000.0), ("eager", 9000.0)):
                if side == "torch":
                    row = {
                        "side": side,
                        "method": method,
                        "device": "cuda",
                        "way": "bypass",
                        "mode": mode,
                    }
                    data["timings"].append(
                        {**row, "device_us": us, "wall_us": us + 100, "steps_per_second": 900}
                    )
            if side != "torch":
                us = own.get("us", 800.0)
                row = {"side": side, "method": method, "way": ""}
                data["timings"] += [
                    {
                        **row,
                        "device": "cuda",
                        "mode": "graph",
                        "device_us": us,
                        "wall_us": us + 9,
                        "steps_per_second": 1234.5,
                    },
                    {**row, "device": "cpu", "mode": "eager", "wall_us": 5e5},
                ]
    data["runs"].append({**data["runs"][-1], "method": "LoCon", "error": "no"})
    return data


def test_the_tables_show_means_and_what_full_fine_tuning_reaches():
    lines = table(measured()).splitlines()
    assert (
        lines[2]
        == "| LoCon | 1,234 | 3 | 15.50 | 30.00 | +14.50 | -1.10 | 500 | 0.80; 0.81 | 1234 |"
    )
    assert (
        lines[-1]
        == "| full fine-tuning, torch | 1,234 |  | 15.50 | 31.10 | +15.60 | +0.00 |  | 1.00; 1.10 | 900 |"
    )
    rows = against_torch(measured()).splitlines()
    assert (
        rows[2]
        == "| LoCon | 1.0100 | 1.0100 | 0.0200 | 0.80; 0.81 | 1.00; 1.10 (bypass) | 9.00; 9.10 (bypass) |  |"
    )
    assert "torch 2, lycoris-lora 4.1.3" in page(measured())
    alone = measured()
    alone["runs"] = [row for row in alone["runs"] if row["side"] != "torch"]
    assert against_torch(alone) == ""
    assert "| +14.50 | -1.00 |" in table(alone)  # then it is the project's Full


@pytest.mark.parametrize(
    "changes, what, mark, value",
    [
        ({}, "gain", "6 of 15 measured", "14.50"),
        ({"reached": 18.4}, "gain", "MISSED", "2.90"),
        ({}, "distance", "2 of 5 measured", "0.00"),
        ({"loss": 2.1e-5}, "distance", "MISSED", "1.05"),
        ({"loss": -2.1e-5}, "distance", "MISSED", "1.05"),
        ({}, "GPU step over torch's fastest, device", "2 of 5 measured", "0.80"),
        ({"us": 1001.0}, "GPU step over torch's fastest, device", "MISSED", "1.00"),
        ({"us": 1095.0}, "GPU step over torch's fastest, wall", "MISSED", "1.00"),
    ],
)
def test_a_target_that_is_missed_is_said_to_be(changes, what, mark, value):
    (target,) = [t for t in TARGETS if t.what.startswith(what)]
    assert target.judged(measured(**changes))[:2] == (mark, value)


def test_the_spread_is_the_wider_side_s():
    a, b = ([{"loss": loss} for loss in losses] for losses in ((1.0, 2.0), (5.0, 5.5)))
    assert spread(a, b) == 1.0 and spread(b) == 0.5


@pytest.mark.parametrize("path", sorted(FOLDER.glob("restoration-*.json")), ids=lambda p: p.stem)
def test_a_page_shows_the_measured_tables(path):
    data = json.loads(path.read_text())
    text = "\n".join(PAGES.values())
    assert table(data) in text and against_torch(data) in text
