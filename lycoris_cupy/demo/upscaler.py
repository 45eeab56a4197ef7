"""The network as an Engine: its graph in `lycoris_cupy.ops`, and pictures of any size."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import numpy as np

from ..arrays import Array, bf16, on_gpu, resolve_device, to_device, wide_dtype
from ..engine import Engine, Topology
from ..errors import ShapeError
from ..ops.elementwise import add, cast, prelu
from ..ops.product import product
from ..ops.shapes import pixel_shuffle, resize_nearest, transpose
from ..tape import value_of
from .ncnn import NEAREST, Network, Node

FACTOR = 2  # of the network's output
TILE = 192  # low-resolution rows and columns of a piece; 64 channels of them are 9 MiB in f32
MARGIN = 20  # 18 convolutions of 3x3 see 18 pixels to each side, the bicubic part one more


def build_engine(network: Network, device: str = "auto", dtype=bf16) -> Engine:
    """An Engine of the network.

    Its fp16 weights (11 bits) and f32 slopes are rounded to dtype; bf16 has 8 bits.
    """
    topology = topology_of(network, device, dtype)
    return Engine(network.layers, topology, device=device, dtype=dtype)


def topology_of(network: Network, device: str = "auto", dtype=bf16) -> Topology:
    """topology(call, x): the nodes in their order.  x: (N, H, W, 3). Returns (N, 2H, 2W, 3).

    What follows the last convolution is linear and kept wide, so the picture is rounded once.
    """
    device = resolve_device(device)
    slopes = {name: to_device(cast(slope, dtype), device) for name, slope in network.slopes.items()}
    last = [node.name for node in network.nodes if node.kind == "Convolution"][-1]

    def topology(call, x):
        blobs = {node.outputs[0]: x for node in network.nodes if node.kind == "Input"}
        for node in network.nodes:
            if node.kind != "Input":
                out = _run(node, [blobs.pop(name) for name in node.inputs], call, slopes)
                out = cast(out, wide_dtype(out.dtype)) if node.name == last else out
                blobs.update(dict.fromkeys(node.outputs, out))
        return cast(blobs[network.output], x.dtype)

    return topology


def _run(node: Node, inputs: list[Array], call: Callable, slopes: Mapping[str, Array]) -> Array:
    x = inputs[0]
    if node.kind == "Convolution":
        return call(node.name, x)
    if node.kind == "PReLU":
        return prelu(x, slopes[node.name])
    if node.kind == "PixelShuffle":
        return pixel_shuffle(x, node.settings[0])
    if node.kind == "Interp":
        nearest = node.settings[0] == NEAREST
        return resize_nearest(x, int(node.settings[1])) if nearest else halve_bicubic(x)
    if node.kind == "BinaryOp":
        a, b = (cast(x, wide_dtype(x.dtype)) for x in inputs)
        return add(a, b)
    return x  # Split


def halve_bicubic(x: Array) -> Array:
    """(N, H, W, C) -> (N, H / 2, W / 2, C) by cubic convolution with A = -0.75, as ncnn does it.

    The edge is repeated; nothing is filtered away first. Keys 1981. Each axis is a product with a
    matrix that has four taps a column, so gradients come for free.
    """
    _, h, w, _ = x.shape
    if h % 2 or w % 2:
        raise ShapeError(f"x has shape {tuple(x.shape)}, expected an even height and width")
    value = value_of(x)
    device = f"cuda:{value.device.id}" if on_gpu(value) else "cpu"
    rows, columns = (_halving(size, x.dtype, device) for size in (h, w))
    x = product(transpose(x, (0, 1, 3, 2)), columns)  # (N, H, C, W / 2)
    x = product(transpose(x, (0, 3, 2, 1)), rows)  # (N, W / 2, C, H / 2)
    return transpose(x, (0, 3, 1, 2))


@functools.lru_cache(maxsize=32)  # a training step would make the same ones again and again
def _halving(size: int, dtype: np.dtype, device: str) -> Array:
    """(1, size, size / 2): in column i the taps of the point between 2i and 2i + 1."""
    matrix = np.zeros((1, size, size // 2), wide_dtype(dtype))
    columns = np.arange(size // 2)
    # At distances 0.5 and 1.5, exact in bf16. At the edge two taps share a row: one add for each.
    for offset, tap in ((-1, -0.09375), (0, 0.59375), (1, 0.59375), (2, -0.09375)):
        matrix[0, np.clip(2 * columns + offset, 0, size - 1), columns] += tap
    return to_device(matrix.astype(dtype), device)


def upscale(engine: Engine, picture: np.ndarray) -> np.ndarray:
    """(H, W, 3) -> (2H, 2W, 3), f32 in [0, 1].

    Pieces of TILE x TILE, each with a MARGIN that is cut off: the same as in one piece.
    """
    height, width, _ = picture.shape
    out = np.empty((height * FACTOR, width * FACTOR, 3), np.float32)
    for top in range(0, height, TILE):
        for left in range(0, width, TILE):
            bottom, right = min(top + TILE, height), min(left + TILE, width)
            above, before = min(top, MARGIN), min(left, MARGIN)
            piece = picture[top - above : bottom + MARGIN, left - before : right + MARGIN]
            y = to_device(engine.forward(piece[None]), "cpu")[0].astype(np.float32)
            y = y[above * FACTOR :, before * FACTOR :]
            y = y[: (bottom - top) * FACTOR, : (right - left) * FACTOR]
            out[top * FACTOR : bottom * FACTOR, left * FACTOR : right * FACTOR] = y
    return out.clip(0, 1)
