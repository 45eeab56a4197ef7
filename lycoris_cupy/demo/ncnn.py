"""Reader of ncnn networks: a `.param` text and its `.bin`, for the layers of realesr-animevideov3.

    .param   7767517
             <layers> <blobs>
             then a line a layer:
             type name <inputs> <outputs> <input blobs> <output blobs> key=value ...
    .bin     no header; little endian; the layers with weights, in that order:
             Convolution   0x01306B47, OC * IC * KH * KW fp16, padded to 4 bytes, OC f32 biases
             PReLU         C f32 slopes

Other layers, settings and weight formats, a blob that is read twice or never, a truncated file and
bytes after the last weight are refused with FileFormatError. Source: ncnn's modelbin.cpp, BSD-3.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FileFormatError
from ..layers import Conv2d

MAGIC = "7767517"
FP16_FLAG = 0x01306B47
NEAREST, BICUBIC = 1, 3  # Interp's setting 0

# type -> inputs, outputs (None: two or more), settings that must be there, settings that may be
# there with this value only.
#   Convolution    0 outputs, 1 kernel, 2 dilation, 3 stride, 4 padding, 5 bias or not, 6 weights
#   PReLU          0 slopes
#   PixelShuffle   0 factor, 1 order of the channels
#   Interp         0 kind, 1 factor of the height, 2 of the width
#   BinaryOp       0 addition
KINDS: dict[str, tuple[int, int | None, set[int], dict[int, float]]] = {
    "Input": (0, 1, set(), {}),
    "Split": (1, None, set(), {}),
    "Convolution": (1, 1, {0, 1, 4, 5, 6}, {2: 1, 3: 1}),
    "PReLU": (1, 1, {0}, {}),
    "PixelShuffle": (1, 1, {0}, {1: 0}),
    "Interp": (1, 1, {0, 1, 2}, {}),
    "BinaryOp": (2, 1, set(), {0: 0}),
}


@dataclass(frozen=True)
class Node:
    """One line of a .param: what is done to which blobs."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    settings: dict[int, Any]  # whole numbers, but for the factors of Interp


@dataclass(frozen=True)
class Network:
    """nodes, in the order they run; the convolutions and PReLU slopes (C,) by node name, f32."""

    nodes: tuple[Node, ...]
    layers: dict[str, Conv2d]
    slopes: dict[str, np.ndarray]
    output: str  # the blob


def read_network(param: Path, weights: Path) -> Network:
    """The network of a .param and its .bin. fp16 weights are widened to f32, which is exact."""
    nodes, output = read_param(param)
    layers, slopes = read_bin(weights, nodes)
    return Network(nodes, layers, slopes, output)


def read_param(path: Path) -> tuple[tuple[Node, ...], str]:
    """The nodes in the order they run, and the blob that nothing reads: the network's output."""
    try:
        text = Path(path).read_text("ascii")
    except UnicodeDecodeError as error:
        raise FileFormatError(
            f"{path}: byte {error.start} of an ncnn .param is not ASCII"
        ) from error
    lines = [line.split() for line in text.splitlines() if line.strip()]
    if not lines or lines[0] != [MAGIC]:
        found = " ".join(lines[0])[:40] if lines else ""
        raise FileFormatError(f"{path} begins with {found!r}, expected {MAGIC} of an ncnn .param")
    if len(lines) < 2 or len(lines[1]) != 2 or not all(word.isdigit() for word in lines[1]):
        raise FileFormatError(f"{path}: the second line must be the numbers of layers and blobs")
    layers, blobs = map(int, lines[1])
    if len(lines) - 2 != layers:
        raise FileFormatError(f"{path} has {len(lines) - 2} layers, its second line says {layers}")
    nodes = tuple(_node(path, words) for words in lines[2:])
    return nodes, _output_of(path, nodes, blobs)


def read_bin(path: Path, nodes: tuple[Node, ...]) -> tuple[dict[str, Conv2d], dict]:
    """The convolutions and the PReLU slopes of these nodes, f32."""
    blob, layers, slopes = _Bytes(path), {}, {}
    for node in nodes:
        if node.kind == "PReLU":
            slopes[node.name] = blob.take(node, "slopes", "<f4", node.settings[0])
        elif node.kind == "Convolution":
            layers[node.name] = _convolution(blob, node)
    blob.require_end()
    return layers, slopes


def _convolution(blob: _Bytes, node: Node) -> Conv2d:
    outputs, kernel, padding, has_bias, count = (node.settings[key] for key in (0, 1, 4, 5, 6))
    if min(outputs, kernel, count) < 1 or count % (outputs * kernel * kernel):
        raise FileFormatError(
            f"{blob.path}: {node.name} has {count} weights, expected a multiple of "
            f"{outputs} outputs x {kernel} x {kernel}"
        )
    flag = int(blob.take(node, "flag", "<u4", 1)[0])
    if flag != FP16_FLAG:
        raise FileFormatError(
            f"{blob.path}: the weights of {node.name} have flag {flag:#010x}, "
            f"expected {FP16_FLAG:#010x} (fp16)"
        )
    weight = blob.take(node, "weights", "<f2", count).astype(np.float32)
    blob.take(node, "padding", "u1", -blob.at % 4)
    bias = blob.take(node, "biases", "<f4", outputs) if has_bias else None
    return Conv2d.from_torch(weight.reshape(outputs, -1, kernel, kernel), bias, padding=padding)


def _node(path: Path, words: list[str]) -> Node:
    line = " ".join(words)
    kind = words[0]
    if kind not in KINDS:
        known = ", ".join(KINDS)
        raise FileFormatError(f"{path}: layer type {kind!r} is not read here (known: {known})")
    try:
        name, inputs, outputs = words[1], int(words[2]), int(words[3])
        pairs = [word.split("=") for word in words[4 + inputs + outputs :]]
        settings = {int(key): _number(value) for key, value in pairs}
    except (IndexError, ValueError) as error:
        raise FileFormatError(f"{path}: cannot read the line {line!r}") from error
    blobs = words[4 : 4 + inputs + outputs]
    wants_inputs, wants_outputs, needed, fixed = KINDS[kind]
    fits = outputs == wants_outputs if wants_outputs is not None else outputs >= 2
    if inputs != wants_inputs or not fits or len(blobs) != inputs + outputs:
        raise FileFormatError(f"{path}: wrong inputs or outputs of a {kind} in {line!r}")
    if missing := sorted(needed - settings.keys()):
        raise FileFormatError(f"{path}: {kind} {name} lacks setting {missing[0]}")
    for key, value in settings.items():
        if key not in needed and fixed.get(key) != value:
            raise FileFormatError(
                f"{path}: setting {key}={value} of {kind} {name} is not read here"
            )
    if kind == "Interp":
        _check_interp(path, name, settings)
    elif not all(isinstance(value, int) and value >= 0 for value in settings.values()):
        raise FileFormatError(f"{path}: {kind} {name} has a setting that is not a whole number")
    if kind == "PixelShuffle" and settings[0] == 0:
        raise FileFormatError(f"{path}: the factor of PixelShuffle {name} is 0")
    return Node(kind, name, tuple(blobs[:inputs]), tuple(blobs[inputs:]), settings)


def _check_interp(path: Path, name: str, settings: dict[int, float]) -> None:
    how, rows, columns = settings[0], settings[1], settings[2]
    enlarges = how == NEAREST and rows >= 1 and float(rows).is_integer()
    halves = how == BICUBIC and rows == 0.5
    if rows != columns or not (enlarges or halves):
        raise FileFormatError(
            f"{path}: Interp {name} resizes by ({rows:g}, {columns:g}) in way {how}; read here are "
            "nearest (1) by a whole number and bicubic (3) by 0.5"
        )


def _output_of(path: Path, nodes: tuple[Node, ...], blobs: int) -> str:
    """The one blob that nothing reads; every other must be made once, and then read once."""
    waiting: set[str] = set()
    made: set[str] = set()
    for node in nodes:
        for blob in node.inputs:
            if blob not in waiting:
                why = "was read already" if blob in made else "is not made before it"
                raise FileFormatError(f"{path}: {node.name} reads blob {blob!r}, which {why}")
            waiting.remove(blob)
        for blob in node.outputs:
            if blob in made:
                raise FileFormatError(f"{path}: blob {blob!r} is made twice, again by {node.name}")
            made.add(blob)
            waiting.add(blob)
    if len({node.name for node in nodes}) != len(nodes):
        raise FileFormatError(f"{path}: two layers share a name")
    if len(made) != blobs:
        raise FileFormatError(f"{path} has {len(made)} blobs, its second line says {blobs}")
    if len(waiting) != 1 or sum(node.kind == "Input" for node in nodes) != 1:
        raise FileFormatError(f"{path} must have one input and one output, not {sorted(waiting)}")
    return waiting.pop()


def _number(text: str) -> int | float:
    return float(text) if set(text) & set(".eE") else int(text)


class _Bytes:
    """A .bin, read from its start to its end."""

    def __init__(self, path: Path):
        self.path, self.data, self.at = path, Path(path).read_bytes(), 0

    def take(self, node: Node, what: str, dtype: str, count: int) -> np.ndarray:
        end = self.at + count * np.dtype(dtype).itemsize
        if end > len(self.data):
            raise FileFormatError(
                f"{self.path} ends at byte {len(self.data)}, but the {what} of {node.name} "
                f"are bytes {self.at} to {end}"
            )
        out = np.frombuffer(self.data, dtype, count, self.at)
        self.at = end
        if out.dtype.kind == "f" and not np.isfinite(out).all():
            raise FileFormatError(f"{self.path}: the {what} of {node.name} are not all finite")
        return out

    def require_end(self) -> None:
        extra = len(self.data) - self.at
        if extra:
            raise FileFormatError(f"{self.path} has {extra} bytes after the last weight")
