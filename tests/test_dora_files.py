"""DoRA in files: shapes, the axis and who tells it, other dialects, the merge command."""

import json

import numpy as np
import pytest

from lycoris_cupy import Conv2d, Engine, Linear, bf16
from lycoris_cupy.adapters import DoRA, LoCon
from lycoris_cupy.adapters.rows import RowPart, Rows, slice_rows
from lycoris_cupy.attachment import Attachment
from lycoris_cupy.errors import FileFormatError, ShapeError
from lycoris_cupy.io.adapter_file import inspect_adapter, read_adapter
from lycoris_cupy.io.convert import convert_file
from lycoris_cupy.io.merge import merge_files
from lycoris_cupy.io.safetensors import open_file, write
from lycoris_cupy.layers import LayerShape
from tests import magnitudes
from tests.cases import KINDS, adapters_for
from tests.test_dora import FEW
from tests.test_law import draw, engine_with


def saved(tmp_path, engine, **options):
    path = tmp_path / "a.safetensors"
    engine.save_adapter("a", path, **options)
    return path


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("kind", [k for k in KINDS if k.name in FEW], ids=lambda k: k.name)
def test_a_saved_adapter_is_the_same_again(tmp_path, kind, axis):
    """Every form through a file and back: shapes as LyCORIS has them, magnitudes in f32 whatever
    dtype the factors get, and the merge command agrees with the engine.
    """
    outputs, inputs, *kernel = kind.weight
    for name, on in adapters_for(kind.shape).items():
        if not on.decomposable:
            continue
        adapter = DoRA.over(on, axis)
        layer, x, factors = draw(kind, adapter)
        layers = {"block.layer": layer}
        engine = Engine(layers, device="cpu", dtype="f32")
        engine.attachments["a"] = Attachment(
            {"block.layer": (adapter, factors)}, "cpu", np.float32, 1.0
        )
        path = saved(tmp_path, engine, dtype=bf16)
        ones = (1,) * len(kernel)
        with open_file(path) as file:
            key = "lycoris_block_layer.dora_scale"
            expected = (outputs, 1, *ones) if axis == "output" else (1, inputs, *ones)
            assert file.shape(key) == expected and file.dtype(key) == "F32"
            assert file.dtype(sorted(file)[-1]) == "BF16"
        again = Engine(layers, device="cpu", dtype="f32")
        report = again.attach(path, name="a", strength=0.7)
        assert report.layers[0].algorithm == f"{on.algorithm} with dora per {axis}"
        assert report.layers[0].scale == on.scale
        engine.strength["a"] = 0.7
        assert again.forward(x).tobytes() == engine.forward(x).tobytes(), name

        flat = layer.matrix.transpose(2, 1, 0).reshape(kind.weight)
        write(tmp_path / "base.safetensors", {"block.layer.weight": flat}, {})
        merge_files(tmp_path / "base.safetensors", [(path, 0.7)], tmp_path / "out.safetensors")
        with open_file(tmp_path / "out.safetensors") as file:
            found = file["block.layer.weight"]
        expected = magnitudes.adapted(layer.matrix, adapter, factors, 0.7)
        found = found.reshape(outputs, inputs, -1).transpose(2, 1, 0)
        # The file holds m in f32: half an ulp of the whole weight.
        assert np.abs(found - expected).max() < 2.0**-22 * np.abs(expected).max(), name


def square(axis_shape, metadata=None, shape=(8, 8, 3, 3)):
    rng = np.random.default_rng(0)
    kernel = shape[2:]
    tensors = {
        "lycoris_a.lora_up.weight": rng.standard_normal((shape[0], 2, *(1,) * len(kernel))),
        "lycoris_a.lora_down.weight": rng.standard_normal((2, shape[1], *kernel)),
        "lycoris_a.dora_scale": rng.uniform(1, 2, axis_shape),
    }
    return tensors, metadata or {}


@pytest.mark.parametrize(
    ("layer", "given", "axis"),
    [
        ((8, 6), (8, 1), "output"),
        ((8, 6), (1, 6), "input"),
        ((8, 6), (8,), "output"),
        ((8, 6), (6,), "input"),
        ((8, 6, 3, 3), (8, 1, 1, 1), "output"),
        ((8, 6, 3, 3), (1, 6, 1, 1), "input"),
        ((8, 6, 3, 3), (1, 8, 1, 1), "output"),
        ((8, 8), (8, 1), "output"),
        ((8, 8), (1, 8), "input"),
        ((8, 8, 3, 3), (8, 1, 1, 1), "output"),
        ((1, 6), (1, 1), "output"),
        ((8, 8), (8,), None),
        ((8, 8, 3, 3), (1, 8, 1, 1), None),
        ((1, 1), (1, 1), None),
    ],
)
def test_the_axis_is_told_by_the_shape(tmp_path, layer, given, axis):
    """and where it can mean both by metadata or the caller, else it is refused with both readings."""
    path, shapes = tmp_path / "a.safetensors", {"a": LayerShape.of_file(layer)}

    def axis_read(**options):
        return read_adapter(path, shapes, **options)[0]["a"][0].axis

    tensors, _ = square(given, shape=layer)
    write(path, tensors, {})
    if axis is not None:
        other = "input" if axis == "output" else "output"
        assert axis_read() == axis and axis_read(dora=other) == axis  # no option outvotes a shape
        return
    with pytest.raises(
        ShapeError,
        match=rf"can mean {layer[0]} magnitudes per output or {layer[1]} per input, .*dora='output'",
    ):
        axis_read()
    assert axis_read(dora="input") == "input" and axis_read(dora="output") == "output"
    for value, told in ((True, "output"), (False, "input"), ("False", "input")):
        args = json.dumps({"algo": "locon", "dora_wd": True, "wd_on_output": value})
        write(path, tensors, {"ss_network_args": args})
        assert axis_read() == told
    for metadata in ({"ss_network_args": "{"}, {"ss_network_args": "[]"}, {"other": "1"}):
        write(path, tensors, metadata)
        with pytest.raises(ShapeError, match="no metadata"):
            axis_read()


@pytest.mark.parametrize("axis", ["output", "input"])
def test_a_square_layer_survives_its_own_file(tmp_path, axis):
    engine = Engine({"a": Conv2d(np.ones((3, 3, 8, 8)), padding=1)}, device="cpu")
    engine.add("a", "locon", rank=2, dora=axis)
    path = saved(tmp_path, engine)
    again = Engine(engine.layers, device="cpu")
    again.attach(path, name="a")
    assert again.attachments["a"].adapters["a"].axis == axis
    assert inspect_adapter(path).layers[0].algorithm == f"locon with dora per {axis}"


@pytest.mark.parametrize("name", ["locon", "loha", "lokr w1 w2ab"])
@pytest.mark.parametrize("to", ["peft", "diffusers", "kohya"])
def test_conversion_keeps_the_decomposition(tmp_path, to, name):
    """Through another dialect, LoHa and LoKr as plain LoRA: the change inside the norm is rewritten
    and scaled there, the magnitudes pass as they are.
    """
    kind = next(k for k in KINDS if k.name == "conv3x3")
    adapter = DoRA.over(adapters_for(kind.shape)[name])
    layer, x, factors = draw(kind, adapter)
    layers = {"unet.block.layer": layer}
    engine = Engine(layers, device="cpu", dtype="f32")
    engine.attachments["a"] = Attachment(
        {"unet.block.layer": (adapter, factors)}, "cpu", np.float32, 1.0
    )
    base = layer.matrix.transpose(2, 1, 0).reshape(kind.weight)
    write(tmp_path / "base.safetensors", {"unet.block.layer.weight": base}, {})
    out = tmp_path / to
    algorithm = None if name == "locon" else "lora"
    convert_file(
        saved(tmp_path, engine), out, to, base=tmp_path / "base.safetensors", algorithm=algorithm
    )
    if to == "peft":
        assert json.loads((out / "adapter_config.json").read_text())["use_dora"] is True
    again = Engine(layers, device="cpu", dtype="f32")
    report = again.attach(out, name="a")
    assert report.layers[0].algorithm == "locon with dora per output"
    expected = engine.forward(x)
    assert np.abs(again.forward(x) - expected).max() < 2.0**-18 * np.abs(expected).max()


def test_what_other_programs_do_not_know_is_refused(tmp_path):
    engine = Engine({"a.b": Linear(np.ones((5, 3)))}, device="cpu")
    base = tmp_path / "base.safetensors"
    write(base, {"a.b.weight": np.ones((3, 5), np.float32)}, {})
    for name, axis, match in (
        ("loha", "output", "loha with dora per output, and peft knows dora on locon only"),
        ("locon", "input", "a magnitude of each input, and PEFT knows those of outputs only"),
    ):
        engine.add("a", name, rank=2, dora=axis)
        with pytest.raises(FileFormatError, match=match):
            convert_file(saved(tmp_path, engine), tmp_path / "out", "peft", base=base)
        engine.detach("a")


def test_rows_of_a_fused_layer():
    """A DoRA of q, k and v on a layer that holds all three: each norm is of its own rows."""
    rng = np.random.default_rng(0)
    weights = {n: rng.standard_normal((7, 4)) for n in "qkv"}
    for axis in ("output", "input"):
        shape = LayerShape.of_file((4, 7))
        parts, factors, expected = [], {}, []
        for i, (n, w) in enumerate(weights.items()):
            adapter = DoRA.over(LoCon(shape, 2, 3.0), axis)
            own = {k: rng.standard_normal(v.shape) for k, v in adapter.init(rng).items()}
            parts.append(RowPart(n, ((4 * i, 4 * i + 4),), adapter))
            factors |= {f"{n}.{k}": v for k, v in own.items()}
            expected.append(magnitudes.adapted(w[None], adapter, own, 0.7))
        fused = Linear(np.concatenate(list(weights.values()), axis=1))
        rows = Rows.of(fused.shape, parts)
        engine = engine_with(fused, rows, factors, strength=0.7)
        x = rng.standard_normal((3, 7))
        whole = np.concatenate(expected, axis=2)[0]
        assert np.abs(engine.forward(x) - x @ whole).max() < 1e-12
        assert np.abs(engine.merged().layers["layer"].weight - whole).max() < 1e-13


def test_a_fused_module_is_taken_apart_per_output_only():
    adapter = DoRA.over(LoCon(LayerShape.of_file((12, 7)), 2, 3.0))
    layer = Linear(np.random.default_rng(0).standard_normal((7, 12)))
    rng = np.random.default_rng(1)
    factors = {n: rng.standard_normal(v.shape) for n, v in adapter.init(rng).items()}
    part, own = slice_rows(adapter, factors, 4, 8)
    expected = magnitudes.adapted(layer.matrix, adapter, factors, 1.0)[..., 4:8]
    found = magnitudes.adapted(layer.matrix[..., 4:8], part, own, 1.0)
    assert np.abs(found - expected).max() < 1e-14
    with pytest.raises(ShapeError, match="locon with dora per input cannot be taken apart"):
        slice_rows(DoRA.over(adapter.on, "input"), factors, 4, 8)
