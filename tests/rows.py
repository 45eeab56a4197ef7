"""One row a primitive: inputs, an independently written formula, static arguments. A primitive
without a row fails the suite.

Inputs are drawn in f64 and rounded to bf16 first, so that every dtype computes with the same
numbers. Shapes are odd, prime, one-sized and empty, and never square where an axis could be
swapped.
"""

from __future__ import annotations

import numpy as np

from lycoris_cupy import ops
from tests.row import FACTOR, Row
from tests.rows_kron import kron_rows
from tests.rows_network import network_rows
from tests.rows_norms import norm_rows
from tests.rows_products import product_rows
from tests.rows_transforms import transform_rows
from tests.rows_weights import weight_rows


def _elementwise_rows():
    for name, shape in (
        ("odd", (3, 5, 7)),
        ("one", (1, 1)),
        ("none", (0, 3)),
        ("large", (2000, 33)),
        ("aligned", (2, 1100, 24)),
    ):
        c = shape[-1]
        rows = int(np.prod(shape[:-1]))
        yield Row("cast", f"{name}, to f32", lambda x: ops.cast(x, "f32"), lambda x: x, (shape,))
        yield Row("cast", f"{name}, to bf16", lambda x: ops.cast(x, "bf16"), lambda x: x, (shape,))
        yield Row("cast", f"{name}, to f64", lambda x: ops.cast(x, "f64"), lambda x: x, (shape,))
        yield Row("add", name, ops.add, lambda a, b: a + b, (shape, shape), 2)
        yield Row("multiply", name, ops.multiply, lambda a, b: a * b, (shape, shape), 2)
        yield Row(
            "scale", name, ops.scale, lambda x, s: x * s, (shape, FACTOR), 2, wide=(1,), fixed=(1,)
        )
        for what, fixed in (("", ()), (", frozen slope", (1,))):
            yield Row(
                "prelu",
                name + what,
                ops.prelu,
                lambda x, s: np.where(x < 0, x * s, x),
                (shape, (c,)),
                rows + 1,
                linear=False,
                fixed=fixed,
            )
        yield Row(
            "column_sum",
            name,
            ops.column_sum,
            lambda x: x.sum(tuple(range(x.ndim - 1))),
            (shape,),
            rows,
        )
        yield Row(
            "column_sum",
            f"{name}, scaled",
            ops.column_sum,
            lambda x, s: s * x.sum(tuple(range(x.ndim - 1))),
            (shape, FACTOR),
            rows + 1,
            wide=(1,),
            fixed=(1,),
        )
        yield Row(
            "expand_rows",
            name,
            lambda x, s=shape: ops.expand_rows(x, s),
            lambda x, s=shape: np.broadcast_to(x, s),
            ((c,),),
            rows,
        )


def _shape_rows():
    yield Row(
        "reshape",
        "odd",
        lambda x: ops.reshape(x, (5, -1)),
        lambda x: x.reshape(5, -1),
        ((3, 5, 7),),
    )
    yield Row(
        "transpose",
        "odd",
        lambda x: ops.transpose(x, (2, 0, 1)),
        lambda x: x.transpose(2, 0, 1),
        ((3, 5, 7),),
    )
    yield Row(
        "tap_diagonal",
        "odd",
        ops.tap_diagonal,
        lambda x: np.einsum("tir,ts->tisr", x, np.eye(x.shape[0])).reshape(*x.shape[:2], -1),
        ((4, 5, 3),),
    )
    for name, ranges, total in (
        ("gaps", (((7, 9),), ((1, 4),)), 11),
        ("full", (((3, 5),), ((0, 3),)), 5),
        ("swapped", (((3, 5), (0, 2)), ((2, 3),)), 5),
        ("empty", (((1, 3),), ((2, 2),)), 3),
    ):
        counts = [sum(b - a for a, b in own) for own in ranges]
        places = [np.concatenate([np.arange(a, b) for a, b in own]) for own in ranges]
        yield Row(
            "join_columns",
            name,
            lambda *xs, r=ranges, n=total: ops.join_columns(xs, r, n),
            lambda *xs, at=places, n=total: sum(
                x @ np.eye(n)[p] for x, p in zip(xs, at, strict=True)
            ),
            tuple((3, 5, count) for count in counts),
        )
        yield Row(
            "take_columns",
            name,
            lambda x, r=ranges[0]: ops.take_columns(x, r),
            lambda x, p=places[0]: x[..., p],
            ((3, 5, total),),
        )
    yield Row(
        "resize_nearest",
        "odd",
        lambda x: ops.resize_nearest(x, 3),
        lambda x: x.repeat(3, axis=1).repeat(3, axis=2),
        ((2, 3, 5, 4),),
        9,
    )
    yield Row(
        "transpose",
        "pixel shuffle",
        lambda x: ops.pixel_shuffle(x, 2),
        lambda x: x.reshape(2, 3, 5, 3, 2, 2).transpose(0, 1, 4, 2, 5, 3).reshape(2, 6, 10, 3),
        ((2, 3, 5, 12),),
    )


def _column_rows():
    for name, shape in (
        ("odd", (3, 5, 7)),
        ("one", (1, 1)),
        ("none", (0, 3)),
        ("aligned", (5, 3, 40)),
        ("tall", (2000, 33)),
        ("wide", (9, 1032)),
    ):
        c, rows = shape[-1:], int(np.prod(shape[:-1]))
        yield Row(
            "scale_columns", name, ops.scale_columns, lambda y, c: c * y, (shape, c), rows + 2, (1,)
        )
        yield Row(
            "scale_columns",
            f"{name}, all terms",
            lambda y, c, b, a: ops.scale_columns(y, c, bias=b, add=a),
            lambda y, c, b, a: c * y - c * b + b + a,
            (shape, c, c, shape),
            rows + 6,
            (1,),
            linear=False,
        )
    for name, shape, blocks in (
        ("odd", (2, 3, 5), 3),
        ("one", (1, 1), 1),
        ("only scaled", (4, 3, 7), 1),
        ("no rows", (0, 3), 2),
        ("large", (300, 37), 11),
    ):
        total = shape[-1] * blocks
        yield Row(
            "spread_columns",
            name,
            ops.spread_columns,
            lambda w, c, n=blocks: np.concatenate([w] * n, axis=-1) * c,
            (shape, (total,)),
            int(np.prod(shape[:-1])) + blocks,
            (1,),
        )


ROWS = [
    *product_rows(),
    *kron_rows(),
    *weight_rows(),
    *_elementwise_rows(),
    *_shape_rows(),
    *_column_rows(),
    *norm_rows(),
    *(Row(**row) for row in transform_rows()),
    *(Row(**row) for row in network_rows()),
]
