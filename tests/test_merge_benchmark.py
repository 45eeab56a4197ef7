"""The shapes that benchmarks use are those of the released models, and their commands work."""

import json
import sys
from math import prod

import numpy as np
import pytest

from benchmarks import merge_files as files
from benchmarks import merge_large, sdxl
from lycoris_cupy.io.names import fold


@pytest.mark.parametrize("part", sdxl.PARTS)
def test_sdxl_has_the_parameters_of_the_release(part):
    shapes = sdxl.shapes()
    assert sum(prod(s) for name, s in shapes.items() if name.startswith(part)) == sdxl.PARTS[part]


def test_sdxl_names():
    shapes = sdxl.shapes()
    assert sum(name.startswith(sdxl.UNET) for name in shapes) == 1680
    unet = "model.diffusion_model."
    for name, shape in {
        f"{unet}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, 2048),
        f"{unet}middle_block.1.transformer_blocks.9.ff.net.0.proj.weight": (10240, 1280),
        f"{unet}output_blocks.2.0.skip_connection.weight": (1280, 1920, 1, 1),
        f"{unet}output_blocks.5.2.conv.weight": (640, 640, 3, 3),
        f"{unet}label_emb.0.0.weight": (1280, 2816),
        "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight": (3840, 1280),
        "first_stage_model.decoder.up.1.block.0.nin_shortcut.weight": (256, 512, 1, 1),
    }.items():
        assert shapes[name] == shape
    linear, convolutions = sdxl.adapted(shapes)
    assert len(linear) == 70 * 10 and len({fold(name) for name in linear + convolutions}) == 738


def test_the_measurement_runs(tmp_path, monkeypatch, capsys):
    """On a small part of the model: a copy, a merge, and a table of both."""
    small = {n: s for n, s in sdxl.shapes().items() if "input_blocks.4.0" in n or "out.2" in n}
    attention = {
        n: s for n, s in sdxl.shapes().items() if "input_blocks.4.1.transformer_blocks.0.attn1" in n
    }
    monkeypatch.setattr(sdxl, "shapes", lambda: {**small, **attention})
    real = merge_large.run

    def run(command):
        if command[2] == "benchmarks.merge_files":  # in this process, where the model is small
            files.make(*command[3:])
            return 0.0, 0.0, 0
        return real(command)

    monkeypatch.setattr(merge_large, "run", run)
    out = tmp_path / "result.json"
    assert merge_large.main(["--repeats", "1", "--folder", str(tmp_path), "-o", str(out)]) == 0
    data = json.loads(out.read_text())
    assert [(r["command"], r["cache"]) for r in data["rows"]] == [
        (name, cache) for cache in ("cold", "warm") for name in ("copy", "merge")
    ]
    assert "| merge |" in capsys.readouterr().out and data["machine"]["numpy"] == np.__version__
    assert list(tmp_path.iterdir()) == [out] and sys.executable
