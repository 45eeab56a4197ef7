"""Diag-OFT, BOFT and PEFT's two: dialects, detection that refuses to guess, constraints, routes."""

import json
from pathlib import Path

import numpy as np
import pytest

from lycoris_cupy import (
    BOFT,
    Conv2d,
    DiagOFT,
    Engine,
    LayerShape,
    Linear,
    bf16,
    cli,
    ops,
    to_device,
)
from lycoris_cupy.adapters import PeftOFT
from lycoris_cupy.adapters.boft import power2_factorization
from lycoris_cupy.attachment import Attachment
from lycoris_cupy.errors import DtypeError, FileFormatError, LycorisError, MatchError, ShapeError
from lycoris_cupy.io.adapter_file import inspect_adapter, read_adapter, write_adapter
from lycoris_cupy.io.safetensors import open_file, write
from tests.arrays import drawn
from tests.cases import KINDS

RNG = np.random.default_rng(5)
SHAPE = LayerShape.of_file((12, 8))
ROTATIONS = Path(__file__).parent / "peer" / "peft-0.21.2-rotations"
PEFT = Path(__file__).parent / "peer" / "peft-0.21.2"


def blocks(*shape):
    return (RNG.standard_normal(shape) * 0.3).astype(np.float32)


def exact(*shape):
    return drawn(RNG, *shape)


def file_of(folder, prefix, alpha, metadata=None, **more):
    tensors = {f"{prefix}a.oft_blocks": blocks(3, 4, 4)}
    if alpha is not None:
        tensors[f"{prefix}a.alpha"] = np.array(alpha, np.float32)
    tensors |= {f"{prefix}a.{key}": value for key, value in more.items()}
    write(folder / "a.safetensors", tensors, metadata or {})
    return folder / "a.safetensors"


def read(path, **told):
    return read_adapter(path, {"a": SHAPE}, **told)[0]["a"][0]


RESCALE = {"rescale": np.ones((12, 1), np.float32)}


@pytest.mark.parametrize(
    "prefix, alpha, metadata, more, dialect, limit",
    [
        ("lycoris_", 0.0, {}, {}, "oft:lycoris", None),
        ("lycoris_", 0.5, {}, {}, "oft:lycoris", 6.0),
        ("lycoris_", None, {}, {}, "oft:lycoris", None),
        ("oft_unet_", 0.0, {}, {}, "oft:kohya", 0.0),
        ("oft_unet_", 0.5, {}, {}, "oft:kohya", 6.0),
        ("lora_unet_", 0.5, {}, {}, "oft:lycoris", 6.0),  # both readings are the same
        ("lora_unet_", 0.0, {}, RESCALE, "oft:lycoris", None),  # kohya has no rescale
        ("lora_unet_", 0.0, {"ss_network_module": "lycoris.kohya"}, {}, "oft:lycoris", None),
        ("lora_unet_", 0.0, {"ss_network_module": "networks.oft"}, {}, "oft:kohya", 0.0),
    ],
)
def test_whose_file_it_is(tmp_path, prefix, alpha, metadata, more, dialect, limit):
    adapter = read(file_of(tmp_path, prefix, alpha, metadata, **more))
    assert (adapter.dialect, adapter.limit) == (dialect, limit)


@pytest.mark.parametrize("alpha", [0.0, None])
def test_what_is_not_guessed(tmp_path, alpha):
    path = file_of(tmp_path, "lora_unet_", alpha)
    with pytest.raises(
        FileFormatError,
        match=r"without a constraint \(oft:lycoris\) or none at all \(oft:kohya\): say which with "
        "dialect='oft:lycoris' or dialect='oft:kohya'",
    ):
        read(path)
    assert read(path, dialect="oft:lycoris").limit is None
    assert (
        inspect_adapter(path).unmatched
        and not inspect_adapter(path, dialect="oft:lycoris").unmatched
    )
    if alpha is None:
        with pytest.raises(FileFormatError, match="alpha is missing: in oft:kohya it is"):
            read(path, dialect="oft:kohya")
    else:
        assert read(path, dialect="oft:kohya").limit == 0


def test_the_command_line_is_told_the_dialect(tmp_path, capsys):
    path = str(file_of(tmp_path, "lora_unet_", 0.0))
    base, out = str(tmp_path / "base.safetensors"), str(tmp_path / "out.safetensors")
    write(tmp_path / "base.safetensors", {"a.weight": blocks(12, 8)})
    assert cli.main(["merge", base, path, "-o", out]) == 2
    assert "say which with dialect=" in capsys.readouterr().err
    assert cli.main(["inspect", path]) == 1
    for dialect, moved in (("oft:kohya", False), ("oft:lycoris", True)):
        told = ["--dialect", dialect]
        assert cli.main(["inspect", path, *told]) == 0
        assert f"{dialect}, blocks of 4" in capsys.readouterr().out
        assert cli.main(["merge", base, path, "-o", out, *told]) == 0
        with open_file(base) as before, open_file(out) as after:
            assert (before["a.weight"] != after["a.weight"]).any() == moved


def test_kohyas_zero_holds_the_rotations(tmp_path):
    path = file_of(tmp_path, "oft_unet_", 0.0)
    layer = Linear(RNG.standard_normal((8, 12)), RNG.standard_normal(12))
    engine, x = Engine({"a": layer}, device="cpu", dtype="f64"), RNG.standard_normal((3, 8))
    base = engine.forward(x)
    engine.attach(path)
    assert np.array_equal(engine.forward(x), base)
    engine.save_adapter("a", tmp_path / "b.safetensors")  # under its own prefix, and so read back
    with open_file(tmp_path / "b.safetensors") as file:
        assert all(key.startswith("oft_unet_a.") for key in file)
    assert read(tmp_path / "b.safetensors").dialect == "oft:kohya"


def test_a_prefix_that_means_another_dialect(tmp_path):
    adapter = DiagOFT.create(SHAPE, 4)
    params = {"blocks": blocks(3, 4, 4)}
    with pytest.raises(MatchError, match="'oft_unet_' would be read as another dialect than diag"):
        write_adapter(tmp_path / "a.safetensors", {"a": (adapter, params)}, prefix="oft_unet_")


def test_the_constraint_bounds_the_angles():
    free = DiagOFT(SHAPE, block_size=4)
    bound = DiagOFT(SHAPE, block_size=4, constraint=0.01)
    values = blocks(3, 4, 4).astype(np.float64)
    q = values - values.swapaxes(1, 2)
    assert bound.limit == 0.12 < np.linalg.norm(q)
    weight = RNG.standard_normal((1, 8, 12))
    clipped = {"blocks": values * 0.12 / (np.linalg.norm(q) + 1e-8)}
    one = np.ones(1)
    assert np.allclose(
        bound.delta_weight(weight, {"blocks": values}, one),
        free.delta_weight(weight, clipped, one),
        atol=1e-14,
    )


def test_a_rotation_keeps_lengths():
    """At strength 1 and without a rescale the rows of W' are as long as those of W, block by
    block; so are the weights of a butterfly as a whole.
    """
    weight = RNG.standard_normal((1, 8, 12))
    for adapter in (DiagOFT.create(SHAPE, 4), BOFT.create(SHAPE, block_size=6)):
        form = adapter.factors()["blocks"].plain
        p = {"blocks": blocks(*form).astype(np.float64)}
        changed = weight + adapter.delta_weight(weight, p, np.ones(1))
        assert np.abs(changed - weight).max() > 0.1
        assert np.allclose(np.linalg.norm(changed, axis=2), np.linalg.norm(weight, axis=2))


@pytest.mark.parametrize(
    "size, factor, block",
    [(64, 4, 4), (320, 16, 10), (640, -1, 640), (768, 8, 6), (1152, 32, 18), (3072, 64, 48)],
)
def test_power_of_two_blocks(size, factor, block):
    assert power2_factorization(size, factor) == block


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: power2_factorization(320, 8), ShapeError, "no even block size up to 8.*use 10 or"),
        (lambda: power2_factorization(37, -1), ShapeError, "an odd number has none"),
        (lambda: DiagOFT(SHAPE, block_size=5), ShapeError, "block size 5 does not divide the 12"),
        (lambda: DiagOFT(SHAPE, dialect="kohya"), LycorisError, "dialect is 'kohya', expected one"),
        (lambda: DiagOFT(SHAPE, rule="mine"), LycorisError, "rule is 'mine', expected one of base"),
        (lambda: DiagOFT(SHAPE, constraint=-1.0), FileFormatError, "constraint is -1.0"),
        (
            lambda: DiagOFT(SHAPE, dialect="oft:kohya", rescaled=True),
            FileFormatError,
            "rescale has no place in oft:kohya",
        ),
        (lambda: BOFT(SHAPE, block_size=4), ShapeError, "3 blocks of 4: boft needs a power of two"),
        (lambda: BOFT(SHAPE, block_size=6, dialect="oft:kohya"), LycorisError, "known as oft:lyc"),
        (
            lambda: PeftOFT.create(LayerShape.of_file((6, 4, 3, 3)), 2),
            ShapeError,
            "changes Conv2d.*even before it is trained",
        ),
        (lambda: ops.cayley(np.zeros((2, 3, 4))), ShapeError, "expected square blocks"),
        (lambda: ops.cayley(np.zeros((1, 2, 2)), limit=-1.0), ShapeError, "limit is -1.0"),
        (lambda: ops.rotation_columns(np.zeros((2, 3, 3)), np.zeros(5)), ShapeError, "rescale has"),
        (lambda: ops.turn_blocks(np.zeros((2, 6)), np.zeros((1, 4, 6))), ShapeError, "divisor of"),
        (
            lambda: ops.turn_blocks(np.zeros((2, 6), bf16), np.zeros((1, 2, 6))),
            DtypeError,
            "matrices are float64, expected float32",
        ),
        (lambda: ops.skew_blocks(np.zeros((2, 4))), ShapeError, "4 entries are not those above"),
    ],
)
def test_what_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_blocks_that_mix_groups_turn_the_weight():
    """Outputs of two groups read other inputs each: a block of both cannot turn them."""
    layer = Conv2d(RNG.standard_normal((3, 3, 2, 12)), padding=1, groups=3)
    assert DiagOFT(layer.shape, block_size=4).route == "outputs"
    assert DiagOFT(layer.shape, block_size=6).route == "delta"


def test_one_product_by_the_weight(monkeypatch):
    """Diag-OFT and (IA)^3 work on the layer's own product, together with others on the layer."""
    from lycoris_cupy import layers

    seen = []
    own = layers.product
    monkeypatch.setattr(layers, "product", lambda *a, **k: seen.append(1) or own(*a, **k))
    layer = Linear(RNG.standard_normal((8, 12)), RNG.standard_normal(12))
    engine = Engine({"a": layer}, device="cpu", dtype="f64")
    x, weight = RNG.standard_normal((3, 8)), layer.weight
    for name, algorithm in (("r", "diag-oft"), ("i", "ia3"), ("l", "locon"), ("s", "diag-oft")):
        engine.add(name, algorithm, rank=2, strength=0.7)
        values = {
            n: RNG.standard_normal(v.shape) * 0.3 for n, v in engine.parameters(name)["a"].items()
        }
        engine.set_parameters(name, {"a": values})
        attached = engine.attachments[name]
        weight = weight + attached.delta("a", layer)[0][0]
    y = engine.forward(x)
    assert len(seen) == 1
    assert np.abs(y - (x @ weight + layer.bias)).max() < 1e-12
    assert np.abs(engine.merged().forward(x) - y).max() < 1e-12


# -- PEFT

# (algorithm, kind of layer) of what runs and trains, but is no change of a weight.
NOT_MERGED = [("oft-peft", "conv3x3"), ("oft-peft", "conv3x3 stride")]


def network(base, device, dtype):
    def conv(name, **options):
        return Conv2d.from_torch(base[f"{name}.weight"], base.get(f"{name}.bias"), **options)

    layers = {
        "conv_in": conv("conv_in", padding=1),
        "conv_mid": conv("conv_mid", padding=1, stride=2),
        "conv_1x1": conv("conv_1x1"),
        "attn.to_q": Linear.from_torch(base["attn.to_q.weight"]),
        "attn.to_out": Linear.from_torch(base["attn.to_out.weight"], base["attn.to_out.bias"]),
    }

    def topology(call, x):
        h = call("conv_1x1", call("conv_mid", call("conv_in", x)))
        h = ops.reshape(h, (h.shape[0], h.shape[1] * h.shape[2], h.shape[3]))
        return call("attn.to_out", call("attn.to_q", h))

    return Engine(layers, topology, device=device, dtype=dtype)


def tensors(path):
    with open_file(path) as file:
        return {key: np.array(file[key]).astype(np.float64) for key in file}


@pytest.mark.parametrize("dtype, near", [("f64", 1e-6), ("bf16", 2.0**-6)])
@pytest.mark.parametrize("name", ["oft", "boft"])
def test_pefts_forward(name, dtype, near, device):
    """Its forward, over five layers; a convolution over space turns patches, as it does there. The
    peer computed in f32.
    """
    base, expect = (tensors(PEFT / name / f"{n}.safetensors") for n in ("base", "expect"))
    engine = network(base, device, dtype)
    engine.attach(PEFT / name, name="a")
    y = to_device(engine.forward(np.moveaxis(expect["x"], 1, -1)), "cpu").astype(np.float64)
    assert np.linalg.norm(y - expect["y"]) <= near * np.linalg.norm(expect["y"])
    assert np.linalg.norm(expect["y"] - expect["y_base"]) > 0.1 * np.linalg.norm(expect["y"])


@pytest.mark.parametrize("name", sorted(p.name for p in ROTATIONS.iterdir()))
def test_pefts_rotations(name, device):
    """Its forward and its merge, which agree here, of the series, shared blocks, and BOFT on a
    convolution. The peer computed in f32: sums of up to 144 products, each turned and rescaled.
    """
    expect = tensors(ROTATIONS / name / "expect.safetensors")
    linear = expect["weight"].ndim == 2
    options = {} if linear else {"padding": 1}
    build = Linear if linear else Conv2d
    layer = build.from_torch(expect["weight"], expect["bias"], **options)
    engine = Engine({"l": layer}, device=device, dtype="f64")
    engine.attach(ROTATIONS / name, name="a")
    x = expect["x"] if linear else np.moveaxis(expect["x"], 1, -1)
    y = to_device(engine.forward(x), "cpu")
    y = y if linear else np.moveaxis(y, -1, 1)
    assert np.abs(y - expect["y"]).max() <= 2.0**-24 * 16 * np.abs(expect["y"]).max() * 4
    merged = to_device(engine.merged().layers["l"].matrix, "cpu").transpose(2, 1, 0)
    near = 2.0**-24 * 16 * np.abs(expect["weight"]).max()
    assert np.abs(merged.reshape(expect["merged"].shape) - expect["merged"]).max() <= near


@pytest.mark.parametrize("terms", [5, 2, None])
@pytest.mark.parametrize("name", [kind for _, kind in NOT_MERGED])
def test_patches_are_trained_and_saved(tmp_path, name, terms):
    kind = next(kind for kind in KINDS if kind.name == name)
    layer = kind.build.from_torch(exact(*kind.weight), exact(kind.weight[0]), **kind.options)
    adapter = PeftOFT(layer.shape, block_size=4, terms=terms)
    engine = Engine({"a": layer}, device="cpu", dtype="f64")
    p = {"blocks": exact(*adapter.factors()["blocks"].plain) * 0.1}
    engine.attachments["o"] = Attachment({"a": (adapter, p)}, "cpu", np.float64, 0.7)
    x, step = np.moveaxis(exact(*kind.x), 1, -1), 2.0**-12
    y, pullback = engine.vjp(x)
    dy = RNG.standard_normal(y.shape)
    dx, grads = pullback(dy)
    d = RNG.standard_normal(x.shape)
    ends = [float((engine.forward(x + sign * step * d) * dy).sum()) for sign in (1, -1)]
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float((dx * d).sum()), rel=1e-8)
    d = RNG.standard_normal(p["blocks"].shape)
    ends = []
    for sign in (1, -1):
        engine.set_parameters("o", {"a": {"blocks": p["blocks"] + sign * step * d}})
        ends.append(float((engine.forward(x) * dy).sum()))
    found = float((grads["o"]["a"]["blocks"] * d).sum())
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(found, rel=1e-4)
    engine.set_parameters("o", {"a": p})
    engine.save_adapter("o", tmp_path / "o.safetensors")
    again = Engine({"a": layer}, device="cpu", dtype="f64")
    again.attach(tmp_path / "o.safetensors", strength=0.7)
    assert np.array_equal(again.forward(x), y)


def test_what_cannot_be_merged(tmp_path):
    base = tensors(PEFT / "oft" / "base.safetensors")
    engine = network(base, "cpu", "f64")
    engine.attach(PEFT / "oft", name="a")
    with pytest.raises(LycorisError, match="mixes positions of its input.*cannot be merged"):
        engine.merged()


def test_an_oft_without_its_configuration(tmp_path):
    with open_file(PEFT / "oft" / "adapter_model.safetensors") as file:
        key = "base_model.model.attn.to_q.oft_R.weight"
        write(tmp_path / "adapter_model.safetensors", {key: np.array(file[key])})
    shapes = {"attn.to_q": LayerShape.of_file((32, 32))}
    with pytest.raises(FileFormatError, match="in opposite senses.*dialect='oft:peft' or dialect="):
        read_adapter(tmp_path / "adapter_model.safetensors", shapes)
    for dialect, terms in (("oft:peft", 5), ("oft:peft-exact", None)):
        path = tmp_path / "adapter_model.safetensors"
        adapter = read_adapter(path, shapes, dialect=dialect)[0]["attn.to_q"][0]
        assert adapter.terms == terms
    for options, message in (
        ({"use_cayley_neumann": True, "num_cayley_neumann_terms": 1}, "is 1, expected 2 or more"),
        ({"use_cayley_neumann": True, "coft": True}, "coft is set"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(options))
        with pytest.raises(FileFormatError, match=message):
            read_adapter(tmp_path, shapes)


def test_series_and_transform_turn_in_opposite_senses():
    shape = LayerShape.of_file((5, 12))
    p = {"blocks": blocks(4, 3).astype(np.float64) * 0.001}
    weight, one = RNG.standard_normal((1, 12, 5)), np.ones(1)
    series, exact = (
        PeftOFT(shape, block_size=3, terms=terms).delta_weight(weight, p, one)
        for terms in (5, None)
    )
    assert np.abs(series + exact).max() < 1e-2 * np.abs(series).max()


def test_bf16_keeps_small_angles():
    """A rotation of 1e-3 is not lost in bf16, whose 1 + 1e-3 is 1."""
    layer = Linear(RNG.standard_normal((64, 12)).astype(bf16))
    engine, x = Engine({"a": layer}, device="cpu"), RNG.standard_normal((32, 64))
    engine.add("r", "diag-oft", rank=4)
    values = RNG.standard_normal((4, 3, 3)) * 1e-3
    engine.set_parameters("r", {"a": {"blocks": values}})
    adapter = engine.attachments["r"].adapters["a"]
    p = {"blocks": engine.parameters("r")["a"]["blocks"].astype(np.float64)}
    exact = adapter.delta_weight(layer.matrix.astype(np.float64), p, np.ones(1))[0]
    y = x.astype(bf16).astype(np.float64) @ exact
    part = adapter.apply(
        None, layer, x.astype(bf16), engine.parameters("r")["a"], np.ones(1, np.float32)
    )
    assert np.linalg.norm(part.astype(np.float64) - y) < 2.0**-6 * np.linalg.norm(y)
