"""PEFT's own folders: outputs and merged weights that PEFT 0.21.2 saved, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from lycoris_cupy import Conv1d, Conv2d, Engine, Linear, bf16, cli
from lycoris_cupy.errors import FileFormatError, LycorisError, ShapeError
from lycoris_cupy.io.adapter_file import inspect_adapter
from lycoris_cupy.io.merge import merge_files
from lycoris_cupy.io.safetensors import write
from lycoris_cupy.ops import reshape
from tests.arrays import host
from tests.bounds import assert_within, bound
from tests.cases import channels_last

PEFT = Path(__file__).parent / "peer" / "peft-0.21.2"
LAYERS = {
    "conv_in": {"padding": 1},
    "conv_mid": {"stride": 2, "padding": 1},
    "conv_1x1": {},
    "attn.to_q": None,
    "attn.to_out": None,
}
CASES = {  # algorithm as reported, scale of the first and of to_q
    "lora": ("locon", 1.5, 1.5),
    "lora_rs": ("locon", 3.0, 3.0),
    "lora_pattern": ("locon", 1.5, 4.0),
    "dora": ("locon with dora per output", 1.5, 1.5),
    "loha": ("loha", 5 / 3, 5 / 3),
    "loha_eff": ("loha", 5 / 3, 5 / 3),
    "lokr": ("lokr", 1.5, 1.5),
    "lokr_both": ("lokr", 3.0, 3.0),
    "lokr_eff": ("lokr", 1.5, 1.5),
    "ia3": ("ia3", 1.0, 1.0),
    "oft": ("oft-peft", 1.0, 1.0),
    "boft": ("boft-peft", 1.0, 1.0),  # on the two linear layers
}


def network(tensors, device="cpu", dtype="f64", prefix=""):
    """The peer's network: convolutions, then tokens through two linear layers."""

    def layer(name, options):
        weight = tensors[f"{prefix}{name}.weight"].astype(np.float64)
        bias = tensors.get(f"{prefix}{name}.bias")
        bias = None if bias is None else bias.astype(np.float64)
        if options is None:
            return Linear.from_torch(weight, bias)
        return Conv2d.from_torch(weight, bias, **options)

    def topology(call, x):
        for name in ("conv_in", "conv_mid", "conv_1x1"):
            x = call(name, x)
        x = reshape(x, (x.shape[0], -1, x.shape[-1]))
        return call("attn.to_out", call("attn.to_q", x))

    layers = {name: layer(name, options) for name, options in LAYERS.items()}
    return Engine(layers, topology, device=device, dtype=dtype)


def saved(name):
    """(base, expected values, input) of a case."""
    base, expect = (load_file(PEFT / name / f"{n}.safetensors") for n in ("base", "expect"))
    return base, expect, channels_last(expect["x"].astype(np.float64), False)


def size_of(base, merged, x):
    """The output over absolute values of both weights."""
    both = {k: np.abs(v) + np.abs(merged.get(f"merged.{k}", 0)) for k, v in base.items()}
    return network(both).forward(np.abs(x))


def test_all_cases_are_here():
    folders = {path.name for path in PEFT.iterdir() if path.is_dir()}
    assert folders == set(CASES) and len(folders) == 12


@pytest.mark.parametrize("dtype", ["f64", "f32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_output(name, dtype, device):
    base, expect, x = saved(name)
    engine = network(base, device, dtype)
    report = engine.attach(PEFT / name, name="a")
    assert len(report.layers) == (2 if name == "boft" else 5) and not report.unmatched
    algorithm, first, to_q = CASES[name]
    told = {layer.layer: layer for layer in report.layers}
    assert {layer.algorithm for layer in report.layers} == {algorithm}
    assert name == "boft" or told["conv_in"].scale == pytest.approx(first)
    assert told["attn.to_q"].scale == pytest.approx(to_q)
    y = host(engine.forward(x))
    # The peer computed in f32, and five layers round between them.
    kept = bf16 if dtype == "bf16" else np.float32
    size = size_of(base, expect, x)
    assert_within(y, expect["y"], bound(expect["y"], size, 400, kept, roundings=12), name)
    # The adapter is seen: without it the output is elsewhere.
    assert np.abs(expect["y_base"] - expect["y"]).max() > 0.04 * np.abs(expect["y"]).max()


@pytest.mark.parametrize("name", [name for name in CASES if name != "oft"])
def test_merged_weights(name, tmp_path):
    """Engine.merged, and the merge command on a folder. PEFT's OFT on kernels over space is no
    change of a weight, and the weights that PEFT merges there do not give its own output.
    """
    base, expect, _ = saved(name)
    engine = network(base, dtype="f32")
    engine.attach(PEFT / name, name="a")
    merged = engine.merged()
    merge_files(PEFT / name / "base.safetensors", [(PEFT / name, 1.0)], tmp_path / "out")
    file = load_file(tmp_path / "out")
    for key, value in expect.items():
        if not key.startswith("merged."):
            continue
        layer, what = key.removeprefix("merged.").rsplit(".", 1)
        limit = bound(value, np.abs(value) + np.abs(base[f"{layer}.{what}"]), 64, np.float32)
        assert_within(file[f"{layer}.{what}"], value, limit, f"{name} {key}")
        own = getattr(merged.layers[layer], what)
        if what == "weight":
            own = merged.layers[layer].matrix.transpose(2, 1, 0).reshape(value.shape)
        assert_within(own, value, limit, f"{name} {key} merged")


def test_oft_over_space_cannot_be_merged(tmp_path):
    base, *_ = saved("oft")
    engine = network(base)
    engine.attach(PEFT / "oft", name="a")
    with pytest.raises(LycorisError, match="mixes positions of its input"):
        engine.merged()
    base = PEFT / "oft" / "base.safetensors"
    with pytest.raises(LycorisError, match="mixes positions of its input"):
        merge_files(base, [(PEFT / "oft", 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", CASES)
def test_inspect_takes_the_folder(name, capsys):
    report = inspect_adapter(PEFT / name)
    assert len(report.layers) == (2 if name == "boft" else 5)
    assert report.coverage == 1 and report.dialects == ("peft",)
    assert cli.main(["inspect", str(PEFT / name)]) == 0
    assert CASES[name][0] in capsys.readouterr().out


def folder(tmp_path, tensors, **options):
    path = tmp_path / "adapter"
    path.mkdir(exist_ok=True)
    prefixed = {f"base_model.model.{k}": np.asarray(v, np.float32) for k, v in tensors.items()}
    write(path / "adapter_model.safetensors", prefixed, {"format": "pt"})
    (path / "adapter_config.json").write_text(json.dumps(options))
    return path


def test_a_lokr_of_two_full_sides_has_its_scale(tmp_path):
    """LyCORIS's forward takes 1 there, PEFT's alpha / r."""
    rng = np.random.default_rng(0)
    w1, w2 = rng.standard_normal((2, 3)), rng.standard_normal((4, 5))
    path = folder(
        tmp_path,
        {"a.lokr_w1": w1, "a.lokr_w2": w2},
        peft_type="LOKR", alpha=8, r=64, alpha_pattern={}, rank_pattern={"a": 32},
    )  # fmt: skip
    engine = Engine({"a": Linear.from_torch(np.zeros((8, 15)))}, device="cpu", dtype="f64")
    engine.attach(path)
    expected = 8 / 32 * np.kron(w1.astype(np.float32), w2.astype(np.float32))
    found = engine.merged().layers["a"].weight.T
    assert np.abs(found - expected).max() < 2.0**-22 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("shape", "feedforward", "on_input"),
    [
        ((8, 1), [], False),
        ((1, 6), ["mlp.fc"], True),
        ((1, 6), r"blocks\.\d+\.mlp\.fc", True),
        ((8, 1), ["other"], False),
    ],
)
def test_ia3_by_its_feedforward_modules(tmp_path, shape, feedforward, on_input):
    rng = np.random.default_rng(1)
    value = rng.uniform(0.5, 1.5, shape).astype(np.float32)
    path = folder(
        tmp_path,
        {"blocks.0.mlp.fc.ia3_l": value},
        peft_type="IA3",
        feedforward_modules=feedforward,
    )
    weight, bias = rng.standard_normal((8, 6)), rng.standard_normal(8)
    engine = Engine({"blocks.0.mlp.fc": Linear.from_torch(weight, bias)}, device="cpu", dtype="f64")
    engine.attach(path, name="a")
    x = rng.standard_normal((3, 6))
    # PEFT's forward multiplies the output with its bias in it, or the input.
    expected = (x * value) @ weight.T + bias if on_input else (x @ weight.T + bias) * value.T
    assert np.abs(engine.forward(x) - expected).max() < 1e-6
    merged = engine.merged()
    assert np.abs(merged.forward(x) - expected).max() < 1e-6


@pytest.mark.parametrize("square", [False, True])
def test_a_magnitude_is_per_output_whatever_its_shape_could_mean(tmp_path, square):
    outputs = 6 if square else 8
    rng = np.random.default_rng(2)
    path = folder(
        tmp_path,
        {
            "a.lora_A.weight": rng.standard_normal((2, 6, 3, 3)),
            "a.lora_B.weight": rng.standard_normal((outputs, 2, 1, 1)),
            "a.lora_magnitude_vector": rng.uniform(1, 2, (1, outputs, 1, 1)),
        },
        peft_type="LORA", r=2, lora_alpha=4, use_dora=True,
    )  # fmt: skip
    engine = Engine({"a": Conv2d(np.ones((3, 3, 6, outputs)))}, device="cpu")
    report = engine.attach(path, dora="input")  # the dialect knows better
    assert report.layers[0].algorithm == "locon with dora per output"
    assert report.layers[0].scale == 2


LORA = {"a.lora_A.weight": np.ones((2, 6)), "a.lora_B.weight": np.ones((8, 2))}
REFUSED = {
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4', which changes the base's weig"),
    "olora": ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
    "fan in": ({"fan_in_fan_out": True}, r"fan_in_fan_out is set: the base keeps its weights as \(in"),
    "tokens": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is set: it acts on some"),
    "rank": ({"r": 3}, "says rank 3 of 'a', its factors have rank 2"),
    "pattern": ({"rank_pattern": {"(": 2}}, r"rank_pattern '\(': "),
    "table": ({"alpha_pattern": [1]}, r"alpha_pattern is \[1\], expected an object"),
    "alpha": ({"lora_alpha": "4"}, "lora_alpha is '4', expected a finite number"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(tmp_path, what):
    options, match = REFUSED[what]
    path = folder(tmp_path, LORA, **({"peft_type": "LORA", "r": 2, "lora_alpha": 4} | options))
    engine = Engine({"a": Linear(np.ones((6, 8)))}, device="cpu")
    with pytest.raises(FileFormatError, match=match):
        engine.attach(path)
    assert not engine.attachments


def test_the_command_line_refuses_in_one_line(tmp_path, capsys):
    path = folder(tmp_path, LORA, peft_type="LORA", r=2, lora_alpha=4, use_qalora=True)
    assert cli.main(["inspect", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "use_qalora is set: its inputs are pooled" in error
    (path / "adapter_config.json").write_text("{")
    assert cli.main(["inspect", str(path)]) == 2
    assert "adapter_config.json: is not JSON" in capsys.readouterr().err


def test_a_folder_without_the_file_is_refused(tmp_path):
    with pytest.raises(FileFormatError, match=r"without adapter_model.safetensors, in which PEFT"):
        inspect_adapter(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(FileFormatError, match="adapter_model.bin is a pickle: save it again"):
        inspect_adapter(tmp_path)


def test_ia3_that_does_not_fit_is_refused(tmp_path):
    path = folder(tmp_path, {"a.ia3_l": np.ones((1, 6))}, peft_type="IA3", feedforward_modules=[])
    engine = Engine({"a": Linear(np.ones((6, 8)))}, device="cpu")
    with pytest.raises(
        ShapeError, match=r"ia3_l has shape \(1, 6\), expected \(8, 1\): the outputs"
    ):
        engine.attach(path)
    conv = Engine({"a": Conv1d(np.ones((3, 6, 8)))}, device="cpu")
    with pytest.raises(ShapeError, match=r"expected \(1, 8, 1\)"):
        conv.attach(path)


def test_strength_fades_from_the_base(tmp_path):
    base, _, x = saved("dora")
    engine = network(base, dtype="bf16")
    before = engine.forward(x).tobytes()
    engine.attach(PEFT / "dora", name="a", strength=0.0)
    assert engine.forward(x).tobytes() == before
    shutil.copytree(PEFT / "dora", tmp_path / "copy")
    again = network(base, dtype="bf16")
    again.attach(tmp_path / "copy", strength=1.0)
    engine.strength["a"] = 1.0
    assert again.forward(x).tobytes() == engine.forward(x).tobytes()
