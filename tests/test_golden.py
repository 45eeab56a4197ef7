"""Deterministic vectors of the reference: orientation, scale and digests, exact in f64."""

import numpy as np
import pytest

from lycoris_cupy import Conv2d, Engine, Linear, to_device
from lycoris_cupy.io.safetensors import write

SEEDS = {
    "weight": 5,
    "bias": 6,
    "x": 4,
    "lora_down.weight": 1,
    "lora_up.weight": 2,
    "lora_mid.weight": 3,
    "hada_w1_a": 1,
    "hada_w1_b": 2,
    "hada_w2_a": 3,
    "hada_w2_b": 4,
    "hada_t1": 5,
    "hada_t2": 6,
    "lokr_w1": 1,
    "lokr_w1_a": 1,
    "lokr_w1_b": 2,
    "lokr_w2": 3,
    "lokr_w2_a": 3,
    "lokr_w2_b": 4,
    "lokr_t2": 5,
    "a1.weight": 1,
    "a2.weight": 2,
    "b1.weight": 3,
    "b2.weight": 4,
    "weight of ia3": 1,
    "oft_blocks": 1,
    "rescale": 8,
}

LAYERS = {  # weight shape, input shape (channels first), options
    "linear": ((8, 6), (2, 6), {}),
    "conv1": ((8, 6, 1, 1), (1, 6, 4, 5), {}),
    "conv3s2": ((8, 6, 3, 3), (1, 6, 4, 5), {"stride": 2, "padding": 1}),
    "conv3g2": ((8, 3, 3, 3), (1, 6, 4, 5), {"padding": 1, "groups": 2}),
    "linearB": ((40, 24), (2, 24), {}),
    "conv3B": ((40, 24, 3, 3), (1, 24, 4, 5), {"stride": 2, "padding": 1}),
}

BASE = {
    "linear": (-1.796875, -15.296875),
    "conv1": (-30.781250, -216.734375),
    "conv3s2": (-26.703125, -285.281250),
    "conv3g2": (-33.359375, -198.140625),
    "linearB": (3.703125, -49.812500),
    "conv3B": (-5.406250, -60.796875),
}


def lora(o, i, r, k=()):
    return {"lora_down.weight": (r, i, *k), "lora_up.weight": (o, r, *(1 for _ in k))}


def tucker(o, i, r, k):
    return {
        "lora_down.weight": (r, i, 1, 1),
        "lora_mid.weight": (r, r, *k),
        "lora_up.weight": (o, r, 1, 1),
    }


def loha(o, i, r, taps=1):
    return {
        "hada_w1_a": (o, r),
        "hada_w1_b": (r, i * taps),
        "hada_w2_a": (o, r),
        "hada_w2_b": (r, i * taps),
    }


def loha_tucker(o, i, r, k):
    sides = {"hada_w1_a": (r, o), "hada_w1_b": (r, i), "hada_w2_a": (r, o), "hada_w2_b": (r, i)}
    return {**sides, "hada_t1": (r, r, *k), "hada_t2": (r, r, *k)}


def lokr(w1, k, n, r, taps=1):
    return {"lokr_w1": w1, "lokr_w2_a": (k, r), "lokr_w2_b": (r, n * taps)}


def lokr_tucker(w1, k, n, r, kernel):
    return {**w1, "lokr_w2_a": (r, k), "lokr_w2_b": (r, n), "lokr_t2": (r, r, *kernel)}


BOTH = {"lokr_w1_a": (5, 2), "lokr_w1_b": (2, 4)}
K3 = (3, 3)
# name, layer, keys, alpha, S0(DW), S1(DW), DW[0..3], S0(y), S1(y)
VECTORS = [
    ("LoCon", "linear", lora(8, 6, 2), 3, 0.281250, -0.117188, (0.328125, 0.164062, 0.304688, 0.140625), -1.351562, -24.888672),
    ("LoCon", "conv1", lora(8, 6, 2, (1, 1)), 3, 0.281250, -0.117188, (0.328125, 0.164062, 0.304688, 0.140625), -30.863281, -195.233398),
    ("LoCon", "conv3s2", lora(8, 6, 2, K3), 3, 0.281250, 5.812500, (0.187500, 0.023438, 0.164062, 0.000000), -28.683594, -309.161133),
    ("LoCon Tucker", "conv3s2", tucker(8, 6, 2, K3), 3, 0.164062, 53.683594, (-0.626953, 0.316406, -0.035156, 0.336914), -24.936523, -277.284668),
    ("LoCon groups", "conv3g2", lora(8, 3, 2, K3), 3, 0.468750, -9.070312, (0.609375, -0.468750, 0.585938, -0.492188), -33.177734, -167.701172),
    ("LoHa", "linear", loha(8, 6, 2), 3, 0.985840, 7.741699, (0.065918, 0.038452, 0.060425, 0.398438), -0.748688, -11.154984),
    ("LoHa", "conv3s2", loha(8, 6, 2, 9), 3, -3.413086, -35.907349, (0.010254, -0.023071, 0.012085, 0.153809), -27.588623, -318.906830),
    ("LoHa Tucker", "conv3s2", loha_tucker(8, 6, 2, K3), 3, -2.559757, -24.405910, (-0.002243, -0.047424, -0.001831, 0.025337), -27.741668, -300.116550),
    ("LoKr r1", "linear", lokr((2, 2), 4, 3, 1), 3, -0.187500, -5.906250, (-0.175781, 0.439453, -0.087891, 0.070312), -1.530273, -4.210205),
    ("LoKr full", "linear", {"lokr_w1": (2, 2), "lokr_w2": (4, 3)}, 3, 0.187500, -5.656250, (0.234375, -0.312500, 0.156250, -0.093750), -2.042969, -16.337891),
    ("LoKr r1 factor 2", "linear", lokr((2, 2), 4, 3, 1), 3, -0.187500, -5.906250, (-0.175781, 0.439453, -0.087891, 0.070312), -1.530273, -4.210205),
    ("LoKr unbalanced", "linear", lokr((4, 2), 2, 3, 1), 3, 0.000000, -5.970703, (-0.175781, 0.439453, -0.087891, 0.070312), -1.602051, -9.072754),
    ("LoKr full", "conv1", {"lokr_w1": (2, 2), "lokr_w2": (4, 3, 1, 1)}, 3, 0.187500, -5.656250, (0.234375, -0.312500, 0.156250, -0.093750), -30.808594, -222.378906),
    ("LoKr r1", "conv3s2", lokr((2, 2), 4, 3, 1, 9), 3, 0.187500, 54.146484, (-0.175781, 0.439453, -0.087891, 0.527344), -37.484375, -398.833008),
    ("LoKr Tucker r1", "conv3s2", lokr_tucker({"lokr_w1": (2, 2)}, 4, 3, 1, K3), 3, 0.093750, -14.052246, (0.021973, -0.131836, 0.0, 0.131836), -30.287231, -315.123138),
    ("LoKr full", "conv3s2", {"lokr_w1": (2, 2), "lokr_w2": (4, 3, 3, 3)}, 3, -0.250000, -1.000000, (0.234375, -0.312500, 0.156250, -0.390625), -27.896484, -269.884766),
    ("LoKr r2", "linearB", lokr((5, 4), 8, 6, 2), 3, -0.556641, -39.205078, (-0.146484, 0.512695, -0.161133, 0.498047), -0.168091, -91.190674),
    ("LoKr both r2", "linearB", {**BOTH, "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 6)}, 3, 2.226562, 36.606445, (0.058594, -0.205078, 0.064453, -0.199219), 2.537659, -50.441193),
    ("LoKr r2", "conv3B", lokr((5, 4), 8, 6, 2, 9), 3, 0.190430, -9.580078, (-0.029297, -0.131836, -0.043945, 0.615234), -3.352539, -164.616943),
    ("LoKr Tucker r2", "conv3B", lokr_tucker({"lokr_w1": (5, 4)}, 8, 6, 2, K3), 3, 0.424805, -13.802490, (-0.034790, -0.036621, -0.014648, 0.102539), -5.705994, 46.499313),
    ("LoKr Tucker both r2", "conv3B", lokr_tucker(BOTH, 8, 6, 2, K3), 3, -1.699219, -0.368362, (0.013916, 0.014648, 0.005859, -0.041016), -3.015064, -92.867386),
]  # fmt: skip


def fill(shape, seed):
    j = np.arange(int(np.prod(shape)))
    return ((((7 * j + seed) % 13) - 6) / 8.0).reshape(shape)


def digests(t):
    t = np.asarray(t, np.float64).reshape(-1)
    return t.sum(), ((1 + np.arange(t.size) % 17) * t).sum()


def build(layer):
    weight, x, options = LAYERS[layer]
    kind = Linear if len(weight) == 2 else Conv2d
    made = kind.from_torch(
        fill(weight, SEEDS["weight"]), fill(weight[:1], SEEDS["bias"]), **options
    )
    x = fill(x, SEEDS["x"])
    return made, x if len(weight) == 2 else np.moveaxis(x, 1, -1)


def channels_first(y):
    return y if y.ndim == 2 else np.moveaxis(y, -1, 1)


@pytest.mark.parametrize("layer", BASE)
def test_base(layer, device):
    made, x = build(layer)
    y = to_device(Engine({"layer": made}, device=device, dtype="f64").forward(x), "cpu")
    assert digests(channels_first(y)) == pytest.approx(BASE[layer], abs=1e-9)


# The table is rounded to six decimals, and every value is exact in f64.
@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: f"{v[0]}-{v[1]}")
def test_vector(vector, device, tmp_path):
    _, layer, keys, alpha, dw0, dw1, first, y0, y1 = vector
    made, x = build(layer)
    tensors = {f"lycoris_layer.{key}": fill(shape, SEEDS[key]) for key, shape in keys.items()}
    tensors["lycoris_layer.alpha"] = np.array(alpha, np.float32)
    write(tmp_path / "a.safetensors", tensors, {})
    engine = Engine({"layer": made}, device=device, dtype="f64")
    engine.attach(tmp_path / "a.safetensors")
    dw, _ = engine.attachments["a"].delta("layer", engine.layers["layer"])
    dw = to_device(dw, "cpu").transpose(2, 1, 0).reshape(LAYERS[layer][0])
    assert digests(dw) == pytest.approx((dw0, dw1), abs=6e-7)
    assert dw.reshape(-1)[:4] == pytest.approx(first, abs=6e-7)
    y = to_device(engine.forward(x), "cpu")
    assert digests(channels_first(y)) == pytest.approx((y0, y1), abs=6e-7)
    merged = to_device(engine.merged().forward(x), "cpu")
    assert np.abs(merged - y).max() < 1e-12


# name, layer, tensors, alpha, strength, as VECTORS; Diag-OFT and BOFT were computed in f32.
OTHERS = [
    ("GLoRA", "linear", {"a1.weight": (6, 2), "a2.weight": (2, 6), "b1.weight": (8, 2), "b2.weight": (2, 6)}, 3, 1.0, -0.158203, 8.827148, (0.263672, -0.503906, 0.328125, -1.277344), -0.386597, -16.060425),
    ("GLoRA", "conv3s2", {"a1.weight": (6, 2, 1, 1), "a2.weight": (2, 6, 1, 1), "b1.weight": (8, 2, 1, 1), "b2.weight": (2, 6, 3, 3)}, 3, 1.0, 0.691406, -112.623047, (-0.172852, 0.667969, -0.128906, -1.078125), -20.398071, -211.801025),
    ("IA3 out", "linear", {"weight": (8,), "on_input": 0}, None, 1.0, -1.609375, -14.578125, (0.078125, -0.468750, 0.0, 0.468750), -2.644531, -20.906250),
    ("IA3 in", "conv3s2", {"weight": (1, 6, 1, 1), "on_input": 1}, None, 1.0, -0.328125, -17.421875, (0.078125, -0.468750, 0.0, 0.468750), -31.152344, -316.003906),
    ("Diag-OFT", "linear", {"oft_blocks": (4, 2, 2)}, 0, 1.0, -0.928498, 5.815260, (-0.133562, 0.143836, -0.246575, 0.431507), -2.021944, -34.276941),
    ("Diag-OFT rescaled", "conv3s2", {"oft_blocks": (4, 2, 2), "rescale": (8, 1, 1, 1)}, 0, 1.0, 1.353129, -1.648695, (0.007277, 0.572774, -0.102740, 0.557363), -21.067995, -180.475132),
    ("Diag-OFT constraint", "linear", {"oft_blocks": (4, 2, 2)}, 0.05, 1.0, -0.430357, 1.220714, (-0.061997, 0.105980, -0.099750, 0.126770), -1.824859, -22.703319),
    ("BOFT", "linear", {"oft_blocks": (2, 2, 4, 4)}, 0, 1.0, 0.767774, 9.599426, (-0.601684, -0.102547, -0.578514, 0.479106), -1.698493, -13.720766),
    ("BOFT rescaled", "conv3s2", {"oft_blocks": (2, 2, 4, 4), "rescale": (8, 1, 1, 1)}, 0, 0.5, 0.325710, -11.963526, (0.214010, -0.147273, 0.123217, -0.121145), -28.095312, -288.108446),
]  # fmt: skip


def filled(key, shape):
    if key == "on_input":
        return np.array(shape, np.int64)
    value = fill(shape, SEEDS["weight of ia3" if key == "weight" else key])
    return {"oft_blocks": value / 2, "rescale": 1 + value}.get(key, value)


@pytest.mark.parametrize("vector", OTHERS, ids=lambda v: f"{v[0]}-{v[1]}")
def test_other_vectors(vector, device, tmp_path):
    name, layer, keys, alpha, strength, dw0, dw1, first, y0, y1 = vector
    made, x = build(layer)
    tensors = {f"lycoris_layer.{key}": filled(key, shape) for key, shape in keys.items()}
    if alpha is not None:
        tensors["lycoris_layer.alpha"] = np.array(alpha, np.float64)
    write(tmp_path / "a.safetensors", tensors, {})
    engine = Engine({"layer": made}, device=device, dtype="f64")
    engine.attach(tmp_path / "a.safetensors", strength=strength, rule="reference")
    dw, _ = engine.attachments["a"].delta("layer", engine.layers["layer"])
    dw = to_device(dw, "cpu").transpose(2, 1, 0).reshape(LAYERS[layer][0])
    # In f32: half an ulp of a value of 1, times the weights of a digest, over all its values.
    near = 2.0**-24 * 17 * dw.size if "OFT" in name else 6e-7
    assert digests(dw) == pytest.approx((dw0, dw1), abs=near)
    assert dw.reshape(-1)[:4] == pytest.approx(first, abs=1e-6)
    y = to_device(engine.forward(x), "cpu")
    assert digests(channels_first(y)) == pytest.approx((y0, y1), abs=4 * near)
    merged = to_device(engine.merged().forward(x), "cpu")
    assert np.abs(merged - y).max() < 1e-12
