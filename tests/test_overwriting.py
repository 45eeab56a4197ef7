"""No command writes over what it reads, under any name of it."""

import json
import os

import numpy as np
import pytest

from lycoris_cupy import cli
from lycoris_cupy.io.safetensors import write

SHARD = "sharded/model-00001-of-00002.safetensors"
INDEX = "sharded/model.safetensors.index.json"
# Arguments, and the file that they read and are told to write.
CASES = [
    ("convert style.safetensors {} --to kohya --part unet", "style.safetensors"),
    (
        "convert style.safetensors {} --to kohya --part unet --base base.safetensors",
        "base.safetensors",
    ),
    ("convert style.safetensors {} --to kohya --part unet --base sharded", INDEX),
    ("convert peft {} --to lycoris", "peft/adapter_model.safetensors"),
    ("resize style.safetensors {} --rank 1", "style.safetensors"),
    ("resize peft {} --rank 1", "peft/adapter_model.safetensors"),
    ("merge base.safetensors style.safetensors -o {}", "style.safetensors"),
    ("merge base.safetensors peft -o {}", "peft/adapter_model.safetensors"),
    ("merge sharded style.safetensors --shard-size 0 -o {}", SHARD),
    ("extract base.safetensors tuned.safetensors {} --rank 1", "base.safetensors"),
    ("extract base.safetensors tuned.safetensors {} --rank 1", "tuned.safetensors"),
    ("extract sharded tuned.safetensors {} --rank 1", SHARD),
    ("extract tuned.safetensors sharded {} --rank 1", INDEX),
    ("inspect style.safetensors --html {}", "style.safetensors"),
    ("inspect style.safetensors --base base.safetensors --html {}", "base.safetensors"),
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A base in one file and in two, what it became, and an adapter as a file and as a folder."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    base = {f"{name}.weight": rng.standard_normal((5, 7)) for name in "ab"}
    write("base.safetensors", base)
    write("tuned.safetensors", {name: weight + 1 for name, weight in base.items()})
    os.mkdir("sharded")
    shards = {name: f"model-0000{i}-of-00002.safetensors" for i, name in enumerate(base, 1)}
    for name, file in shards.items():
        write(f"sharded/{file}", {name: base[name]})
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": shards}))
    down, up = rng.standard_normal((2, 7)), rng.standard_normal((5, 2))
    write("style.safetensors", {"lycoris_a.lora_down.weight": down, "lycoris_a.lora_up.weight": up})
    os.mkdir("peft")
    names = (f"base_model.model.a.lora_{x}.weight" for x in "AB")
    write("peft/adapter_model.safetensors", dict(zip(names, (down, up), strict=True)))
    configuration = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["a"]}
    (tmp_path / "peft/adapter_config.json").write_text(json.dumps(configuration))
    return tmp_path


@pytest.mark.parametrize("arguments, file", CASES)
@pytest.mark.parametrize("name", ["itself", "a link"])
def test_what_is_read_is_not_written_over(here, capsys, arguments, file, name):
    before = (here / file).read_bytes()
    os.link(file, "link.safetensors")
    out = file if name == "itself" else "link.safetensors"
    assert cli.main(arguments.format(out).split()) == 2
    error = capsys.readouterr().err
    assert f"{file}: the result would overwrite it; choose another output" in error
    assert (here / file).read_bytes() == before


@pytest.mark.parametrize("arguments", dict.fromkeys(arguments for arguments, _ in CASES))
def test_another_name_is_written(here, arguments):
    assert cli.main(arguments.format("out.safetensors").split()) == 0
    assert (here / "out.safetensors").exists()
