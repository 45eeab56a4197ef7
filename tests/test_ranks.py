"""Ranks that act or not: DyLoRA's blocks and cuts, T-LoRA's mask over the noise level."""

import numpy as np
import pytest

from lycoris_cupy import (
    Conv2d,
    DyLoRA,
    Engine,
    LayerShape,
    Linear,
    LoCon,
    LycorisError,
    ShapeError,
    TLoRA,
    draw_block,
    ops,
    to_device,
)
from lycoris_cupy.adapters import LoHa, truncated
from lycoris_cupy.io.adapter_file import read_adapter, write_adapter
from lycoris_cupy.io.merge import merge_files
from lycoris_cupy.io.safetensors import open_file, write
from lycoris_cupy.tape import Tape
from tests.arrays import host

RNG = np.random.default_rng(3)


def random(engine, name, size=0.5):
    values = {
        layer: {n: RNG.standard_normal(v.shape) * size for n, v in p.items()}
        for layer, p in engine.parameters(name).items()
    }
    engine.set_parameters(name, values)
    return values


# -- DyLoRA


def dylora(rank=6, alpha=3.0):
    layer = Conv2d(RNG.standard_normal((3, 3, 4, 5)), RNG.standard_normal(5), padding=1)
    engine = Engine({"a": layer}, device="cpu", dtype="f64")
    engine.add("d", "dylora", rank=rank, alpha=alpha)
    return engine, random(engine, "d")["a"], RNG.standard_normal((2, 4, 5, 4))


@pytest.mark.parametrize("ranks", [(0, 2), (2, 4), (4, 6), (3, 4), (0, 6), (5, 6)])
def test_a_block_of_ranks(ranks):
    """Ranks below the last act, at alpha / last; those from the first on are trained."""
    engine, factors, x = dylora()
    first, last = ranks
    y, pullback = engine.vjp(x, ranks=ranks)
    cut = Engine(engine.layers, device="cpu", dtype="f64")
    cut.add("d", "locon", rank=last, alpha=3.0)
    down, up = factors["down"][..., :last], factors["up"][..., :last, :]
    cut.set_parameters("d", {"a": {"down": down, "up": up}})
    expected, expected_pullback = cut.vjp(x)
    assert np.abs(y - expected).max() < 1e-12
    assert np.array_equal(engine.forward(x, ranks=ranks), y)
    dy = RNG.standard_normal(y.shape)
    dx, grads = pullback(dy)
    expected_dx, expected_grads = expected_pullback(dy)
    assert np.abs(dx - expected_dx).max() < 1e-12
    for name, axis in (("down", -1), ("up", -2)):
        found = np.moveaxis(grads["d"]["a"][name], axis, 0)
        wanted = np.moveaxis(expected_grads["d"]["a"][name], axis, 0)
        assert np.abs(found[first:last] - wanted[first:]).max() < 1e-12
        assert not found[:first].any() and not found[last:].any()


def test_without_a_block_all_ranks_act():
    engine, factors, x = dylora()
    assert np.abs(engine.forward(x) - engine.forward(x, ranks=(0, 6))).max() < 1e-12


def test_draws_are_reproducible_and_even():
    draw = [draw_block(np.random.default_rng(7), 8, block_size=2) for _ in range(3)]
    assert len(set(draw)) == 1
    rng = np.random.default_rng(0)
    seen = [draw_block(rng, 7, block_size=3) for _ in range(600)]
    assert set(seen) == {(0, 3), (3, 6), (6, 7)}
    assert min(seen.count(block) for block in set(seen)) > 150
    with pytest.raises(LycorisError, match="block_size is 9, expected 1 to the rank, 8"):
        draw_block(rng, 8, block_size=9)


def test_training_at_random_ranks_is_written_and_cut(tmp_path):
    """A file keeps LyCORIS's form, is read as DyLoRA again, and cut to any rank it computes what
    that rank was trained at; alpha does not change.
    """
    engine, factors, x = dylora()
    engine.save_adapter("d", tmp_path / "all.safetensors")
    with open_file(tmp_path / "all.safetensors") as file:
        assert file.shape("lycoris_a.lora_up.weight") == (5, 6)  # no axes of a kernel
        assert file.shape("lycoris_a.lora_down.weight") == (6, 4, 3, 3)
    for rank in (1, 4, 6):
        engine.save_adapter("d", tmp_path / "cut.safetensors", rank=rank)
        trained = engine.forward(x, ranks=(0, rank))
        for path, option in (("cut", None), ("all", rank)):
            other = Engine(engine.layers, device="cpu", dtype="f64")
            report = other.attach(tmp_path / f"{path}.safetensors", name="d", rank=option)
            (layer,) = report.layers
            assert (layer.algorithm, layer.rank, layer.alpha) == ("dylora", rank, 3.0)
            assert np.abs(other.forward(x) - trained).max() < 1e-12


def test_a_linear_dylora_is_told_by_the_metadata(tmp_path):
    shape = LayerShape.of_file((5, 4))
    adapter = DyLoRA(shape, 2, 1.0)
    p = {"down": np.ones((4, 2), np.float32), "up": np.ones((2, 5), np.float32)}
    write_adapter(tmp_path / "a.safetensors", {"a": (adapter, p)})
    assert read_adapter(tmp_path / "a.safetensors", {"a": shape})[0]["a"][0] == adapter
    with open_file(tmp_path / "a.safetensors") as file:
        write(tmp_path / "b.safetensors", {key: np.array(file[key]) for key in file})
    assert read_adapter(tmp_path / "b.safetensors", {"a": shape})[0]["a"][0] == LoCon(shape, 2, 1.0)


@pytest.mark.parametrize(
    "adapter, rank, message",
    [
        (LoHa(LayerShape.of_file((5, 4)), 2), 1, "loha cannot be cut to a rank"),
        (LoCon(LayerShape.of_file((5, 4, 3, 3)), 2, tucker=True), 1, "locon cannot be cut"),
        (LoCon(LayerShape.of_file((5, 4)), 2), 3, "rank is 3, expected 1 to the adapter's, 2"),
        (LoCon(LayerShape.of_file((5, 4)), 2), 0, "rank is 0, expected 1"),
    ],
)
def test_what_cannot_be_cut(adapter, rank, message):
    with pytest.raises(LycorisError, match=message):
        truncated(adapter, adapter.init(RNG), rank)


@pytest.mark.parametrize(
    "ranks, message",
    [
        ((3, 3), "ranks 3 to 3 do not lie in the rank 6"),
        ((0, 7), "ranks 0 to 7 do not lie"),
        ((0,), "expected two whole numbers"),
        ((0.0, 2.0), "expected two whole numbers"),
    ],
)
def test_blocks_that_are_refused(ranks, message):
    engine, _, x = dylora()
    with pytest.raises(LycorisError, match=message):
        engine.forward(x, ranks=ranks)


# -- T-LoRA


def tlora(device="cpu", dtype="f64", **options):
    rng = np.random.default_rng(4)
    layers = {
        "a": Linear(rng.standard_normal((12, 7)), rng.standard_normal(7)),
        "b": Conv2d(rng.standard_normal((1, 1, 7, 9)), stride=2),
    }

    def topology(call, x):
        return call("b", call("a", x))

    engine = Engine(layers, topology, device=device, dtype=dtype)
    engine.add("t", "tlora", rank=4, alpha=2.0, **options)
    return engine, rng.standard_normal((3, 5, 4, 12))


def masked(engine, level, x):
    """The network of one sample at one noise level, from the definition."""
    for name in ("a", "b"):
        layer, adapter = engine.layers[name], engine.attachments["t"].adapters[name]
        p, weight = engine.parameters("t")[name], layer.matrix[0]
        clear = (1 - level) ** adapter.exponent
        active = adapter.least_rank + int(clear * (4 - adapter.least_rank))
        u, s, v = np.linalg.svd(weight, full_matrices=False)
        keep = np.arange(4) < active
        q, up = p["q"].reshape(-1, 4), p["p"].reshape(4, -1)
        new = (q * p["lambda"] * keep) @ up
        old = (u[:, :4] * s[:4] * keep) @ v[:4]
        x = x[:, ::2, ::2] if name == "b" else x
        bias = 0 if layer.bias is None else layer.bias
        x = x @ (weight + 0.5 * (new - old)) + bias
    return x


@pytest.mark.parametrize("options", [{}, {"least_rank": 2, "exponent": 2.0}, {"least_rank": 0}])
def test_ranks_fall_silent_with_the_noise(options):
    engine, x = tlora(**options)
    random(engine, "t")
    levels = np.array([0.0, 0.4, 1.0])
    y = engine.forward(x, noise_level=levels)
    for n, level in enumerate(levels):
        expected = masked(engine, level, x[n : n + 1])
        assert np.abs(y[n] - expected[0]).max() < 1e-10
        alone = engine.forward(x[n : n + 1], noise_level=level)
        assert np.abs(alone - y[n : n + 1]).max() < 1e-12
    assert np.abs(engine.forward(x) - engine.forward(x, noise_level=0.0)).max() < 1e-12


def test_it_starts_from_nothing(device):
    engine, x = tlora(device, "bf16")
    base = Engine(engine.layers, engine.topology, device=device)
    y, plain = (host(e.forward(x)) for e in (engine, base))
    assert np.abs(y - plain).max() <= 2.0**-6 * np.abs(plain).max()
    exactly, x = tlora()
    base = Engine(exactly.layers, exactly.topology, device="cpu", dtype="f64").forward(x)
    assert np.abs(exactly.forward(x) - base).max() < 1e-12


def test_gradients_at_a_noise_level():
    """Silent ranks get none, and the others those of a central difference."""
    engine, x = tlora()
    values = random(engine, "t")
    levels = np.array([0.5, 0.9, 0.7])
    y, pullback = engine.vjp(x, noise_level=levels)
    dy = RNG.standard_normal(y.shape)
    dx, grads = pullback(dy)
    assert not grads["t"]["a"]["lambda"][2:].any()
    step = 2.0**-14
    for layer, factor in (("a", "q"), ("a", "lambda"), ("b", "p")):
        d = RNG.standard_normal(values[layer][factor].shape)
        ends = []
        for sign in (1, -1):
            moved = {k: dict(v) for k, v in values.items()}
            moved[layer][factor] = values[layer][factor] + sign * step * d
            engine.set_parameters("t", moved)
            ends.append(float((engine.forward(x, noise_level=levels) * dy).sum()))
        slope = (ends[0] - ends[1]) / (2 * step)
        assert slope == pytest.approx(float((grads["t"][layer][factor] * d).sum()), rel=1e-6)


def test_a_captured_forward_reads_the_level(device):
    engine, x = tlora(device, "bf16")
    random(engine, "t")
    step = engine.capture(x, noise_level=np.zeros(3))
    for levels in (np.array([0.0, 0.4, 1.0]), np.ones(3)):
        found = to_device(step(x, noise_level=levels), "cpu").copy()
        assert found.tobytes() == to_device(engine.forward(x, noise_level=levels), "cpu").tobytes()
    with pytest.raises(LycorisError, match="captured with noise_level, called with none"):
        step(x)


def test_saved_and_merged(tmp_path):
    engine, x = tlora()
    random(engine, "t")
    engine.save_adapter("t", tmp_path / "t.safetensors", dtype=np.float64)
    other = Engine(engine.layers, engine.topology, device="cpu", dtype="f64")
    other.attach(tmp_path / "t.safetensors")
    y = engine.forward(x)
    assert np.abs(other.forward(x) - y).max() < 1e-12
    assert np.abs(engine.merged().forward(x) - y).max() < 1e-12
    base = {
        "a.weight": np.ascontiguousarray(engine.layers["a"].weight.T),
        "b.weight": np.ascontiguousarray(engine.layers["b"].weight.transpose(3, 2, 0, 1)),
    }
    write(tmp_path / "base.safetensors", base)
    out = tmp_path / "out.safetensors"
    merge_files(tmp_path / "base.safetensors", [(tmp_path / "t.safetensors", 1.0)], out)
    with open_file(out) as file:
        assert np.abs(file["a.weight"].T - engine.merged().layers["a"].weight).max() < 1e-12


@pytest.mark.parametrize(
    "given, error, message",
    [
        (
            {"noise_level": [0.1, 0.2]},
            ShapeError,
            r"noise level has shape \(2,\).*\(1,\) or \(3,\)",
        ),
        ({"noise_level": 1.5}, LycorisError, "from 1.5 to 1.5, expected 0 .*divide the timestep"),
        ({"noise_level": np.zeros((3, 1))}, ShapeError, r"noise_level has shape \(3, 1\)"),
        ({"ranks": (0, 2)}, LycorisError, "ranks, which no attached adapter reads .*noise_level"),
        ({"level": 1.0}, LycorisError, "forward was given level, which no attached adapter reads"),
    ],
)
def test_conditions_that_are_refused(given, error, message):
    engine, x = tlora()
    with pytest.raises(error, match=message):
        engine.forward(x, **given)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (
            lambda: TLoRA(LayerShape.of_file((6, 4, 3, 3)), 2),
            ShapeError,
            "1x1 convolutions without",
        ),
        (
            lambda: TLoRA(LayerShape.of_file((6, 4)), 2, least_rank=3),
            LycorisError,
            "least_rank is 3",
        ),
        (lambda: ops.take_rows(np.zeros((2, 3)), 1, 3), ShapeError, "rows 1 to 3 do not lie in"),
        (lambda: ops.interleave(np.zeros(2), np.zeros(2), 0), ShapeError, "must be -1 or -2"),
        (lambda: ops.interleave(np.zeros((2, 3)), np.zeros((2, 4)), -1), ShapeError, "b has shape"),
        (
            lambda: ops.mask_ranks(np.zeros((2, 3)), Tape().watch(np.zeros(1))),
            LycorisError,
            "constant of the tape",
        ),
        (
            lambda: ops.mask_ranks(np.zeros((2, 3)), np.zeros(1), width=2),
            ShapeError,
            "do not fit",
        ),
    ],
)
def test_what_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
