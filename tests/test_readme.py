"""What the README says is true: its code runs, its commands run, its table is the tests' table."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks.table import table
from tests import support_table

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
SHELL = [
    line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()
]


def test_code_and_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(PYTHON) == 2
    scope: dict = {}
    for block in PYTHON:
        exec(compile(block, "README.md", "exec"), scope)  # the second goes on where the first ends
    layers = scope["layers"]
    model = {
        "conv_in.weight": np.ascontiguousarray(layers["conv_in"].weight.transpose(3, 2, 0, 1)),
        "proj.weight": np.ascontiguousarray(layers["proj"].weight.T),
        "proj.bias": layers["proj"].bias,
    }
    save_file(model, "model.safetensors")
    commands = [line for line in SHELL if line.startswith("lycoris-cupy")]
    assert len(commands) == 3
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", "lycoris_cupy", *command.split()[1:]],
            env={
                **os.environ,
                "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            },
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "merged.safetensors").exists()


def test_the_two_commands_are_what_ci_runs():
    install = [line for line in SHELL if "pip install" in line]
    assert install == [
        'python -m pip install -e ".[cuda12,demo]" && lycoris-cupy demo',
        'python -m pip install -e ".[cuda12,test]" && python -m pytest',
    ]


def test_the_support_table_is_the_generated_one():
    assert support_table.placed(README) == README, "run python -m tests.support_table --write"
    assert not support_table.untested()


def test_the_support_table_follows_the_tests(monkeypatch):
    """A case that is taken out of a table of the tests is taken out of the README's."""
    assert "| `locon` | LFTMS | LFTMS | LFTMS | LFTMS | LFTMS | LFTMS | - |" in README
    fewer = [pair for pair in support_table.PAIRS if pair[0].name != "conv1x1"]
    monkeypatch.setattr(support_table, "PAIRS", fewer)
    assert "| `locon` | LFTMS | - | LFTMS" in support_table.table()
    with pytest.raises(SystemExit, match="expected one"):
        support_table.placed("no markers")


def test_paths_in_the_readme_exist():
    for path in re.findall(r"`((?:lycoris_cupy|tests|cuda_src|benchmarks)/[\w/.-]*)`", README):
        assert (ROOT / path).exists(), path


def test_the_speed_table_is_the_measured_one():
    (path,) = (ROOT / "benchmarks" / "results").glob("layers-*.json")
    assert table(json.loads(path.read_text())) in README
