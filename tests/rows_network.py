"""Rows of what whole networks need around their layers: activations, softmax, attention, bilinear
resize, embedding, and what is composed of other primitives.
"""

from __future__ import annotations

import math

import numpy as np

from lycoris_cupy import ops
from lycoris_cupy.arrays import on_gpu, to_device
from lycoris_cupy.tape import value_of


def network_rows():
    """The fields of each row."""
    yield from _activation_rows()
    yield from _softmax_rows()
    yield from _attention_rows()
    yield from _resize_rows()
    yield from _embedding_rows()
    yield from _joined_rows()


def beside(array, x):
    """array on the device of x."""
    return to_device(array, "cuda:0" if on_gpu(value_of(x)) else "cpu")


def _each(function):
    return lambda x: np.array([function(float(v)) for v in x.reshape(-1)]).reshape(x.shape)


def gelu_tanh(v):
    return v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) / 2


ACTIVATIONS = {
    "silu": (ops.silu, _each(lambda v: v / (1 + math.exp(-v)))),
    "gelu": (ops.gelu, _each(lambda v: v * (1 + math.erf(v / math.sqrt(2))) / 2)),
    "gelu_tanh": (lambda x: ops.gelu(x, form="tanh"), _each(gelu_tanh)),
    "relu": (ops.relu, _each(lambda v: max(v, 0.0))),
}


def _activation_rows():
    spread = np.random.default_rng(0).uniform(-30, 30, (7, 9))
    for primitive, (call, formula) in ACTIVATIONS.items():
        for name, arg in (
            ("odd", (3, 5, 7)),
            ("one", (1, 1)),
            ("none", (0, 3)),
            ("large", (37, 64)),
            ("far", spread),
        ):
            yield {
                "primitive": primitive,
                "name": name,
                "call": call,
                "formula": formula,
                "args": (arg,),
                "depth": 32,
                "linear": False,
                "size": np.abs,
                "bend": 0.0 if primitive == "relu" else 100.0,
            }


def softmax(x):
    e = np.exp(x - np.where(np.isneginf(x), -np.inf, x).max(axis=-1, keepdims=True, initial=-1e300))
    return e / np.maximum(e.sum(axis=-1, keepdims=True), 1e-300)


def _softmax_rows():
    for name, arg in (
        ("odd", (3, 5, 7)),
        ("one", (1, 1)),
        ("none", (0, 3)),
        ("no columns", (3, 0)),
        ("one row", (13,)),
        ("a warp a row", (11, 1000)),
        ("a block a row", (3, 1100)),
        ("far", np.random.default_rng(0).uniform(-300, 300, (5, 40))),
    ):
        yield {
            "primitive": "softmax",
            "name": name,
            "call": ops.softmax,
            "formula": softmax,
            "args": (arg,),
            "depth": 1200,
            "linear": False,
            # An error of a score is one of the exponential's argument.
            "size": lambda x: softmax(x) * (1 + np.abs(x)),
            "gradient_roundings": 2.0,  # the gradient is made from the rounded result
            "bend": 100.0,
        }


def attend(q, k, v, mask=None, causal=False, scale=None):
    """One head of one sample at a time, from the definition."""
    n, heads, queries, width = q.shape
    keys = k.shape[2]
    scale = 1 / math.sqrt(width) if scale is None else scale
    out = np.zeros((n, heads, queries, v.shape[3]))
    full = None if mask is None else np.broadcast_to(mask, (n, heads, queries, keys))
    for a in range(n):
        for b in range(heads):
            scores = scale * q[a, b] @ k[a, b].T
            if causal:
                scores[np.triu_indices(queries, 1, keys)] = -np.inf
            if full is not None and full.dtype == bool:
                scores[~full[a, b]] = -np.inf
            elif full is not None:
                scores = scores + full[a, b]
            out[a, b] = softmax(scores) @ v[a, b]
    return out


def attend_size(q, k, v, **options):
    """Over absolute values, with what an error of a score does to its exponential."""
    largest = np.abs(q).sum(axis=-1).max(initial=0) * np.abs(k).max(initial=0)
    return attend(q, k, np.abs(v), **options) * (1 + min(largest, 64.0))


def _masks(queries, keys):
    rng = np.random.default_rng([queries, keys])
    allowed = rng.random((queries, keys)) < 0.6
    allowed[: queries // 2, 0] = True
    allowed[-1] = False  # a query that sees nothing
    added = rng.standard_normal((2, 1, 1, keys))
    added[..., keys // 2] = -np.inf
    return {"allowed": allowed, "added": added}


def _attention_rows():
    masks = _masks(37, 41)
    for name, q, keys, values, options in (
        ("odd", (2, 3, 7, 16), 11, 16, {}),
        ("one", (1, 1, 1, 8), 1, 8, {}),
        ("no queries", (1, 2, 0, 8), 3, 8, {}),
        ("no keys", (1, 2, 3, 8), 0, 8, {}),
        ("tiles", (1, 2, 150, 64), 133, 64, {}),
        ("causal", (1, 2, 131, 40), 131, 40, {"causal": True}),
        ("causal, more keys", (1, 1, 70, 96), 139, 96, {"causal": True}),
        ("causal, fewer keys", (2, 1, 139, 128), 70, 128, {"causal": True}),
        ("allowed", (2, 2, 37, 32), 41, 32, {"mask": masks["allowed"], "scale": 0.3}),
        ("added", (2, 3, 37, 24), 41, 24, {"mask": masks["added"]}),
        ("odd width", (2, 3, 7, 5), 11, 5, {}),
        ("other values", (1, 2, 37, 16), 41, 24, {"mask": masks["allowed"]}),
        ("wide", (1, 2, 9, 136), 5, 136, {"causal": True}),
        ("odd width, added", (2, 3, 37, 7), 41, 7, {"mask": masks["added"], "causal": True}),
    ):

        def call(q, k, v, options=options):
            mask = options.get("mask")
            own = {} if mask is None else {"mask": beside(mask, q)}
            return ops.attention(q, k, v, **{**options, **own})

        yield {
            "primitive": "attention",
            "name": name,
            "call": call,
            "formula": lambda q, k, v, o=options: attend(q, k, v, **o),
            "args": (q, (*q[:2], keys, q[3]), (*q[:2], keys, values)),
            "depth": 32 + keys + q[3],
            "linear": False,
            "size": lambda q, k, v, o=options: attend_size(q, k, v, **o),
            "roundings": 2.0,  # probabilities meet the values in bf16
            "gradient_roundings": 3.0,
            "bend": 1000.0,
        }


def between(inputs, outputs, corners):
    """The (outputs, inputs) matrix of a bilinear axis, one output at a time."""
    out = np.zeros((outputs, inputs))
    for o in range(outputs):
        if corners:
            at = o * (inputs - 1) / (outputs - 1) if outputs > 1 else 0.0
        else:
            at = max((o + 0.5) * inputs / outputs - 0.5, 0.0)
        at = min(at, inputs - 1)
        before = min(int(at + 1e-12), inputs - 1)
        out[o, before] += 1 - (at - before)
        out[o, min(before + 1, inputs - 1)] += at - before
    return out


def _resize_rows():
    for name, shape, size, corners in (
        ("up", (2, 3, 5, 4), (6, 10), False),
        ("up, odd", (1, 3, 4, 3), (7, 11), False),
        ("down", (2, 9, 7, 5), (4, 2), False),
        ("up and down", (1, 9, 4, 3), (2, 13), False),
        ("corners, up", (2, 3, 5, 4), (7, 8), True),
        ("corners, down", (1, 9, 7, 5), (4, 2), True),
        ("corners, to one", (1, 5, 1, 3), (1, 4), True),
        ("to one", (1, 5, 7, 3), (1, 1), False),
        ("from one", (2, 1, 1, 5), (3, 4), False),
        ("one axis", (1, 3, 5, 2), (3, 7), False),
        ("none", (0, 3, 5, 2), (4, 7), False),
        ("many channels", (1, 4, 3, 300), (5, 7), False),
    ):
        vertical, horizontal = (
            between(shape[1], size[0], corners),
            between(shape[2], size[1], corners),
        )
        yield {
            "primitive": "resize_bilinear",
            "name": name,
            "call": lambda x, s=size, c=corners: ops.resize_bilinear(x, s, align_corners=c),
            "formula": lambda x, v=vertical, h=horizontal: np.einsum("pi,qj,nijc->npqc", v, h, x),
            "args": (shape,),
            "depth": 16 + size[0] * size[1],
        }


def _embedding_rows():
    rng = np.random.default_rng(0)
    for name, table, indices in (
        ("odd", (5, 7), rng.integers(0, 5, (3, 4))),
        ("one", (1, 1), np.zeros((1,), np.int64)),
        ("none", (3, 5), np.zeros((0, 2), np.int32)),
        ("no columns", (3, 0), np.zeros((2,), np.int32)),
        ("repeated", (4, 33), rng.integers(1, 3, (500,)).astype(np.int32)),
        ("large", (300, 40), rng.integers(0, 300, (2, 1300)).astype(np.uint16)),
        ("all alike", (9, 300), np.full((1200,), 7)),
    ):
        yield {
            "primitive": "embedding",
            "name": name,
            "call": lambda t, i=indices: ops.embedding(t, beside(i, t)),
            "formula": lambda t, i=indices: np.eye(t.shape[0])[i] @ t,
            "args": (table,),
            "depth": indices.size,
        }


def _joined_rows():
    for name, shapes, axis in (
        ("channels", ((2, 3, 5, 4), (2, 3, 5, 2)), -1),
        ("rows", ((2, 3, 5), (2, 1, 5), (2, 4, 5)), 1),
        ("samples", ((1, 3), (4, 3)), 0),
    ):
        yield {
            "primitive": "join_columns",
            "name": f"concatenate {name}",
            "call": lambda *xs, axis=axis: ops.concatenate(xs, axis),
            "formula": lambda *xs, axis=axis: np.concatenate(xs, axis),
            "args": shapes,
        }
    for name, own, full in (
        ("a vector a sample", (2, 1, 1, 5), (2, 3, 4, 5)),
        ("a value a row", (3, 7, 1), (3, 7, 5)),
        ("in front", (5,), (2, 3, 5)),
        ("one value", (1, 1), (3, 7)),
        ("none", (0, 1, 3), (0, 4, 3)),
    ):
        yield {
            "primitive": "expand",
            "name": name,
            "call": lambda x, full=full: ops.expand(x, full),
            "formula": lambda x, full=full: x * np.ones(full),
            "args": (own,),
            "depth": 2 + int(np.prod(full)),
        }
    yield {
        "primitive": "take_columns",
        "name": "split rows",
        "call": lambda x: ops.split(x, [2, 0, 3], 1)[2],
        "formula": lambda x: x[:, 2:],
        "args": ((3, 5, 7),),
    }
    yield {
        "primitive": "transpose",
        "name": "pixel unshuffle",
        "call": lambda x: ops.pixel_unshuffle(x, 2),
        "formula": lambda x: (
            x.reshape(2, 3, 2, 5, 2, 3).transpose(0, 1, 3, 5, 2, 4).reshape(2, 3, 5, 12)
        ),
        "args": ((2, 6, 10, 3),),
    }
