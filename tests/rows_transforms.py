"""Rows of the primitives that are no sums of products: norms, Cayley transforms, masks of ranks."""

from __future__ import annotations

import numpy as np

from lycoris_cupy import ops
from lycoris_cupy.arrays import module_of
from lycoris_cupy.tape import value_of
from tests import masks

FACTOR = np.array([0.703125])  # exact in bf16


def transform_rows():
    """The fields of each row."""
    yield from _norm_rows()
    yield from _cayley_rows()
    yield from _rotation_rows()
    yield from _turn_rows()
    yield from _rank_rows()
    yield from _dropout_rows()


def _statistics(x, groups):
    """Mean and 1 / deviation of the group that each value of x belongs to, one group at a time."""
    mean, inverse = np.zeros(x.shape), np.zeros(x.shape)
    width = x.shape[-1] // groups
    for n in range(x.shape[0]):
        for g in range(groups):
            part = (n, ..., slice(g * width, (g + 1) * width))
            mean[part] = x[part].mean()
            inverse[part] = 1 / np.sqrt(x[part].var() + 0.01)
    return mean, inverse


def _normalized(x, weight, bias, groups):
    mean, inverse = _statistics(x, groups)
    return (x - mean) * inverse * weight + bias


def _norm_size(x, weight, bias, groups):
    mean, inverse = _statistics(x, groups)
    return (np.abs(x) + np.abs(mean)) * inverse * np.abs(weight) + np.abs(bias)


def _norm_rows():
    for name, shape, groups in (
        ("odd", (2, 5, 3, 21), 3),
        ("channel by channel", (3, 7, 5), 5),
        ("one", (1, 1), 1),
        ("none", (0, 3, 8), 2),
        ("large", (2, 37, 11, 64), 4),
        ("in parts", (2, 41, 23, 40), 2),
        ("in parts, odd", (1, 53, 37, 9), 1),
        ("in parts, many channels", (1, 71, 300), 1),
        ("layer", (13, 70), 1),
        ("layer wide", (3, 1100), 1),
    ):
        layer = name.startswith("layer")

        def call(x, weight, bias, groups=groups, layer=layer):
            if layer:
                return ops.layer_norm(x, weight, bias, eps=0.01)
            return ops.group_norm(x, weight, bias, groups=groups, eps=0.01)

        yield {
            "primitive": "group_norm",
            "name": name,
            "call": call,
            "formula": lambda x, w, b, groups=groups: _normalized(x, w, b, groups),
            "args": (shape, shape[-1:], shape[-1:]),
            "depth": 8 + 3 * int(np.prod(shape[1:])),
            "wide": (1, 2),
            "linear": False,
            "size": lambda x, w, b, groups=groups: _norm_size(x, w, b, groups),
            "bend": 1000.0,
        }


def _blocks(batch, size, spread=0.3):
    return np.random.default_rng([batch, size]).standard_normal((batch, size, size)) * spread


def _transformed(a, limit=None, factor=1.0):
    """The Cayley transform from its definition, one block at a time."""
    q = np.array([factor * (block - block.T) for block in a]).reshape(a.shape)
    if limit is not None:
        q = q * min(1.0, limit / (np.sqrt((q**2).sum()) + 1e-8))
    eye = np.eye(a.shape[1])
    return np.array([(eye + k) @ np.linalg.inv(eye - k) - eye for k in q]).reshape(a.shape)


def _cayley_size(a):
    # |(I - Q)^-1| <= 1, and elimination without pivoting multiplies at most this often.
    largest = max((np.linalg.norm(block - block.T, 2) for block in a), default=0.0)
    return np.full(a.shape, (1 + largest) ** 3)


def _cayley_rows():
    for name, batch, size, options in (
        ("odd", 3, 5, {}),
        ("one", 4, 1, {}),
        ("none", 0, 4, {}),
        ("large angles", 2, 7, {}),
        ("half", 3, 4, {"factor": 0.5}),
        ("limit reached", 3, 5, {"limit": 0.75}),
        ("limit reached, half", 3, 5, {"limit": 0.75, "factor": 0.5}),
        ("limit not reached", 3, 4, {"limit": 100.0}),
        ("limit 0", 2, 3, {"limit": 0.0}),
        ("wide blocks", 1, 33, {}),
        ("blocks past shared memory", 1, 112, {}),
    ):
        yield {
            "primitive": "cayley",
            "name": name,
            "call": lambda a, options=options: ops.cayley(a, **options),
            "formula": lambda a, options=options: _transformed(a, **options),
            "args": (_blocks(batch, size, 2.0 if name == "large angles" else 0.3 / size**0.5),),
            "depth": 16 * size,
            "linear": False,
            "size": _cayley_size,
            "bend": 100.0,
        }


def _columns(e, c=None, s=1.0, turned=False):
    """The grouped columns from their definition, entry by entry."""
    batch, size, _ = e.shape
    out = np.zeros((1, size, batch * size))
    for k in range(batch):
        for n in range(size):
            for m in range(size):
                by = 1.0 if c is None else c[k * size + m]
                entry = e[k, m, n] if turned else e[k, n, m]
                out[0, n, k * size + m] = by * s * entry + (n == m) * (by - 1)
    return out


def _skew(v, size):
    out = np.zeros((v.shape[0], size, size))
    for k in range(v.shape[0]):
        at = 0
        for i in range(size):
            for j in range(i + 1, size):
                out[k, i, j], out[k, j, i] = v[k, at], -v[k, at]
                at += 1
    return out


def _rotation_rows():
    for name, batch, size in (("odd", 3, 5), ("two", 4, 2), ("none", 0, 3)):
        yield {
            "primitive": "skew_blocks",
            "name": name,
            "call": ops.skew_blocks,
            "formula": lambda v, size=size: _skew(v, size),
            "args": ((batch, size * (size - 1) // 2),),
            "depth": 2,
            "linear": False,
            "size": lambda v, size=size: np.abs(_skew(v, size)),
        }
    for name, batch, size, turned in (
        ("odd", 3, 5, False),
        ("turned", 2, 7, True),
        ("one", 1, 1, False),
        ("none", 0, 2, False),
    ):
        yield {
            "primitive": "rotation_columns",
            "name": name,
            "call": lambda e, t=turned: ops.rotation_columns(e, turned=t),
            "formula": lambda e, t=turned: _columns(e, turned=t),
            "args": ((batch, size, size),),
            "depth": 4,
            "wide": (0,),
        }
        yield {
            "primitive": "rotation_columns",
            "name": f"{name}, rescaled",
            "call": lambda e, c, s, t=turned: ops.rotation_columns(e, c, s, turned=t),
            "formula": lambda e, c, s, t=turned: _columns(e, c, s[0], turned=t),
            "args": ((batch, size, size), (batch * size,), FACTOR),
            "depth": 4 + size,
            "wide": (0, 1, 2),
            "fixed": (2,),
            "linear": False,
            "size": lambda e, c, s, t=turned: np.abs(_columns(np.abs(e), np.abs(c), s[0], t)) + 2,
        }


def _turned(y, matrices, bias=0.0, add=0.0, scale=1.0):
    size, columns = matrices.shape[1:]
    out = np.zeros(y.shape)
    for c in range(columns):
        own = slice(c // size * size, c // size * size + size)
        out[..., c] = (y - bias)[..., own] @ matrices[0, :, c]
    return add + scale * out


def _turn_rows():
    for name, lead, batch, size in (
        ("odd", (3, 7), 3, 5),
        ("ones", (4,), 6, 1),
        ("many blocks", (33,), 70, 4),
        ("wide blocks", (5,), 2, 300),
        ("a block a tile", (17,), 2, 256),
        ("many rows", (1100,), 3, 8),
        ("none", (0,), 2, 3),
    ):
        y, columns = (*lead, batch * size), batch * size
        depth = size + int(np.prod(lead)) + 4
        yield {
            "primitive": "turn_blocks",
            "name": name,
            "call": lambda y, m: ops.turn_blocks(y, m),
            "formula": _turned,
            "args": (y, (1, size, columns)),
            "depth": depth,
            "wide": (1,),
        }
        yield {
            "primitive": "turn_blocks",
            "name": f"{name}, all terms",
            "call": lambda y, m, b, a, s: ops.turn_blocks(y, m, bias=b, add=a, scale=s),
            "formula": lambda y, m, b, a, s: _turned(y, m, b, a, s[0]),
            "args": (y, (1, size, columns), (columns,), y, FACTOR),
            "depth": depth,
            "wide": (1, 4),
            "fixed": (2, 4),
            "linear": False,
            "size": lambda y, m, b, a, s: _turned(
                np.abs(y) + np.abs(b), np.abs(m), 0.0, np.abs(a), s[0]
            ),
        }


LEVELS = np.array([0.0, 0.3125, 1.0])


def _kept(x, level, least, exponent, width):
    out = np.array(x)
    ranks = x.shape[-1] // width
    for n in range(x.shape[0]):
        clear = 1 - level[n if len(level) > 1 else 0]
        active = min(ranks, int(clear**exponent * (ranks - least)) + least)
        out[n, ..., active * width :] = 0
    return out


def _rank_rows():
    for name, first, last in (("middle", 2, 3), ("first", 0, 2), ("none", 1, 1)):
        yield {
            "primitive": "take_rows",
            "name": name,
            "call": lambda x, f=first, t=last: ops.take_rows(x, f, t),
            "formula": lambda x, f=first, t=last: x[..., f:t, :],
            "args": ((2, 5, 7),),
        }
    for name, axis in (("columns", -1), ("rows", -2)):

        def woven(a, b, axis=axis):
            shape = list(a.shape)
            shape[axis] *= 2
            out = np.zeros(shape)
            for start, part in ((0, a), (1, b)):
                at = (..., slice(start, None, 2))
                out[at if axis == -1 else (*at, slice(None))] = part
            return out

        yield {
            "primitive": "interleave",
            "name": name,
            "call": lambda a, b, axis=axis: ops.interleave(a, b, axis),
            "formula": woven,
            "args": ((2, 3, 5), (2, 3, 5)),
        }
    for name, shape, level, least, exponent, width in (
        ("a level a sample", (3, 5, 2, 7), LEVELS, 1, 1.0, 1),
        ("one level", (4, 6), LEVELS[1:2], 0, 2.0, 1),
        ("pairs", (3, 4, 10), LEVELS, 2, 1.5, 2),
        ("none", (0, 3), LEVELS[:1], 1, 1.0, 1),
    ):
        options = {"least": least, "exponent": exponent, "width": width}
        yield {
            "primitive": "mask_ranks",
            "name": name,
            "call": lambda x, level, o=options: ops.mask_ranks(x, level, **o),
            "formula": lambda x, level, o=options: _kept(x, level, **o),
            "args": (shape, level),
            "wide": (1,),
            "fixed": (1,),
        }


def _dropout_rows():
    draw = ops.Draw(0.375, seed=0x1234_5678_9ABC_DEF0, tensor=7, kind=2)
    numbers = {"step": 11, "tensor": draw.tensor, "kind": draw.kind, "seed": draw.seed}
    for name, shape, axis in (
        ("odd", (3, 5, 7), None),
        ("aligned", (4, 3, 8), None),
        ("columns", (5, 3, 7), -1),
        ("aligned columns", (9, 16), 1),
        ("rows", (2, 11, 3), 1),
        ("first", (6, 5), 0),
        ("one", (1, 1), 1),
        ("none", (0, 3), 1),
        ("large", (701, 33), None),
    ):

        def kept(shape=shape, axis=axis):
            return masks.along(shape, axis, draw.probability, **numbers)

        def run(x, axis, gain=1.0, add=None):
            step = module_of(value_of(x)).full(1, numbers["step"], np.uint32)
            return ops.dropout(x, draw, step, axis=axis, gain=gain, add=add)

        yield {
            "primitive": "dropout",
            "name": name,
            "call": lambda x, axis=axis: run(x, axis, draw.inverse),
            "formula": lambda x, kept=kept: x * kept() / (1 - draw.probability),
            "args": (shape,),
            "depth": 2,
        }
        yield {
            "primitive": "dropout",
            "name": f"{name}, to a sum",
            "call": lambda x, add, gain, axis=axis: run(x, axis, gain, add),
            "formula": lambda x, add, gain, kept=kept: add + gain * x * kept(),
            "args": (shape, shape, FACTOR),
            "depth": 3,
            "wide": (2,),
            "fixed": (2,),
        }
