"""Checkpoints of several files: read whole or refused, written whole or not at all."""

import json
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from lycoris_cupy import bf16
from lycoris_cupy.errors import FileFormatError
from lycoris_cupy.io.atomic import new_folder
from lycoris_cupy.io.checkpoint import open_checkpoint
from lycoris_cupy.io.merge import NOTE, merge_files
from lycoris_cupy.io.safetensors import open_file, write
from lycoris_cupy.io.shards import parse_size, split

INDEX = "model.safetensors.index.json"


def shard(folder, groups, stem="model"):
    """A folder of shards with an index; the index as a dict."""
    folder.mkdir()
    names = {}
    for i, tensors in enumerate(groups, 1):
        name = f"{stem}-{i:05}-of-{len(groups):05}.safetensors"
        write(folder / name, tensors, {"format": "pt", "shard": str(i)})
        names |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": 1, "note": "kept"}, "weight_map": names}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    return index


def values(path):
    with open_checkpoint(path) as file:
        return {name: np.unique(file[name].astype(np.float64)).tolist() for name in file}


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A base of two shards with companions, and an adapter of a layer in each."""
    monkeypatch.chdir(tmp_path)
    ones = np.ones((4, 6), bf16)
    shard(
        tmp_path / "base",
        [
            {"a.weight": ones, "a.norm": np.ones(3, np.float32)},
            {"b.weight": ones, "c.weight": ones},
        ],
    )
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "base" / "tokenizer.model").write_bytes(b"tok")
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"old weights")
    change = np.ones((4, 6), np.float32)
    style = {"lycoris_a.diff": change, "lycoris_b.diff": change, "lycoris_b.diff_b": np.ones(4)}
    write(tmp_path / "style.safetensors", style)
    return tmp_path


AFTER = {"a.weight": [1.5], "a.norm": [1], "b.weight": [1.5], "b.bias": [0.5], "c.weight": [1]}


@pytest.mark.parametrize("base", ["base", f"base/{INDEX}"])
def test_shards_in_shards_out(here, base):
    seen = []
    report = merge_files(
        base, [("style.safetensors", 0.5)], "out", progress=lambda *at: seen.append(at)
    )
    assert values("out") == AFTER and set(report.files) == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }
    # The configuration comes along, weights in another format do not: they are not merged.
    names = {*report.files, INDEX, "config.json", "tokenizer.model"}
    assert set(os.listdir("out")) == names
    index = json.loads((here / "out" / INDEX).read_text())
    assert index["metadata"] == {"total_size": 3 * 48 + 12 + 8, "note": "kept"}
    assert index["weight_map"]["b.bias"] == index["weight_map"]["b.weight"]
    for i, name in enumerate(sorted(report.files), 1):
        with open_file(here / "out" / name) as file:
            assert file.metadata["shard"] == str(i) and "style" in file.metadata[NOTE]
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] == report.nbytes


def test_one_file_out_of_shards_and_shards_out_of_one_file(here):
    merge_files("base", [("style.safetensors", 0.5)], "whole.safetensors", shard_size=0)
    assert values("whole.safetensors") == AFTER
    merge_files("whole.safetensors", [], "again", shard_size=110)
    with open_checkpoint("again") as file:
        assert len(file.shards) == 2 and file.stem == "model"
        assert all(sum(one.stored(n).nbytes for n in one) <= 110 for one in file.shards.values())
    assert values("again") == AFTER
    assert listing(here / "again") == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        INDEX,
    ]


def test_stems_stay(here):
    """diffusers names its shards otherwise."""
    shard(here / "unet", [{"a.weight": np.ones((2, 3), bf16)}], "diffusion_pytorch_model")
    write("a.safetensors", {"lycoris_a.diff": np.ones((2, 3), bf16)})
    merge_files("unet", [("a.safetensors", 1)], "out")
    assert listing(here / "out") == [
        "diffusion_pytorch_model-00001-of-00001.safetensors",
        "diffusion_pytorch_model.safetensors.index.json",
    ]
    merge_files("unet", [("a.safetensors", 1)], "small", shard_size=1)
    assert values("small") == {"a.weight": [2]}


def test_split_keeps_the_order_and_the_size(here):
    with open_checkpoint("base") as base:
        tensors = {name: base.stored(name) for name in base}
    groups = split(tensors, 60, "m")  # 48, 12; then 48; then 48
    assert [list(group) for group in groups.values()] == [
        ["a.norm", "a.weight"],
        ["b.weight"],
        ["c.weight"],
    ]
    assert list(groups)[2] == "m-00003-of-00003.safetensors"


def test_sizes():
    sizes = {"5GB": 5 * 10**9, "500 mb": 5 * 10**8, "1.5GiB": 3 << 29, "7": 7, "2k": 2000, "0": 0}
    assert {text: parse_size(text) for text in sizes} == sizes
    with pytest.raises(FileFormatError, match="size '5 parsecs' is unknown: write 5GB"):
        parse_size("5 parsecs")


# -- what is refused


def edit(change):
    def done(folder):
        index = json.loads((folder / INDEX).read_text())
        change(index)
        (folder / INDEX).write_text(json.dumps(index))

    return done


def truncate(folder):
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


BROKEN = {
    "a missing shard": (
        lambda f: (f / "model-00002-of-00002.safetensors").unlink(),
        "names the shard 'model-00002-of-00002.safetensors', which is not beside it",
    ),
    "a truncated shard": (truncate, "model-00002-of-00002.safetensors: .* the file has only"),
    "a tensor that is not there": (
        edit(lambda i: i["weight_map"].update({"x": "model-00001-of-00002.safetensors"})),
        "says that 'model-00001-of-00002.safetensors' holds 'x', but it does not",
    ),
    "a tensor that is not named": (
        edit(lambda i: i["weight_map"].pop("c.weight")),
        "holds 'c.weight', which the index says is nowhere: it would be lost",
    ),
    "a tensor in two shards": (
        edit(lambda i: i["weight_map"].update({"a.norm": "model-00002-of-00002.safetensors"})),
        "says that 'model-00002-of-00002.safetensors' holds 'a.norm', but it does not",
    ),
    "another folder": (
        edit(lambda i: i["weight_map"].update({"a.norm": "../secret.safetensors"})),
        "'a.norm' is in '../secret.safetensors', expected the name of a file in the same folder",
    ),
    "no name": (
        edit(lambda i: i["weight_map"].update({"a.norm": 7})), "is in 7, expected the name of a",
    ),
    "no map": (edit(lambda i: i.pop("weight_map")), "weight_map is None, expected an object of"),
    "no JSON": (lambda f: (f / INDEX).write_bytes(b"\xff{"), "is not JSON"),
    "no index": (lambda f: (f / INDEX).unlink(), "without a .* but 2 safetensors files: name one"),
    "two indices": (
        lambda f: (f / ("x" + INDEX)).write_text("{}"), "has several indices, model.*xmodel.*: name",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_broken_bases_leave_nothing_behind(here, what):
    damage, match = BROKEN[what]
    damage(here / "base")
    before = listing(here)
    with pytest.raises(FileFormatError, match=match):
        merge_files("base", [("style.safetensors", 1)], "out")
    assert listing(here) == before


def test_a_folder_that_is_there_is_not_replaced(here):
    (here / "out").mkdir()
    merge_files("base", [("style.safetensors", 0.5)], "out")  # an empty one is as good as none
    before = listing(here)
    with pytest.raises(FileExistsError, match="is there already, and several files cannot be"):
        merge_files("base", [("style.safetensors", 0.5)], "out")
    with pytest.raises(FileExistsError, match="is there already"):
        merge_files("base", [("style.safetensors", 0.5)], "base")
    with pytest.raises(
        FileFormatError, match="the result has 2 shards and an index: name a folder"
    ):
        merge_files("base", [("style.safetensors", 0.5)], "new.safetensors")
    assert listing(here) == before


def test_a_value_that_does_not_fit_leaves_no_folder(here):
    write("style.safetensors", {"lycoris_b.diff": np.full((4, 6), 1e38, np.float32)})
    before = listing(here)
    with pytest.raises(FileFormatError, match="the merged 'b.weight' has values that BF16 cannot"):
        merge_files("base", [("style.safetensors", 9)], "out")
    assert listing(here) == before


def test_a_full_disk(here):
    """Half a shard fits; afterwards there is no folder, and the error says how far it got."""
    big = np.zeros((512, 1024), np.float32)
    shard(here / "big", [{"a.weight": big}, {"b.weight": big}])
    write("a.safetensors", {"lycoris_a.diff": np.ones((512, 1024), np.float32)})
    before = listing(here)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    for adapters in (["a.safetensors"], ["a.safetensors:0"]):  # computed, and copied by the system
        command = [sys.executable, "-m", "lycoris_cupy", "merge", "big", *adapters, "-o", "out"]
        done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert "cannot be written, 1000000 of 2097" in done.stderr and "too large" in done.stderr
        assert listing(here) == before


MERGE = """
import sys
from lycoris_cupy.io.merge import merge_files
merge_files("big", [("a.safetensors", 1.0)], "out")
"""


@pytest.mark.parametrize("moment", [1, 2])
def test_a_kill_leaves_no_folder_of_that_name(here, moment):
    big = np.zeros((1024, 2048), np.float32)
    shard(here / "big", [{"a.weight": big}, {"b.weight": big}])
    write("a.safetensors", {f"lycoris_{n}.diff": np.ones((1024, 2048), np.float32) for n in "ab"})
    child = subprocess.Popen([sys.executable, "-c", MERGE])
    try:
        end = time.monotonic() + 30
        while time.monotonic() < end and not (here / "out").exists():
            beside = list(here.glob(".lycoris-*.tmp"))
            if beside and len(listing(beside[0])) >= moment:
                break
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    if (here / "out").exists():  # it was quicker than we looked
        assert values("out") == {"a.weight": [1], "b.weight": [1]}
    assert values("big") == {"a.weight": [0], "b.weight": [0]}


def test_new_folder(tmp_path, monkeypatch):
    with new_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("1")
        assert not (tmp_path / "a").exists()
    assert listing(tmp_path) == ["a", "a/x"]
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "b") as folder:
        (folder / "x").write_text("1")
        raise KeyboardInterrupt
    with pytest.raises(FileNotFoundError, match="cannot be written: No such file"):
        with new_folder(tmp_path / "none" / "b"):
            pass
    assert listing(tmp_path) == ["a", "a/x"]
