"""The peer's saved values: its forward is the truth for y, dx, every factor's gradient and the
merged weight.
"""

import numpy as np
import pytest

from lycoris_cupy import Engine, bf16, to_device
from lycoris_cupy.io.safetensors import write
from tests import magnitudes, majorants
from tests.bounds import assert_within, bound
from tests.cases import PEER, PEER_CASES, channels_first, channels_last, peer, peer_layer

# The file keys of the gradients, by the factor's name in the peer's files.
FULL_GRADIENTS = {"weight": "diff", "bias": "diff_b"}
PREFIX = "lycoris_block_layer."
SIGNED = {"dora_scale", "oft_blocks", "lambda_layer"}


def full_change(base, expect):
    """The change that the peer's forward of Full used, exact in bf16, by file key.

    The peer saved these cases before its `apply_to`, when its state dict holds parameter - weight
    instead of the parameter (checked in test_full_files_of_the_peer): the forward is the truth, so
    the file is made from it.
    """
    out = {PREFIX + "diff": expect["merged"] - base["block.layer.weight"]}
    if "merged_bias" in expect:
        out[PREFIX + "diff_b"] = expect["merged_bias"] - base["block.layer.bias"]
    assert all((v.astype(bf16).astype(np.float32) == v).all() for v in out.values())
    return {key: value.astype(bf16) for key, value in out.items()}


def run(name, device, dtype, path, absolute=False):
    """y, dx, gradients by file key, merged weight and bias, all in torch's order and f64."""
    case, base, tensors, expect = peer(name)
    layer = peer_layer(case, base)
    linear = case["layer"]["kind"] == "linear"
    x, dy = (channels_last(expect[k].astype(np.float64), linear) for k in ("x", "dy"))
    if absolute:
        layer = layer.replaced(
            np.abs(layer.matrix), None if layer.bias is None else np.abs(layer.bias)
        )
        x, dy = np.abs(x), np.abs(dy)
    engine = Engine({"block.layer": layer}, device=device, dtype=dtype)
    # LyCORIS's own rule of strength, which DoRA's and BOFT's cases at 0.7 tell from blending.
    report = engine.attach(path, strength=case["strength"], name="a", rule="reference")
    assert len(report.layers) == 1
    if absolute:
        values = {n: np.abs(v) for n, v in engine.parameters("a")["block.layer"].items()}
        engine.set_parameters("a", {"block.layer": values})
    adapter = engine.attachments["a"].adapters["block.layer"]
    y, pullback = engine.vjp(x)
    dx, grads = pullback(dy)
    merged = engine.merged().layers["block.layer"]
    grads = {n: to_device(g, "cpu") for n, g in grads["a"]["block.layer"].items()}
    weight = (
        to_device(merged.matrix, "cpu").transpose(2, 1, 0).reshape(base["block.layer.weight"].shape)
    )
    bias = None if merged.bias is None else to_device(merged.bias, "cpu")
    out = [channels_first(to_device(a, "cpu"), linear) for a in (y, dx)]
    return *(np.asarray(a, np.float64) for a in out), adapter.save(grads), weight, bias


def absolute_sizes(name, path):
    """What errors are measured against: the same over absolute values."""
    return run(name, "cpu", "f64", path, absolute=True)[:4]


def signed_sizes(name, path):
    """The same for DoRA, rotations and T-LoRA, whose norms, transforms and singular vectors are
    those of the signed values.
    """
    case, base, _, expect = peer(name)
    layer, linear = peer_layer(case, base), case["layer"]["kind"] == "linear"
    engine = Engine({"block.layer": layer}, device="cpu", dtype="f64")
    engine.attach(path, name="a", rule="reference")
    adapter = engine.attachments["a"].adapters["block.layer"]
    x, dy = (channels_last(expect[k].astype(np.float64), linear) for k in ("x", "dy"))
    factors = engine.parameters("a")["block.layer"]
    measure = majorants if isinstance(adapter, majorants.NONLINEAR) else magnitudes
    y, dx, grads, weight = measure.sizes(layer, adapter, factors, x, dy, case["strength"])
    weight = weight.transpose(2, 1, 0).reshape(base["block.layer.weight"].shape)
    y, dx = (channels_first(a, linear) for a in (y, dx))
    return y, dx, adapter.save(grads), weight


def check(name, device, dtype, folder):
    case, base, tensors, expect = peer(name)
    path = PEER / "adapter" / f"{name}.safetensors"
    if case["algo"] == "full":
        path = folder / "full.safetensors"
        write(path, full_change(base, expect), {})
    y, dx, grads, weight, bias = run(name, device, dtype, path)
    measure = signed_sizes if SIGNED & set(case["keys"]) else absolute_sizes
    size_y, size_dx, size_grads, size_weight = measure(name, path)
    kept = {"bf16": bf16, "f32": np.float32, "f64": np.float32}[dtype]  # the peer saved f32
    depth = 64 + int(np.prod(expect["y"].shape)) + int(np.prod(expect["merged"].shape[1:])) * 4
    roundings = 6 if dtype == "bf16" else 2

    def near(value, key, size, allowed=roundings):
        expected = expect[key].astype(np.float64)
        limit = bound(expected, size, depth, kept, roundings=allowed)
        assert_within(value, expected, limit, f"{name} {key}")

    near(y, "y", size_y)
    near(dx, "dx", size_dx)
    near(weight, "merged", size_weight, 2)
    if "merged_bias" in expect:
        near(bias, "merged_bias", np.abs(expect["merged_bias"]) + 1)
    named = {k.removeprefix("grad."): v for k, v in expect.items() if k.startswith("grad.")}
    folded = 1.0
    if "scalar" in named:
        # The peer trained up = scalar * stored factor: its gradient is scalar times ours, and the
        # scalar's own gradient is <gradient of the folded factor, that factor> / scalar, which
        # tells the scalar.
        stored = tensors[PREFIX + "lora_up.weight"].astype(np.float64)
        folded = float((grads["lora_up.weight"] * stored).sum()) / float(named.pop("scalar"))
    seen = set()
    for key, expected in named.items():
        key = FULL_GRADIENTS.get(key, key) if case["algo"] == "full" else key
        factor = folded if key == "lora_up.weight" else 1.0
        # Full is trained as the absolute weight there, so its gradient is that of diff.
        size = size_grads[key] * abs(factor)
        limit = bound(
            expected, size, depth, kept, roundings=roundings + (4 if folded != 1.0 else 0)
        )
        assert_within(grads[key] * factor, expected.astype(np.float64), limit, f"{name} {key}")
        seen.add(key)
    left = set(grads) - seen - {"on_input"}
    assert not left, f"{name}: gradients {sorted(left)} were not compared"


@pytest.mark.parametrize("dtype", ["f64", "f32", "bf16"])
@pytest.mark.parametrize("name", [n for n, c in PEER_CASES.items() if c["algo"] == "dylora"])
def test_dylora_of_the_peer(name, dtype, device):
    """The peer draws a rank whenever it computes a weight, so each saved one is of some rank: the
    file cut to that rank, and to no other, gives it.
    """
    case, base, _, expect = peer(name)
    assert set(expect) == {"merged"} and case["options"]["block_size"] == 1
    expected = expect["merged"].astype(np.float64)
    expected = expected.reshape(*expected.shape[:2], -1).transpose(2, 1, 0)

    def merged(rank, device, dtype, size=lambda v: v):
        layer = peer_layer(case, {key: size(value) for key, value in base.items()})
        engine = Engine({"block.layer": layer}, device=device, dtype=dtype)
        engine.attach(PEER / "adapter" / f"{name}.safetensors", name="a", rank=rank)
        values = {n: size(v) for n, v in engine.parameters("a")["block.layer"].items()}
        engine.set_parameters("a", {"block.layer": values})
        return to_device(engine.merged().layers["block.layer"].matrix, "cpu")

    kept, found = bf16 if dtype == "bf16" else np.float32, []
    for rank in range(1, case["options"]["lora_dim"] + 1):
        size = merged(rank, "cpu", "f64", np.abs)
        limit = bound(expected, size, 16, kept, roundings=2)
        value = np.asarray(merged(rank, device, dtype), np.float64)
        found += [rank] if (np.abs(value - expected) <= limit).all() else []
    assert len(found) == 1


@pytest.mark.parametrize("dtype", ["f64", "f32", "bf16"])
@pytest.mark.parametrize("name", [n for n, c in PEER_CASES.items() if c["algo"] != "dylora"])
def test_peer(name, dtype, device, tmp_path):
    check(name, device, dtype, tmp_path)


@pytest.mark.parametrize("name", [n for n, c in PEER_CASES.items() if c["algo"] == "full"])
def test_full_files_of_the_peer(name):
    """A known defect: before apply_to, LyCORIS 4.1.3 saves parameter - weight as `diff`."""
    _, base, tensors, expect = peer(name)
    for key, change in full_change(base, expect).items():
        weight = base["block.layer.weight" if key.endswith("diff") else "block.layer.bias"]
        saved = (change.astype(np.float32) - weight).astype(bf16)
        assert (saved == tensors[key]).all()


def test_all_cases_are_here():
    assert len(PEER_CASES) == 177
