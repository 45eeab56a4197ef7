"""Merging: the peer's merged weights, one rounding, everything else bit for bit, and never half a
file.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from lycoris_cupy import LayerShape, bf16
from lycoris_cupy.adapters import DoRA
from lycoris_cupy.errors import DtypeError, FileFormatError, MatchError, ShapeError
from lycoris_cupy.io import merge_layer
from lycoris_cupy.io.adapter_file import read_adapter
from lycoris_cupy.io.header import NUMPY
from lycoris_cupy.io.merge import NOTE, layer_shapes, merge_files
from lycoris_cupy.io.safetensors import Stored, open_file, write
from tests import magnitudes, majorants
from tests.bounds import assert_within, bound
from tests.cases import PEER, PEER_CASES, peer

BUILT = [n for n in PEER_CASES if (PEER / "adapter" / f"{n}.safetensors").exists()]
# Weights of DyLoRA are each of a rank that the peer drew: see test_peer.py.
WHOLE = [n for n in BUILT if PEER_CASES[n]["algo"] != "dylora"]
F8 = NUMPY["F8_E4M3"]


def read(path):
    with open_file(path) as file:
        return {name: file[name] for name in file if file.dtype(name) in NUMPY}


def raw(path):
    with open_file(path) as file:
        return {
            name: (file.dtype(name), file.shape(name), file.raw(name).tobytes()) for name in file
        }


# -- the peer
# --------------------------------------------------------------------------------------------------


def peer_adapter(name, folder):
    """The peer's file; for Full one made from its forward, as the peer saved those before
    `apply_to`.
    """
    case, base, _, expect = peer(name)
    if case["algo"] != "full":
        return PEER / "adapter" / f"{name}.safetensors"
    change = {"lycoris_block_layer.diff": expect["merged"] - base["block.layer.weight"]}
    if "merged_bias" in expect:
        change["lycoris_block_layer.diff_b"] = expect["merged_bias"] - base["block.layer.bias"]
    write(folder / "full.safetensors", change)
    return folder / "full.safetensors"


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f64"])
@pytest.mark.parametrize("name", WHOLE)
def test_the_peers_merged_weights(tmp_path, name, dtype):
    case, base, _, expect = peer(name)
    kind = {"f32": np.float32, "bf16": bf16, "f64": np.float64}[dtype]
    base = {key: value.astype(kind) for key, value in base.items()}
    write(tmp_path / "base.safetensors", base)
    adapter_path, strength = peer_adapter(name, tmp_path), case["strength"]
    merge_files(
        tmp_path / "base.safetensors",
        [(adapter_path, strength)],
        tmp_path / "out.safetensors",
        rule="reference",  # LyCORIS's own, which DoRA at a strength of 0.7 tells from blending
    )
    got = read(tmp_path / "out.safetensors")
    weight = base["block.layer.weight"]
    adapter, params = read_adapter(adapter_path, {"block.layer": LayerShape.of_file(weight.shape)})[
        0
    ]["block.layer"]
    # The size of the terms: the same formula over absolute values.
    wide = {key: value.astype(np.float64) for key, value in params.items()}
    positive = adapter.canonical({key: np.abs(value) for key, value in wide.items()})
    matrix = weight.astype(np.float64).reshape(*weight.shape[:2], -1).transpose(2, 1, 0)
    if isinstance(adapter, (DoRA, *majorants.NONLINEAR)):
        measure = magnitudes if isinstance(adapter, DoRA) else majorants
        if adapter.algorithm != "tlora":
            adapter = replace(adapter, rule="reference")
        magnitude = measure.weight_size(matrix, adapter, wide, strength)
    else:
        change = adapter.delta_weight(
            np.abs(matrix), positive, np.array([abs(strength * adapter.scale)])
        )
        magnitude = np.abs(matrix) + change
    magnitude = magnitude.transpose(2, 1, 0).reshape(weight.shape)
    # Sums over one rank after another, then a scale and a sum; f64 is compared with a reference
    # that was saved as f32.
    depth = (
        3 * max([1, *(min(array.shape[-2:]) for array in positive.values() if array.ndim > 1)]) + 4
    )
    if isinstance(adapter, majorants.NONLINEAR):
        depth += 128  # the peer transforms blocks, and looks for singular vectors, in f32
    limit = bound(
        expect["merged"], magnitude, depth, np.float32 if dtype == "f64" else weight.dtype
    )
    assert got["block.layer.weight"].dtype == weight.dtype
    assert_within(got["block.layer.weight"], expect["merged"], limit, name)
    if "merged_bias" in expect:
        limit = bound(expect["merged_bias"], np.abs(expect["merged_bias"]), 2, weight.dtype)
        assert_within(got["block.layer.bias"], expect["merged_bias"], limit, name)
    elif "block.layer.bias" in base:
        assert got["block.layer.bias"].tobytes() == base["block.layer.bias"].tobytes()


# -- what is computed
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    """A small checkpoint, an adapter of a linear and a convolution, and the change of each weight
    in f64.
    """
    rng = np.random.default_rng(3)

    def normal(*shape):
        return rng.standard_normal(shape).astype(bf16)

    unet = "model.diffusion_model."
    base = {
        f"{unet}a.weight": normal(8, 6),
        f"{unet}a.bias": normal(8),
        f"{unet}b.conv.weight": normal(5, 4, 3, 3),
        "cond_stage_model.transformer.a.weight": normal(8, 6),
        "norm.weight": np.array([np.nan, -0.0, 1, np.inf], np.float32),
        "quantised.weight": rng.integers(0, 256, (4, 4), dtype=np.uint8).view(F8),
        "packed.weight": Stored("F4", (2, 4), lambda: np.arange(4, dtype=np.uint8)),
        "counter": np.array(7, np.int64),
        "mask": np.array([True, False]),
    }
    write(tmp_path / "base.safetensors", base, {"format": "pt", "modelspec.hash_sha256": "0xdead"})
    down, up, conv_down, conv_up = (
        normal(2, 6),
        normal(8, 2),
        normal(3, 4, 3, 3),
        normal(5, 3, 1, 1),
    )
    style = {
        "lora_unet_a.lora_down.weight": down,
        "lora_unet_a.lora_up.weight": up,
        "lora_unet_a.alpha": np.array(1, np.float32),
        "lora_unet_b_conv.lora_down.weight": conv_down,
        "lora_unet_b_conv.lora_up.weight": conv_up,
    }
    write(tmp_path / "style.safetensors", style)
    wide = [array.astype(np.float64) for array in (down, up, conv_down, conv_up)]
    changes = {
        f"{unet}a.weight": 0.5 * wide[1] @ wide[0],
        f"{unet}b.conv.weight": np.einsum("or,rihw->oihw", wide[3][:, :, 0, 0], wide[2]),
    }
    return (
        tmp_path / "base.safetensors",
        tmp_path / "style.safetensors",
        tmp_path / "out.safetensors",
        changes,
    )


@pytest.mark.parametrize("strengths", [[1.0], [0.7, -0.3], [2, 2, 2], [-1.5]])
def test_the_sum_is_rounded_once(files, strengths):
    base_path, style, out, changes = files
    report = merge_files(base_path, [(style, strength) for strength in strengths], out)
    assert report.strengths == tuple(strengths)
    assert all(one.coverage == 1 for one in report.adapters) and report.changed == tuple(changes)
    before, after = read(base_path), read(out)
    for name, change in changes.items():
        exact = before[name].astype(np.float64) + sum(strengths) * change
        assert_within(
            after[name],
            exact,
            bound(exact, np.abs(before[name]) + np.abs(change) * 9, 40, bf16),
            name,
        )
        # An intermediate bf16 would change about half of the values.
        assert (after[name] == exact.astype(bf16)).mean() > 0.97


def test_all_else_passes_bit_for_bit(files):
    base, style, out, changes = files
    merge_files(base, [(style, 0.5)], out)
    before, after = raw(base), raw(out)
    assert list(before) == list(after)
    assert {name for name in before if before[name] != after[name]} == set(changes)
    assert after["packed.weight"] == ("F4", (2, 4), bytes(range(4)))


@pytest.mark.parametrize("strengths", [[0.0], [], [0.0, -0.0]])
def test_strength_zero_changes_no_bit(files, strengths):
    base, style, out, _ = files
    merge_files(base, [(style, strength) for strength in strengths], out)
    assert raw(base) == raw(out)


def test_metadata_says_what_was_merged(files):
    base, style, out, _ = files
    merge_files(base, [(style, 0.5)], out)
    merge_files(out, [(style, -0.5), (style, 2)], out)
    with open_file(out) as file:
        assert file.metadata.keys() == {"format", NOTE}  # the hash was of another file
        assert json.loads(file.metadata[NOTE]) == [
            {"file": "style.safetensors", "strength": s} for s in (0.5, -0.5, 2)
        ]
    write(base, read(base), {NOTE: "by hand"})
    merge_files(base, [(style, 1)], out)
    with open_file(out) as file:
        assert json.loads(file.metadata[NOTE])[0] == "by hand"


def test_the_output_may_be_the_base(files):
    base, style, out, _ = files
    merge_files(base, [(style, 0.5)], out)
    merge_files(base, [(style, 0.5)], base)
    assert raw(base) == raw(out)


def test_prefixes_choose_the_part(files):
    base, style, out, _ = files
    write(style, {"lora_te_a.diff": np.ones((8, 6), np.float32)})
    merge_files(base, [(style, 1)], out)
    changed = {name for name, value in raw(out).items() if raw(base)[name] != value}
    assert changed == {"cond_stage_model.transformer.a.weight"}


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, bf16])
def test_bias_changes_and_new_biases(tmp_path, dtype):
    base, style, out = (tmp_path / f"{n}.safetensors" for n in ("base", "style", "out"))
    write(
        base,
        {
            "a.weight": np.ones((2, 3), dtype),
            "a.bias": np.array([1, 2], dtype),
            "b.weight": np.ones((2, 3), dtype),
        },
    )
    tensors = {f"lycoris_{n}.diff": np.full((2, 3), 0.5, np.float16) for n in "ab"}
    write(style, tensors | {f"lycoris_{n}.diff_b": np.array([3, 4], bf16) for n in "ab"})
    merge_files(base, [(style, 0.5), (style, 1)], out)
    got = read(out)
    assert got["a.bias"].tolist() == [5.5, 8] and got["b.bias"].tolist() == [4.5, 6]
    assert (got["b.weight"] == 1.75).all() and {value.dtype for value in got.values()} == {
        np.dtype(dtype)
    }


def test_f64_bases_are_summed_in_f64(tmp_path):
    base, style, out = (tmp_path / f"{n}.safetensors" for n in ("base", "style", "out"))
    write(base, {"a.weight": np.ones((1, 1))})
    write(style, {"lycoris_a.diff": np.full((1, 1), 2.0**-40)})
    merge_files(base, [(style, 1.0)], out)
    assert read(out)["a.weight"].item() == 1 + 2.0**-40


def test_no_strict_merges_the_rest(files):
    base, style, out, changes = files
    write(style, read(style) | {"lora_unet_c.diff": np.ones((2, 2), np.float32)})
    with pytest.raises(MatchError, match="1 of 3 modules match no layer"):
        merge_files(base, [(style, 1.0)], out)
    (report,) = merge_files(base, [(style, 1.0)], out, strict=False).adapters
    assert [entry.name for entry in report.unmatched] == ["lora_unet_c"]
    assert {name for name, value in raw(out).items() if raw(base)[name] != value} == set(changes)


def test_few_tensors_in_memory_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(merge_layer, "_BLOCK", 1 << 14)
    base, style, out = (tmp_path / f"{n}.safetensors" for n in ("base", "style", "out"))
    write(base, {f"l{i}.weight": np.zeros((512, 512), np.float32) for i in range(24)})
    ones = {
        "lora_up.weight": np.ones((512, 1), np.float32),
        "lora_down.weight": np.ones((1, 512), np.float32),
    }
    write(style, {f"lycoris_l{i}.{key}": value for i in range(24) for key, value in ones.items()})
    seen = []
    tracemalloc.start()
    try:
        merge_files(
            base, [(style, 1.0)], out, progress=lambda done, total: seen.append((done, total))
        )
        assert tracemalloc.get_traced_memory()[1] < 8 << 20  # of 24 MiB
    finally:
        tracemalloc.stop()
    assert (read(out)["l23.weight"] == 1).all()
    assert seen[-1][0] == seen[-1][1] == os.path.getsize(out) and len(seen) == 25


def test_layer_shapes(files):
    with open_file(files[0]) as base:
        shapes = layer_shapes(base)
    assert set(shapes) == {
        "model.diffusion_model.a",
        "model.diffusion_model.b.conv",
        "cond_stage_model.transformer.a",
        "quantised",
        "packed",
        "norm",
    }
    assert str(shapes["norm"]) == "norm(4)"
    assert str(shapes["model.diffusion_model.b.conv"]) == "Conv2d(4 -> 5, 3x3)"


# -- what is refused, and what is left then
# -----------------------------------------------------------------------


def diff(layer, shape, value=1.0, **more):
    return {f"lycoris_{layer}.diff": np.full(shape, value, np.float32)} | {
        f"lycoris_{layer}.{k}": v for k, v in more.items()
    }


BASE = {
    "a.weight": np.ones((2, 3), np.float16),
    "a.bias": np.ones(2, np.float16),
    "c.weight": np.ones((2, 3), np.float16),
    "c.bias": np.ones(5, np.float16),
    "d.weight": np.ones((2, 3), np.float16),
    "d.bias": np.ones(2, np.int32),
    "i.weight": np.ones((2, 3), np.int8),
    "f8.weight": np.ones((2, 3), NUMPY["F8_E4M3FNUZ"]),
    "q.weight": np.ones((2, 3), NUMPY["F8_E5M2"]),
    "q.weight_scale": np.ones((), np.float32),
}
REFUSED = {
    "strength NaN": (diff("a", (2, 3)), math.nan, FileFormatError, "style.safetensors: strength is nan, expected"),
    "strength inf": (diff("a", (2, 3)), math.inf, FileFormatError, "style.safetensors: strength is inf, expected"),
    "nothing matches": (diff("x", (2, 3)), 1, MatchError, "nothing in the file matches any of the 6 layers"),
    "shape": (diff("a", (3, 2)), 1, ShapeError, r"module 'lycoris_a' on layer 'a': diff has shape \(3, 2\)"),
    "dora": (diff("a", (2, 3), dora_scale=np.ones(2)), 1, FileFormatError, "dora_scale stands beside full"),
    "integer base": (diff("i", (2, 3)), 1, DtypeError, "base.safetensors: 'i.weight' has dtype I8, and an adapter"),
    "fnuz base": (diff("f8", (2, 3)), 1, DtypeError, "'f8.weight' has dtype F8_E4M3FNUZ, .*quantised from"),
    "scaled fp8 base": (diff("q", (2, 3)), 1, DtypeError, "'q.weight' is F8_E5M2 with a scale in 'q.weight_scale', and"),
    "integer bias": (diff("d", (2, 3), diff_b=np.ones(2)), 1, DtypeError, "'d.bias' has dtype I32, and an adapter"),
    "bias shape": (diff("c", (2, 3), diff_b=np.ones(2)), 1, ShapeError, r"'c.bias' has shape \(5,\), expected \(2,\)"),
    "overflow": (diff("a", (2, 3), 1e5), 1, FileFormatError, "the merged 'a.weight' has values that F16 cannot hold"),
    "overflow of a bias": (
        diff("a", (2, 3), diff_b=np.full(2, 1e5)), 1, FileFormatError, "the merged 'a.bias' has values that F16 cannot",
    ),
    "overflow of f32": (diff("a", (2, 3), 3e38), 3, FileFormatError, "the merged 'a.weight' has values that F16"),
    "huge strength": (diff("a", (2, 3)), 1e300, FileFormatError, r"strength 1e\+300 \* scale 1 is more than"),
    "damaged adapter": (b"\0" * 7, 1, FileFormatError, "style.safetensors: has 7 bytes"),
    "no adapter": (None, 1, FileNotFoundError, "style.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("out", ["out", "base"])
@pytest.mark.parametrize("what", REFUSED)
def test_a_refused_merge_leaves_everything_as_it_was(tmp_path, what, out):
    tensors, strength, kind, match = REFUSED[what]
    base, style = tmp_path / "base.safetensors", tmp_path / "style.safetensors"
    write(base, BASE)
    if isinstance(tensors, bytes):
        style.write_bytes(tensors)
    elif tensors is not None:
        write(style, tensors)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(kind, match=match):
        merge_files(base, [(style, strength)], tmp_path / f"{out}.safetensors")
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_missing_folder_is_said_before_any_work(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="cannot be written: No such file or directory.*none/out"
    ):
        merge_files(tmp_path / "no base", [], tmp_path / "none" / "out.safetensors")


def test_a_base_without_layers(tmp_path):
    write(
        tmp_path / "base.safetensors",
        {"a": np.ones(3), "z.weight": np.ones((2, 2, 0))},
    )
    with pytest.raises(
        MatchError,
        match="has no tensor named <layer>.weight with one to five axes: not a checkpoint",
    ):
        merge_files(tmp_path / "base.safetensors", [], tmp_path / "out.safetensors")


def test_values_that_were_not_finite_pass(tmp_path):
    base, style, out = (tmp_path / f"{n}.safetensors" for n in ("base", "style", "out"))
    write(base, {"a.weight": np.array([[np.nan, np.inf, 1]], np.float16)})
    write(style, diff("a", (1, 3)))
    merge_files(base, [(style, 1)], out)
    assert np.isnan(read(out)["a.weight"][0, 0]) and read(out)["a.weight"][0, 1:].tolist() == [
        np.inf,
        2,
    ]


LOOP = """
import sys
from lycoris_cupy.io.merge import merge_files
while True:
    merge_files(sys.argv[1], [(sys.argv[2], 1.0)], sys.argv[1])
"""


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9])
def test_a_kill_leaves_the_old_file_or_the_new(tmp_path, share):
    """Another process adds 1 to every weight, in place, again and again, and is killed for real
    while it writes.
    """
    base, style = tmp_path / "base.safetensors", tmp_path / "style.safetensors"
    write(base, {f"l{i}.weight": np.zeros((256, 512), np.float32) for i in range(12)})
    write(style, {k: v for i in range(12) for k, v in diff(f"l{i}", (256, 512)).items()})
    size = os.path.getsize(base)
    child = subprocess.Popen(
        [sys.executable, "-c", LOOP, str(base), str(style)], start_new_session=True
    )
    try:
        end = time.monotonic() + 30
        while time.monotonic() < end:
            assert child.poll() is None, "the merge failed"
            sizes = [os.path.getsize(p) for p in tmp_path.glob(".lycoris-*.tmp") if p.exists()]
            if sizes and sizes[0] >= share * size and (share == 0 or sizes[0] < size):
                break
        else:
            raise AssertionError("no write was seen")
    except FileNotFoundError:
        pass  # renamed between two looks: as good a moment as any
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    with open_file(base) as file:
        note = json.loads(file.metadata.get(NOTE, "[]"))
        assert all((file[name] == len(note)).all() for name in file)
