"""Rows of a LoKr's products: with the Kronecker product unbuilt, and of its first factor with the
mix behind it.
"""

from __future__ import annotations

import numpy as np

from lycoris_cupy import ops
from lycoris_cupy.ops.before import by_down_and_mix, by_mix
from lycoris_cupy.ops.kron_product import _kron_product
from tests import naive
from tests.row import FACTOR, Row
from tests.rows_products import _window


def kron_rows():
    yield from _kron_product_rows()
    yield from _mixed_product_rows()
    yield from _mixed_rows()
    yield from _mixed_down_rows()


def _kron_product_cases():
    """name: (window, x without its channels, w1, w2); the aligned ones are for the kernel in one piece,
    the wide ones in parts of their channels, the large one for blocks that do several pieces each."""
    flat, square = _window(), _window((3, 3), padding=1)
    return {
        "odd": (square, (2, 4, 5), (3, 2), (9, 3, 5)),
        "linear, odd": (flat, (7,), (2, 5), (1, 3, 4)),
        "1d": (_window((3,), padding=1), (2, 9), (4, 4), (3, 8, 16)),
        "stride": (_window((3, 3), stride=2, padding=1), (1, 9, 7), (4, 8), (9, 16, 16)),
        "empty": (flat, (0,), (4, 4), (1, 16, 16)),
        "8 of 16": (square, (2, 9, 11), (8, 8), (9, 16, 24)),
        "4 of 24": (square, (1, 8, 13), (8, 4), (9, 24, 16)),
        "8 to 4": (square, (1, 7, 8), (4, 8), (9, 16, 64)),
        "8 of 40": (square, (1, 10, 6), (8, 8), (9, 40, 40)),
        "8 of 80": (square, (1, 8, 8), (8, 8), (9, 80, 80)),
        "dilated": (_window((3, 2), dilation=(1, 2), padding=(2, 0)), (2, 7, 9), (4, 4), (6, 16, 32)),
        "25 taps": (_window((5, 5), padding=2), (1, 8, 8), (8, 8), (25, 32, 16)),
        "one tap": (_window((1, 1)), (3, 5, 7), (4, 4), (1, 40, 80)),
        "linear": (flat, (3, 13), (8, 8), (1, 24, 32)),
        "linear vector": (flat, (), (4, 4), (1, 16, 16)),
        "large": (_window((1, 2)), (1, 199, 199), (4, 4), (2, 16, 16)),
    }  # fmt: skip


def _kron_product_rows():
    for name, (window, lead, w1, w2) in _kron_product_cases().items():
        x = (*lead, w1[1] * w2[1])
        space = window.out_space(lead[1:]) if window.axes else lead[1:]
        y = (*lead[:1], *space, w1[0] * w2[2])
        positions = int(np.prod(y[:-1]))
        yield Row(
            "kron_product",
            name,
            lambda x, w1, w2, a, s, window=window: _kron_product(x, w1, w2, a, s, window=window),
            lambda x, w1, w2, a, s, window=window: (
                a + s * naive.product(x, naive.kron(w1, w2), window)
            ),
            (x, w1, w2, y, FACTOR),
            w1[1] * w2[0] * w2[1] + positions * max(w1[0], w1[1]) * max(w2[1:]) + 2,
            wide=(4,),
            fixed=(4,),
            roundings=2.0,  # where x is mixed by itself, that is rounded
            gradient_roundings=2.0,
        )


def _blocks():
    """Windows, leading axes of x, w1 and what blocks are multiplied with."""
    flat, square = _window(), _window((3, 3), padding=1)
    return {
        "odd": (flat, (2, 3), (3, 2), (1, 7, 5)),
        "one": (flat, (1,), (1, 1), (1, 1, 1)),
        "none": (flat, (0,), (2, 3), (1, 8, 8)),
        "vector": (flat, (), (8, 8), (1, 24, 16)),
        "few": (flat, (61,), (8, 8), (1, 136, 16)),
        "wide blocks": (flat, (5,), (4, 37), (1, 16, 8)),
        "many positions": (flat, (131,), (4, 8), (1, 16, 8)),
        "1x1": (_window((1, 1)), (2, 3, 5), (4, 4), (1, 72, 8)),
        "conv": (square, (1, 4, 5), (4, 2), (9, 8, 8)),
    }


def _mixed_product_rows():
    """The aligned ones are one launch on Hopper: one block of rows and several, tails in all sizes,
    blocks that do not divide 64."""
    cases = _blocks() | {"uneven": (_window(), (3, 7), (6, 5), (1, 40, 72))}
    for name, (window, lead, w1, w) in cases.items():
        walk = window.grouped(w1[1], shared=True)
        yield Row(
            "mixed_product",
            name,
            lambda x, w, w1, walk=walk: ops.mixed_product(x, w, w1, walk),
            lambda x, w, w1, walk=walk: naive.mix(naive.product(x, w, walk), w1),
            ((*lead, w1[1] * w[1]), w, w1),
            w[0] * w[1] + int(np.prod(lead)) * max(*w1, *w[1:]) + 2,
            roundings=2.0,
            gradient_roundings=2.0,
        )


def _mixed_rows():
    """The aligned ones with few positions are one launch on Hopper: tails in all sizes, more rows of
    w1 than columns and fewer, strips that end within a block."""
    flat = _window()
    cases = _blocks() | {
        "uneven": (flat, (3, 7), (6, 5), (1, 40, 200)),
        "two bands": (flat, (67,), (2, 3), (1, 72, 136)),
        "one block": (flat, (5,), (3, 1), (1, 72, 8)),
        "more blocks than there are places": (flat, (2,), (2, 65), (1, 8, 16)),
    }
    for name, (window, lead, w1, w2) in cases.items():
        other = window.grouped(w1[0], shared=True)
        inputs, columns = w1[1] * w2[1], w1[0] * w2[2]
        yield Row(
            "extended",
            f"mixed, {name}",
            lambda x, w, w1, w2, b, a, b2, s, window=window, other=other: ops.extended(
                x,
                w,
                window,
                ops.pending(x, w2, other, add=a, scale=s, bias=b2, before=by_mix(w1)),
                bias=b,
            ),
            lambda x, w, w1, w2, b, a, b2, s, window=window, other=other: (
                a
                + b
                + naive.product(x, w, window)
                + s * (naive.product(naive.mix(x, w1), w2, other) + b2)
            ),
            (
                (*lead, inputs), (w2[0], inputs, columns), w1, w2, (columns,), (*lead, columns),
                (columns,), FACTOR,
            ),
            2 * w2[0] * inputs + int(np.prod(lead)) * max(*w1, *w2[1:]) + 4,
            wide=(7,),
            fixed=(7,),
            roundings=3.0,  # x2, and elsewhere the second sum and the scaled bias
            gradient_roundings=2.0,
        )  # fmt: skip


def _mixed_down_rows():
    """The aligned ones with few positions and 8 or 16 ranks are one launch on Hopper."""
    flat, square = _window(), _window((3, 3), padding=1)
    cases = {
        "odd": (flat, (2, 3), (3, 2), (1, 7, 5), 4),
        "none": (flat, (0,), (2, 3), (1, 8, 8), 8),
        "vector": (flat, (), (8, 8), (1, 64, 16), 16),
        "few": (flat, (61,), (8, 8), (1, 136, 16), 40),
        "uneven": (flat, (3, 7), (6, 5), (1, 40, 8), 200),
        "two bands": (flat, (67,), (2, 3), (1, 64, 16), 136),
        "one block": (flat, (5,), (3, 1), (1, 72, 8), 8),
        "other ranks": (flat, (5,), (3, 4), (1, 72, 24), 8),
        "1x1": (_window((1, 1)), (2, 3, 5), (4, 4), (1, 72, 8), 24),
        "conv": (square, (1, 4, 5), (4, 2), (9, 8, 8), 8),
    }
    for name, (window, lead, w1, down, k) in cases.items():
        walk = window.grouped(w1[1], shared=True)
        other = window.pointwise_like(w1[0], shared=True)
        inputs, columns, up = w1[1] * down[1], w1[0] * k, (1, down[2], k)
        yield Row(
            "extended",
            f"mixed down, {name}",
            lambda x, w, down, w1, up, b, a, b2, s, window=window, walk=walk, other=other: (
                ops.extended(
                    x,
                    w,
                    window,
                    ops.pending(
                        x, up, other, add=a, scale=s, bias=b2, before=by_down_and_mix(down, w1, walk)
                    ),
                    bias=b,
                )
            ),
            lambda x, w, down, w1, up, b, a, b2, s, window=window, walk=walk, other=other: (
                a
                + b
                + naive.product(x, w, window)
                + s * (naive.product(naive.mix(naive.product(x, down, walk), w1), up, other) + b2)
            ),
            (
                (*lead, inputs), (down[0], inputs, columns), down, w1, up, (columns,),
                (*lead, columns), (columns,), FACTOR,
            ),
            2 * down[0] * inputs + int(np.prod(lead)) * max(*w1, *down[1:], k) + 4,
            wide=(8,),
            fixed=(8,),
            roundings=4.0,  # inner, x2, and elsewhere the second sum and the scaled bias
            gradient_roundings=3.0,  # likewise, and the flow through both factors
        )  # fmt: skip
