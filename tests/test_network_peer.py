"""The operations around the layers are torch's: values and gradients that torch saved, in f64."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from lycoris_cupy import Tape, losses, ops, to_device
from lycoris_cupy.tape import value_of

SAVED = load_file(Path(__file__).parent / "peer" / "torch-2.13.0" / "network.safetensors")
IMAGES = ("bilinear", "pixel", "group")


def saved(name):
    """The tensors of one case, images channels last."""
    found = {k.rsplit(".", 1)[1]: v for k, v in SAVED.items() if k.rsplit(".", 1)[0] == name}
    if name.startswith(IMAGES):
        found = {k: np.moveaxis(v, 1, -1).copy() if v.ndim == 4 else v for k, v in found.items()}
    return found


def close(found, expected):
    found = np.asarray(to_device(found, "cpu"))
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-13 * max(1.0, np.abs(expected).max())


def resized(size, corners=False):
    return lambda x: ops.resize_bilinear(x, size, align_corners=corners)


CASES = {
    "silu": ops.silu,
    "gelu": ops.gelu,
    "gelu_tanh": partial(ops.gelu, form="tanh"),
    "softmax": ops.softmax,
    "bilinear_up": resized((7, 11)),
    "bilinear_down": resized((2, 3)),
    "bilinear_corners_up": resized((7, 11), True),
    "bilinear_corners_down": resized((2, 3), True),
    "bilinear_to_one": resized((1, 1)),
    "bilinear_corners_to_one": resized((1, 4), True),
    "bilinear_twice": resized((8, 10)),
    "attention_plain": ops.attention,
    "attention_causal": partial(ops.attention, causal=True),
    "attention_added": ops.attention,
    "attention_allowed": partial(ops.attention, scale=0.3),
    "pixel_unshuffle": lambda x: ops.pixel_unshuffle(x, 2),
    "group_norm": partial(ops.group_norm, groups=3, eps=1e-3),
    "embedding": ops.embedding,
}


@pytest.mark.parametrize("name", CASES)
def test_operation(name, device):
    found, run = saved(name), CASES[name]
    if "mask" in found:
        run = partial(run, mask=to_device(found["mask"], device))
    tape = Tape()
    watched = [tape.watch(to_device(found[f"x{i}"], device)) for i in range(3) if f"x{i}" in found]
    fixed = [to_device(found["indices"], device)] if "indices" in found else []
    y = run(*watched, *fixed)
    close(value_of(y), found["y"])
    for i, dx in enumerate(tape.gradients(y, to_device(found["dy"], device), watched)):
        close(dx, found[f"dx{i}"])


@pytest.mark.parametrize(
    "name, source, loss",
    [
        ("mse", "difference", losses.mse),
        ("l1", "difference", losses.l1),
        ("cross_entropy", "logits", losses.cross_entropy),
        ("cross_entropy_smoothed", "logits", partial(losses.cross_entropy, smoothing=0.1)),
    ],
)
def test_loss(name, source, loss, device):
    given = saved(source)
    value, dy = loss(to_device(given["y"], device), to_device(given["target"], device))
    close(value, saved(name)["value"])
    close(dy, saved(name)["dy"])


def test_every_saved_case_is_used():
    names = {key.rsplit(".", 1)[0] for key in SAVED}
    others = {"difference", "logits", "mse", "l1", "cross_entropy", "cross_entropy_smoothed"}
    assert names == set(CASES) | others
