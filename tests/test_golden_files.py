"""Files with the keys of the real programs, made by `tests/golden/make.py` without this package: the
change that each layer gets.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from lycoris_cupy import LayerShape
from lycoris_cupy.io.adapter_file import read_adapter
from lycoris_cupy.io.convert import convert_file
from lycoris_cupy.io.dialects import DIALECTS
from lycoris_cupy.io.merge import merge_files
from lycoris_cupy.io.names import tensors_of
from lycoris_cupy.io.safetensors import write

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "cases.json").read_text())


def shapes_of(case):
    return {name: LayerShape.of_file(tuple(shape)) for name, shape in CASES[case]["base"].items()}


def changes(path, shapes):
    """The change of each layer in torch's order."""
    found, _ = read_adapter(path, shapes)
    out = {}
    for layer, (adapter, params) in found.items():
        p = adapter.canonical({name: value.astype(np.float64) for name, value in params.items()})
        change = adapter.delta_weight(None, p, np.array([adapter.scale]))
        out[layer] = change.transpose(2, 1, 0).reshape(shapes[layer].file_shape)
    return out


@pytest.mark.parametrize("case", CASES)
def test_the_change_of_each_layer(case):
    expected = load_file(GOLDEN / "expect" / f"{case}.safetensors")
    found = changes(GOLDEN / CASES[case]["file"], shapes_of(case))
    assert found.keys() == expected.keys()
    for layer, change in expected.items():
        assert np.abs(found[layer] - change).max() < 1e-12, layer
        assert change.any()


@pytest.mark.parametrize("to", ["lycoris", "kohya", "peft", "diffusers"])
@pytest.mark.parametrize("case", CASES)
def test_converted_it_does_the_same(tmp_path, case, to):
    """Folded, dotted, with a configuration, and with the scale in a factor."""
    base = CASES[case]["base"]
    write(
        tmp_path / "m.safetensors",
        {tensors_of(n)[0]: np.zeros(s, np.float32) for n, s in base.items()},
    )
    expected = load_file(GOLDEN / "expect" / f"{case}.safetensors")
    options = {"base": tmp_path / "m.safetensors", "algorithm": "lora"}
    parts = (
        {"unet"}
        if any(
            case.startswith(x) for x in ("diffusers-u", "diffusers-f", "ai", "mochi", "lyc", "peft")
        )
        else {"unet", "te1"}
    )
    for part in sorted(parts):
        if part == "te1" and DIALECTS[to].prefix("te1") is None:
            continue
        out = tmp_path / f"{part}-{to}.safetensors" if to != "peft" else tmp_path / part
        done = convert_file(
            GOLDEN / CASES[case]["file"], out, to, part="unet", only=part, **options
        )
        assert done.loss < 1e-6 and done.modules
        for layer, change in changes(out, shapes_of(case)).items():
            assert np.linalg.norm(change - expected[layer]) < 1e-6 * np.linalg.norm(expected[layer])


def test_the_script_makes_these_files(tmp_path):
    copy = tmp_path / "make.py"
    copy.write_bytes((GOLDEN / "make.py").read_bytes())
    subprocess.run([sys.executable, str(copy)], check=True)
    made = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    assert len(made) > 2 * len(CASES)
    for path in made:
        assert (GOLDEN / path).read_bytes() == (tmp_path / path).read_bytes(), path
    kept = {
        p.relative_to(GOLDEN)
        for p in GOLDEN.rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert kept == set(made)


@pytest.mark.parametrize("case", CASES)
def test_merged_into_a_checkpoint(tmp_path, case):
    """The file of the model, fused weights included, gets the change and nothing else."""
    base, paths = CASES[case]["base"], (tmp_path / "m.safetensors", tmp_path / "out.safetensors")
    rng = np.random.default_rng(0)
    weights = {tensors_of(n)[0]: rng.standard_normal(s) for n, s in base.items()}
    write(paths[0], weights)
    merge_files(paths[0], [(GOLDEN / CASES[case]["file"], 0.5)], paths[1])
    expected = load_file(GOLDEN / "expect" / f"{case}.safetensors")
    merged = load_file(paths[1])
    assert merged.keys() == weights.keys()
    for layer in base:
        name = tensors_of(layer)[0]
        change = 0.5 * expected[layer] if layer in expected else 0.0
        assert np.abs(merged[name] - weights[name] - change).max() < 1e-12
