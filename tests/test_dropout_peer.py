"""LyCORIS in training, with its random draws replaced by our masks, gives what we give; see make.py
beside the values.
"""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lycoris_cupy import Conv2d, Engine, LayerNorm, Linear
from tests.cases import PEER, channels_first, channels_last

FOLDER = PEER.parent / "lycoris-4.1.3-dropout"
TOLD = json.loads((FOLDER / "cases.json").read_text())
VALUES = load_file(FOLDER / "values.safetensors")


def of(name, part):
    """The tensors of a case under a prefix."""
    start = f"{name}.{part}"
    return {key[len(start) :]: v for key, v in VALUES.items() if key.startswith(start)}


@pytest.mark.parametrize("name", TOLD["cases"])
def test_the_peers_forward_with_the_same_masks(name, tmp_path):
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
    engine = Engine({"layer": layer}, device="cpu", dtype="f64")
    engine.attach(path, strength=TOLD["strength"], rule="reference")
    x, expected = channels_last(VALUES[f"{name}.x"], flat), VALUES[f"{name}.y"]
    engine.set_dropout("a", **case["knobs"], seed=TOLD["seed"])
    y = channels_first(engine.forward(x, step=TOLD["step"]), flat)
    # Its Diag-OFT computes in f32, in a sum of 4 + 12 products.
    unit = 2.0**-24 * 32 if name.startswith("diag-oft") else 2.0**-52 * 256
    assert np.abs(y - expected).max() <= unit * np.abs(expected).max()
    whole = channels_first(engine.forward(x), flat)
    assert np.abs(whole - expected).max() > 0.01 * np.abs(expected).max()
