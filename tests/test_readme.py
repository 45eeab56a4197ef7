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
from tests.cases import KINDS, PAIRS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
SHELL = [
    line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()
]

# Each column of the table, and the kinds of layers that stand for it.
COLUMNS = {
    "Linear": ["linear", "linear odd"],
    "Conv 1x1": ["conv1x1"],
    "Conv spatial": ["conv3x3", "conv3x3 stride", "conv3x2 dilation"],
    "Conv Tucker": ["conv3x3", "conv3x3 stride"],
    "Conv1d, Conv3d": ["conv1d", "conv3d"],
    "groups, depthwise": ["groups 4", "groups stride", "depthwise"],
}


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


@pytest.mark.parametrize("algorithm", ["LoCon", "LoHa", "LoKr", "Full"])
def test_table(algorithm):
    """A cell is marked if and only if the law is tested for it."""
    assert "| | " + " | ".join(COLUMNS) + " |" in README
    tested = {(kind.name, name) for kind, name in PAIRS if name.startswith(algorithm.lower())}
    assert {kind.name for kind in KINDS} >= {name for names in COLUMNS.values() for name in names}
    cells = []
    for column, kinds in COLUMNS.items():
        found = [
            kind
            for kind in kinds
            if any(
                k == kind and ("tucker" in name) == (column == "Conv Tucker") for k, name in tested
            )
        ]
        cells.append("x" if found == kinds else "")
    assert f"| {algorithm} | {' | '.join(cells)} |" in README


def test_paths_in_the_readme_exist():
    for path in re.findall(r"`((?:lycoris_cupy|tests|cuda_src|benchmarks)/[\w/.-]*)`", README):
        assert (ROOT / path).exists(), path


def test_the_speed_table_is_the_measured_one():
    (path,) = (ROOT / "benchmarks" / "results").glob("layers-*.json")
    assert table(json.loads(path.read_text())) in README
