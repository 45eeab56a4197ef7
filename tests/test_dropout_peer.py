"""LyCORIS in training, with its random draws replaced by our masks, gives what we give; see make.py
beside the values.
"""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lycoris_cupy import Conv2d, Engine, LayerNorm, Linear
from lycoris_cupy.arrays import f64
from tests import masks
from tests.cases import PEER, channels_first, channels_last

FOLDER = PEER.parent / "lycoris-4.1.3-dropout"
TOLD = json.loads((FOLDER / "cases.json").read_text())
VALUES = load_file(FOLDER / "values.safetensors")


def of(name, part):
    """The tensors of a case under a prefix."""
    start = f"{name}.{part}"
    return {key[len(start) :]: v for key, v in VALUES.items() if key.startswith(start)}


SAME = [name for name in TOLD["cases"] if not name.startswith("other-")]


def engine_of(name, tmp_path):
    """A case: the engine with its adapter, y, x, and whether x has no space to be turned."""
    case, base = TOLD["cases"][name], of(name, "base.")
    weight, bias = (base[k].astype(np.float64) for k in ("weight", "bias"))
    if case["layer"] == "norm":
        layer = LayerNorm(weight, bias)
    elif case["layer"] == "conv":
        layer = Conv2d.from_torch(weight, bias, padding=1)
    else:
        layer = Linear.from_torch(weight, bias)
    flat = case["layer"] != "conv"
    path = tmp_path / "a.safetensors"
    save_file({f"lycoris_layer.{k}": v for k, v in of(name, "adapter.").items()}, path)
    engine = Engine({"layer": layer}, device="cpu", dtype=f64)
    engine.attach(path, strength=TOLD["strength"], rule="reference")
    return engine, VALUES[f"{name}.y"], channels_last(VALUES[f"{name}.x"], flat), flat


@pytest.mark.parametrize("name", SAME)
def test_the_peers_forward_with_the_same_masks(name, tmp_path):
    engine, expected, x, flat = engine_of(name, tmp_path)
    engine.set_dropout("a", **TOLD["cases"][name]["knobs"], seed=TOLD["seed"])
    y = channels_first(engine.forward(x, step=TOLD["step"]), flat)
    # Its Diag-OFT computes in f32, in a sum of 4 + 12 products.
    unit = 2.0**-24 * 32 if name.startswith("diag-oft") else 2.0**-52 * 256
    assert np.abs(y - expected).max() <= unit * np.abs(expected).max()
    whole = channels_first(engine.forward(x), flat)
    assert np.abs(whole - expected).max() > 0.01 * np.abs(expected).max()


def test_what_the_peer_means_where_we_differ(tmp_path):
    """Its rebuild of LoCon drops outputs, not ranks, and ignores dropout; its GLoRA drops what it
    should keep.
    """

    def mask(entries, part=0):
        numbers = {"step": TOLD["step"], "seed": TOLD["seed"], "kind": 2 + 256 * part}
        return masks.mask(entries, 0.4, **numbers)

    engine, y, x, _ = engine_of("other-locon-rebuild-rank", tmp_path)
    base = engine.layers["layer"].forward(x.astype(f64))
    assert np.allclose(y, base + (engine.forward(x) - base) * mask(16), atol=1e-12)
    engine, y, x, _ = engine_of("other-locon-rebuild-dropout", tmp_path)
    assert np.allclose(y, engine.forward(x), atol=1e-12)
    engine, y, x, _ = engine_of("other-glora-rank", tmp_path)
    p = engine.parameters("a")["layer"]
    turned = {n: p[n] * (1 - mask(5, i))[:, None] for i, n in enumerate(("a1", "b1"))}
    engine.set_parameters("a", {"layer": turned})
    assert np.allclose(y, engine.forward(x), atol=1e-12)
