"""The record of a GPU run: it must not be possible to have one without a GPU, or to keep one past a change."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lycoris_cupy.arrays import gpu_missing
from tests import gpu_evidence

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(not gpu_missing(), reason="there is a GPU here")
def test_require_gpu_fails_without_one():
    command = [sys.executable, "-m", "pytest", "--require-gpu", "-n", "0", "tests/test_evidence.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 4
    assert "--require-gpu was given, but CuPy" in done.stderr


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        ({}, 0, "VALID: 7 GPU rows passed on A GPU"),
        ({"sources_sha256": "0" * 64}, 1, "STALE"),
        ({"exit_status": 1}, 1, "FAILED"),
        ({"counts": {"failed": 1, "error": 0}}, 1, "FAILED"),
        (None, 1, "there is no record"),
    ],
)
def test_what_a_record_says(tmp_path, monkeypatch, capsys, change, code, says):
    path = ROOT / "benchmarks" / "results" / "none.json" if change is None else tmp_path / "r.json"
    monkeypatch.setattr(gpu_evidence, "RECORD", path)
    data = {
        "gpu": "A GPU",
        "gpu_rows_passed": 7,
        "exit_status": 0,
        "counts": {"failed": 0, "error": 0},
        "sources_sha256": gpu_evidence.fingerprint(),
    }
    if change is not None:
        path.write_text(json.dumps(data | change))
    assert gpu_evidence.main() == code
    assert says in capsys.readouterr().out


def test_the_fingerprint_follows_names_and_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_evidence, "ROOT", tmp_path)
    (tmp_path / "cuda_src").mkdir()
    seen = set()
    for name, text in (("a.cu", "1"), ("a.cu", "2"), ("b.cu", "2"), ("c.cuh", "2")):
        (tmp_path / "cuda_src" / name).write_text(text)
        seen.add(gpu_evidence.fingerprint())
    assert len(seen) == 4
