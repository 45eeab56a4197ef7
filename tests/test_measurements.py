"""What is made of a measurement: tables, verdicts on the targets, the chart, the files of a session."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_session
from benchmarks.results import Results
from benchmarks.table import bare, full, peer_best, table
from benchmarks.targets import TARGETS, Target, targets

ROOT = Path(__file__).resolve().parent.parent


def _measured(**changes):
    """A small measurement: two layers, a peer of two modes and one that failed."""
    names = ("linear 4608 x 3072 -> 3072", "conv 4x64x64 640 k3")
    row = {
        "adapter": "LoRA r16", "route": "low rank", "bare_forward_us": 100.0,
        "bare_step_us": 200.0, "forward_us": 105.0, "step_us": 230.0, "forward_ratio": 1.05,
        "step_ratio": 1.15, "forward_wall_us": 107.0, "step_wall_us": 233.0,
        "forward_warm_us": 104.0, "step_warm_us": 229.0, "step_bytes": 99, "bare_step_bytes": 90,
        "step_bytes_allowed": 100, "ulp": {"y": {"max": 1.0, "rms": 0.3}},
        "ulp_composed": {"y": {"max": 1.5, "rms": 0.4}},
    }  # fmt: skip
    peer = {"adapter": "LoRA r16", "peer": "lycoris-lora", "version": "4.1.3"}
    peers = [
        {"mode": "bypass, fused", "forward_us": 170.0, "step_us": 500.0},
        {"mode": "bypass, compiled", "forward_us": 180.0, "step_us": 400.0},
        {"mode": "rebuild, fused", "error": "RuntimeError: no"},
    ]
    own, cudnn = ({"forward_us": us, "step_us": 2 * us} for us in (110.0, 100.0))
    return {
        "gpu": "A GPU",
        "rows": [{"shape": name, **row, **changes} for name in names],
        "bare": [{"shape": names[1], "times": {"own": own, "cudnn": cudnn}}],
        "peers": [{"shape": names[0], **peer, **mode} for mode in peers],
        "weights": [
            {"shape": "linear 3072 -> 12288", "adapter": "LoRA r16", "us": 50.0, "gb_s": 3000.0,
             "copy_share": 0.9, "ulp": {"max": 0.5, "rms": 0.2, "weight_mib": 72.0}},
        ],
    }  # fmt: skip


def test_the_table_shows_the_peers_best_beside():
    lines = table(_measured()).splitlines()
    assert lines[0] == "| layer | bare, us: forward; step | LoRA r16 | peers |"
    assert lines[2] == "| linear 4608 x 3072 -> 3072 | 100; 200 | 1.05; 1.15 | 1.70; 2.00 |"
    assert lines[3] == "| conv 4x64x64 640 k3 | 100; 200 | 1.05; 1.15 |  |"
    best = peer_best(_measured(), "linear 4608 x 3072 -> 3072", "LoRA r16")
    assert (best["forward"]["mode"], best["step"]["mode"]) == ("bypass, fused", "bypass, compiled")
    assert "| 105; 230 | 1.05; 1.15 |" in full(_measured())
    assert "| conv 4x64x64 640 k3 |  | 100; 200 | 110; 220 |  |" in bare(_measured())


def _verdict(data, what):
    (target,) = [t for t in TARGETS if t.what.startswith(what)]
    return target.judged(data)


@pytest.mark.parametrize(
    ("changes", "what", "mark", "value"),
    [
        ({}, "LoRA r16, r64, linear, 4608 tokens and more: forward", "1 of 6 measured", "1.05"),
        ({"forward_ratio": 1.151}, "LoRA r16, r64, linear, 4608 tokens and more: forward", "MISSED", "1.15"),
        ({"step_ratio": 1.41}, "LoCon r16, LoCon Tucker r16, 3x3: step", "MISSED", "1.41"),
        ({}, "LoKr factor 8, w2 full", "not measured", ""),
        ({"forward_us": 171.0}, "time over the peers'", "MISSED", "1.01"),
        ({"step_wall_us": 300.0}, "wall over device", "MISSED", "1.30"),
        ({"step_bytes": 101}, "peak memory", "MISSED", "1.010"),
        ({"ulp": {"y": {"max": 9.0, "rms": 0.41}}}, "error (rms ULP)", "MISSED", "1.025"),
    ],
)  # fmt: skip
def test_a_target_that_is_missed_is_said_to_be(changes, what, mark, value):
    data = _measured(**changes)
    if what.startswith("LoKr"):
        targets_of = [t for t in TARGETS if t.what.startswith(what)]
        assert {t.judged(data)[0] for t in targets_of} == {mark}
        return
    assert _verdict(data, what)[:2] == (mark, value)


def test_a_target_that_is_met():
    def value(number):
        return Target("x", 1.15, 1.06, lambda data: iter([(1.0, "a"), (number, "b")]), 2).judged({})

    assert value(1.06) == ("aim met", "1.06", "b")
    assert value(1.10) == ("met", "1.10", "b")
    assert value(1.16) == ("MISSED", "1.16", "b")
    share = Target("x", 0.8, None, lambda data: iter([(0.9, "a")]), 2, most=False, form=".0%")
    assert share.judged({}) == ("1 of 2 measured", "90%", "a")
    assert _verdict(_measured(), "own bare 3x3")[:2] == ("1 of 3 measured", "1.10")
    slow = _measured()
    slow["weights"][0]["copy_share"] = 0.79
    assert _verdict(slow, "weight builders")[:2] == ("MISSED", "79%")
    assert len(targets(_measured()).splitlines()) == 2 + len(TARGETS)


def test_the_command_prints_and_draws(tmp_path):
    path, chart = tmp_path / "layers.json", tmp_path / "chart.png"
    path.write_text(json.dumps(_measured()))

    def call(*words):
        command = [sys.executable, "-m", "benchmarks.table", *map(str, words)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    done = call("--full", path)
    assert done.returncode == 0 and done.stdout.startswith("A GPU, lycoris-lora 4.1.3\n\n| layer")
    assert "| linear 3072 -> 12288 | LoRA r16 | 50 | 3000 | 90% | 0.50 |" in done.stdout
    done = call("--chart", chart, path)
    assert done.returncode == 0, done.stderr
    assert chart.read_bytes().startswith(b"\x89PNG") and chart.stat().st_size > 10_000
    done = call(tmp_path / "none.json")
    assert done.returncode == 2 and "none.json is not a file" in done.stderr


def test_results_are_kept_row_by_row(tmp_path):
    results = Results(tmp_path / "deep" / "r.json", {"gpu": ""})
    results.add("rows", {"us": 1 / 3})
    results.put("ceilings", {"copy_gb_s": 3e3})
    kept = json.loads((tmp_path / "deep" / "r.json").read_text())
    assert kept["rows"] == [{"us": 0.33333}] and kept["ceilings"] == {"copy_gb_s": 3e3}
    assert not list((tmp_path / "deep").glob("*.part"))


@pytest.mark.filterwarnings("default")  # matplotlib's own, of other packages
def test_a_stage_that_runs_out_of_time_is_ended(tmp_path):
    log = tmp_path / "log"
    begun = "import time; print('FAILED begun', flush=True); time.sleep(60)"
    assert gpu_session.stage([sys.executable, "-c", begun], log, 1.5) is None
    told = gpu_session.told("suite", None, log)
    assert told == "suite: ended: out of time\nFAILED begun\nFAILED begun"
    assert gpu_session.stage([sys.executable, "-c", "print('3 passed')"], log, 60) == 0
    assert gpu_session.told("suite", 0, log) == "suite: exit status 0\n3 passed"
    (tmp_path / "layers.json").write_text(json.dumps(_measured()))
    gpu_session.report(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"log", "layers.json", "table.md", "chart.png"}
