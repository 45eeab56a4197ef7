"""AddReport: what it says of what was added, and that its numbers are those of the arrays and files."""

import json
import os

import numpy as np
import pytest

from lycoris_cupy import (
    ALGORITHMS,
    Conv2d,
    Engine,
    GroupNorm,
    LayerNorm,
    Linear,
    LycorisError,
    bf16,
    ops,
)
from lycoris_cupy.optim import AdamW
from lycoris_cupy.recipe import activation_bytes
from lycoris_cupy.recipe.layout import size_text
from lycoris_cupy.recipe.memory import OPTIMIZERS, _arrays

RNG = np.random.default_rng(0)


def weight(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def blocks(count: int, **options) -> Engine:
    layers = {"conv_in": Conv2d(weight(3, 3, 3, 32), padding=1)}
    for i in range(count):
        layers[f"blocks.{i}.norm1"] = LayerNorm(weight(32), weight(32))
        layers[f"blocks.{i}.attn.to_q"] = Linear(weight(32, 32), weight(32))
        layers[f"blocks.{i}.attn.to_k"] = Linear(weight(32, 32))
        layers[f"blocks.{i}.mlp.fc1"] = Linear(weight(32, 128))
        layers[f"blocks.{i}.mlp.fc2"] = Linear(weight(128, 32))
    return Engine(layers, **{"device": "cpu", **options})


TEXT = """\
style: 12 of 16 layers (4 lokr, 2 norm, 3 locon, 3 lokr with dora per output); 8,866 parameters, 27.82% of the network's 31,872; file 21.9 kB in bf16

layer                    shape                             algorithm                  rank  alpha  scale  parameters   share
conv_in                  Conv2d(3 -> 32, 3x3 padding 1x1)  lokr                          2      6      3          74    8.6%
blocks.#.norm1      x 2  LayerNorm(32)                     norm                                        1         128  100.0%
blocks.#.attn.to_q  x 3  Linear(32 -> 32)                  lokr                                        1         240    7.6%  both sides full: scale 1 whatever alpha says
blocks.#.mlp.fc1    x 3  Linear(32 -> 128)                 locon                        16      6  0.375       7,680   62.5%
blocks.#.mlp.fc2    x 3  Linear(128 -> 32)                 lokr with dora per output     5      6    1.2         744    6.1%

targets '*': 16 layers, 12 taken
exclude '*.to_k': 3 layers, 3 left out
exclude 'blocks.1.norm1': 1 layer, 1 left out
override '*.fc1': 3 layers, 3 changed
override '*.fc2': 3 layers, 3 changed
override '*.to_q': 3 layers, 3 changed

training: factors 17.9 kB, gradients 35.5 kB, masters 35.5 kB, constants of the weights 396 B; optimizer's state: SGD 35.5 kB, Lion 35.5 kB, AdamW 70.9 kB, ScheduleFreeAdamW 106.4 kB, Prodigy 141.9 kB
activations are not in it: recipe.activation_bytes(engine, *inputs)
"""


def test_the_text():
    engine = blocks(3)
    report = engine.add(
        "style",
        {
            "algorithm": "lokr",
            "rank": 3,
            "alpha": 6,
            "conv_rank": 2,
            "factor": 4,
            "exclude": ["*.to_k", "blocks.1.norm1"],
            "train_norm": True,
            "override": {
                "*.fc1": {"algorithm": "locon", "rank": 16},
                "*.fc2": {"rank": 5, "dora": "output"},
                "*.to_q": {"full_matrix": True},
            },
        },
    )
    assert report.text() + "\n" == str(report) + "\n" == TEXT
    assert report.summary() in repr(report)
    full = report.text(full=True)
    assert all(f"\n{name} " in full for name in report) and "#" not in full
    assert full.count("\n") > str(report).count("\n")


def test_what_is_passed_over():
    engine = blocks(3)
    text = engine.add("a", "locon", ["blocks.*"]).text()
    assert "\npassed over:\n  blocks.#.norm1 x 3: locon does not sit on LayerNorm(32): " in text
    full = engine.add("b", "locon", ["blocks.*"]).text(full=True)
    assert "\n  blocks.1.norm1: locon does not sit on LayerNorm(32): train_norm = true puts" in full


@pytest.mark.parametrize("options", [{}, {"dora": "output"}])
def test_notes(options):
    """Which layers got a Tucker core, and where a rank and an alpha have no effect."""
    layers = {"a": Conv2d(weight(3, 3, 12, 8)), "b": Linear(weight(12, 8))}
    report = Engine(layers, device="cpu").add("x", "locon", tucker=True, **options)
    assert [row.note for row in report.rows] == ["Tucker core", ""]
    report = Engine(layers, device="cpu").add("x", "lokr", rank=99, **options)
    assert all(row.note.startswith("both sides full: scale 1 whatever") for row in report.rows)


def test_many_layers_stay_short():
    layers = {f"l.{'x' * (i + 1)}": Linear(weight(4, 4)) for i in range(60)}
    report = Engine(layers, device="cpu").add("a", "locon", rank=1)
    assert "and 20 more rows: text(full=True) has all" in report.text()
    assert "more rows" not in report.text(full=True) and f"l.{'x' * 60} " in report.text(full=True)


def test_it_is_the_sequence_of_the_layers():
    report = blocks(2).add("a", "locon", [":mlp"])
    names = ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "blocks.1.mlp.fc1", "blocks.1.mlp.fc2"]
    assert report == names and list(report) == names and report[0] == names[0]
    assert report[1:3] == names[1:3] and len(report) == 4 and names[3] in report
    assert report != names[:3] and report != "blocks" and report != 3
    plain = json.loads(json.dumps(report.as_dict()))
    assert [row["layer"] for row in plain["rows"]] == names
    assert plain["parameters"] == report.parameters and plain["memory"]["states"]["AdamW"] > 0
    assert plain["selected"] == [{"role": "targets", "selector": ":mlp", "matched": 4, "acts": 4}]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", ["bf16", "f64"])
def test_parameters_and_file_size_are_those_of_arrays_and_file(algorithm, dtype, tmp_path):
    layers = {
        "a.linear": Linear(weight(12, 8), weight(8)),
        "b.conv": Conv2d(weight(3, 3, 12, 8)),
        "c.norm": GroupNorm(weight(8), groups=2),
        "d": Conv2d(weight(1, 1, 12, 8)),
    }
    if algorithm == "oft-peft":
        del layers["b.conv"]
    engine = Engine(layers, device="cpu", dtype=dtype)
    report = engine.add("x", algorithm, rank=2)
    held = [array for factors in engine.parameters("x").values() for array in factors.values()]
    assert report.parameters == sum(array.size for array in held)
    assert report.memory.factors == sum(array.nbytes for array in held)
    assert report.base_parameters == sum(
        layer.weight.size + (0 if layer.bias is None else layer.bias.size)
        for layer in layers.values()
    )
    engine.save_adapter("x", tmp_path / "x.safetensors")
    assert report.file_bytes == os.path.getsize(tmp_path / "x.safetensors")
    assert report.dtype == dtype


def test_file_size_where_layers_differ(tmp_path):
    engine = blocks(4, dtype="f32")
    override = {":mlp": {"algorithm": "ia3"}, "*.to_q": {"algorithm": "lokr", "dora": "input"}}
    report = engine.add("x", "locon", train_norm=True, override=override)
    engine.save_adapter("x", tmp_path / "x.safetensors")
    assert report.file_bytes == os.path.getsize(tmp_path / "x.safetensors")


@pytest.mark.parametrize("dtype, wide", [("bf16", 4), ("f32", 4), ("f64", 8)])
def test_memory_of_training(dtype, wide):
    """State of an optimizer, counted in its own arrays."""
    slots = {"SGD": 1, "Lion": 1, "AdamW": 2, "ScheduleFreeAdamW": 3, "Prodigy": 4}
    assert {kind.__name__ for kind in OPTIMIZERS} == slots.keys()
    engine = blocks(1, dtype=dtype)
    report = engine.add("x", "locon", [":attention"], rank=3)
    memory, count = report.memory, report.parameters
    assert memory.masters == memory.gradients == wide * count and memory.constants == 0
    for name, each in slots.items():
        assert memory.states[name] == each * wide * count, name
    assert memory.total("AdamW") == memory.factors + 4 * wide * count
    with pytest.raises(LycorisError, match="'adamw' is unknown: use one of SGD, Lion, AdamW"):
        memory.total("adamw")
    optimizer = AdamW(engine.parameters("x"))
    arrays = [*optimizer.masters["blocks.0.attn.to_q"].values()]
    assert all(array.dtype.itemsize == wide for array in arrays)
    decomposed = engine.add("y", "locon", ["*.to_q"], rank=3, dora="output")
    assert decomposed.memory.constants == 32 * wide + wide  # |W|^2 of each output, alpha / rank


def chain(device, dtype="f64"):
    layers = {"a": Linear(weight(16, 24)), "b": Linear(weight(24, 8))}
    return Engine(layers, device=device, dtype=dtype)


def test_activations_are_what_the_tape_keeps(device):
    """Of two layers nothing, as their weights are frozen; with a LoCon their inputs, for the
    gradient of down, and the rank's values, for that of up. No output, and no layer's own array.
    """
    engine, x = chain(device), weight(128, 16).astype(np.float64)
    assert activation_bytes(engine, x) == 0
    engine.add("s", "locon", rank=2)
    assert _within(activation_bytes(engine, x), 128 * (16 + 24 + 2 + 2) * 8, device)
    twice = activation_bytes(engine, np.concatenate([x, x]))
    assert _within(twice, 256 * (16 + 24 + 2 + 2) * 8, device)
    text = engine.add("t", "locon", rank=2).text(activations=twice)
    assert f"activations {size_text(twice)}" in text and "are not in it" not in text


def _within(found: int, expected: int, device: str) -> bool:
    """To the byte on the CPU. CuPy hands out multiples of 512, and its routes may keep a cast."""
    return found == expected or (device != "cpu" and expected < found < 1.25 * expected)


def test_activations_between_layers_and_in_views():
    """Functions between layers keep their own; two views of one buffer count once."""
    slope = np.full(24, 0.25)

    def topology(call, x):
        h = call("a", x)
        curved = ops.silu(ops.reshape(h, (5 * 24,)))
        return call("b", ops.add(ops.prelu(h, slope), ops.reshape(curved, (5, 24))))

    layers = {"a": Linear(weight(16, 24)), "b": Linear(weight(24, 8))}
    engine = Engine(layers, topology, device="cpu", dtype="f64")
    x = weight(5, 16).astype(np.float64)
    found = activation_bytes(engine, x)
    assert found == 5 * 24 * 8 + slope.nbytes


def test_arrays_are_found_wherever_they_hide():
    one, two, three = np.ones(3), np.ones(4, bf16), np.ones(5)

    def closed(g, default=two):
        return g * one + default

    held = [{"a": (closed, [three])}, 3, "text", None, closed]
    assert sorted(array.size for array in _arrays(held)) == [3, 4, 5]


@pytest.mark.parametrize(
    "count, text",
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (23_744, "23.7 kB"),
        (4_000_000_000, "4.0 GB"),
        (7_000_000_000_000, "7.0 TB"),
    ],
)
def test_sizes(count, text):
    assert size_text(count) == text
