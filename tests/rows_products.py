"""Rows of products: linear and convolution in every geometry, their gradients, and two of them in
one sum.
"""

from __future__ import annotations

import numpy as np

from lycoris_cupy import ops
from lycoris_cupy.ops.before import by_down
from lycoris_cupy.ops.window import Window
from tests import naive
from tests.row import FACTOR, Row


def product_rows():
    yield from _product_rows()
    yield from _extended_rows()
    yield from _hadamard_rows()
    yield from _low_rank_rows()


def _window(kernel=(), stride=1, padding=0, dilation=1, groups=1, shared=False) -> Window:
    return Window.of(kernel, stride, padding, dilation, groups).grouped(groups, shared)


# name: (window, x shape, outputs a group); inputs a group are x's channels / groups.
GEOMETRIES = {
    "linear": (_window(), (5, 7), 11),
    "linear 3d": (_window(), (2, 3, 13), 5),
    "linear vector": (_window(), (7,), 3),
    "linear one": (_window(), (1, 1), 1),
    "linear none": (_window(), (0, 7), 3),
    "linear no inputs": (_window(), (3, 0), 5),
    "linear wide": (_window(), (33, 264), 136),
    "linear groups": (_window(groups=3), (5, 21), 4),
    "linear shared": (_window(groups=3, shared=True), (5, 21), 4),
    "1x1": (_window((1, 1)), (2, 3, 5, 7), 11),
    "1x1 stride": (_window((1, 1), stride=2), (2, 5, 4, 7), 3),
    "1x1 padded": (_window((1, 1), padding=1), (1, 2, 3, 5), 3),
    "1x1 groups": (_window((1, 1), groups=2), (2, 3, 5, 14), 5),
    "3x3": (_window((3, 3), padding=1), (2, 5, 6, 7), 11),
    "3x3 aligned": (_window((3, 3), padding=1), (2, 9, 11, 48), 72),
    "3x3 large": (_window((3, 3), padding=1), (1, 17, 19, 136), 200),
    "3x3 stride": (_window((3, 3), stride=(2, 3), padding=(1, 2)), (2, 8, 7, 5), 3),
    "3x2 dilation": (_window((3, 2), padding=(2, 1), dilation=(2, 3)), (1, 7, 8, 5), 3),
    "5x1": (_window((5, 1), padding=(2, 0)), (1, 6, 5, 8), 16),
    "3x3 none": (_window((3, 3), padding=1), (0, 4, 5, 8), 8),
    "3x3 groups": (_window((3, 3), padding=1, groups=2), (2, 5, 4, 6), 5),
    "3x3 groups aligned": (_window((3, 3), padding=1, groups=2), (2, 6, 5, 32), 24),
    "3x3 groups stride": (_window((3, 3), stride=2, padding=1, groups=3), (2, 7, 6, 24), 8),
    "3x3 shared": (_window((3, 3), padding=1, groups=3, shared=True), (2, 5, 4, 15), 7),
    "3x3 shared aligned": (
        _window((3, 3), stride=2, padding=1, groups=4, shared=True),
        (2, 7, 5, 64),
        8,
    ),
    "depthwise": (_window((3, 3), padding=1, groups=13), (2, 5, 6, 13), 1),
    "depthwise aligned": (_window((3, 3), stride=2, padding=1, groups=40), (2, 9, 6, 40), 1),
    "depthwise two outputs": (_window((3, 3), dilation=2, padding=2, groups=8), (1, 7, 6, 8), 2),
    "1d": (_window((3,), padding=1), (2, 9, 5), 7),
    "1d stride": (_window((4,), stride=3, padding=2, dilation=2, groups=2), (2, 17, 6), 3),
    "3d": (_window((2, 3, 2), padding=(0, 1, 1)), (2, 3, 4, 5, 3), 5),
    "3d groups": (_window((2, 1, 3), stride=(1, 2, 1), padding=1, groups=2), (1, 4, 3, 5, 16), 8),
}


def _extended_cases():
    """name: (window, x, w; the second window, x2, w2), whose sum is one result."""
    flat, square = _window(), _window((3, 3), padding=1)
    return {
        "linear": (flat, (5, 24), (1, 24, 40), flat, (5, 8), (1, 8, 40)),
        "linear, few": (flat, (64, 200), (1, 200, 264), flat, (64, 72), (1, 72, 264)),
        "linear, vector": (flat, (136,), (1, 136, 72), flat, (16,), (1, 16, 72)),
        "linear, few blocks": (flat, (33, 64), (1, 64, 120), _window(groups=3, shared=True), (33, 72), (1, 24, 40)),
        "linear, odd": (flat, (2, 3, 7), (1, 7, 11), flat, (2, 3, 5), (1, 5, 11)),
        "linear, long": (flat, (1100, 16), (1, 16, 24), flat, (1100, 8), (1, 8, 24)),
        "linear, tiles": (flat, (2, 150, 72), (1, 72, 136), flat, (2, 150, 24), (1, 24, 136)),
        "linear, blocks": (flat, (9, 16), (1, 16, 128), _window(groups=2, shared=True), (9, 48), (1, 24, 64)),
        "conv, rows": (square, (2, 4, 5, 8), (9, 8, 24), _window((1, 1)), (2, 4, 5, 16), (1, 16, 24)),
        "conv, taps": (square, (1, 5, 4, 16), (9, 16, 80), _window((3, 3), padding=1, groups=2, shared=True), (1, 5, 4, 16), (9, 8, 40)),
        "conv, same walk": (square, (2, 9, 11, 24), (9, 24, 72), square, (2, 9, 11, 40), (9, 40, 72)),
        "conv, same walk, line": (_window((3,), padding=1), (2, 40, 24), (3, 24, 72), _window((3,), padding=1), (2, 40, 40), (3, 40, 72)),
        "conv, same walk, odd": (square, (2, 4, 5, 3), (9, 3, 7), square, (2, 4, 5, 5), (9, 5, 7)),
        "conv, stride": (_window((3, 2), stride=2, padding=1), (2, 6, 5, 8), (6, 8, 16), _window((1, 1)), (2, 3, 3, 8), (1, 8, 16)),
        "conv, groups": (_window((3,), padding=1, groups=2), (2, 7, 6), (3, 3, 8), _window((1,), groups=2), (2, 7, 4), (1, 2, 8)),
        "conv, groups aligned": (_window((3, 3), padding=1, groups=2), (2, 6, 5, 32), (9, 16, 48), _window((1, 1), groups=2), (2, 6, 5, 32), (1, 16, 48)),
        "conv, groups stride": (_window((3, 3), stride=2, padding=1, groups=2), (2, 7, 6, 32), (9, 16, 48), _window((3, 3), stride=2, padding=1, groups=2), (2, 7, 6, 48), (9, 24, 48)),
        "conv, groups and a dense term": (_window((3, 2), stride=(1, 2), groups=3), (2, 5, 6, 24), (6, 8, 72), _window((1, 1)), (2, 3, 3, 16), (1, 16, 72)),
        "conv, blocks stride": (_window((3, 3), stride=2, padding=1), (1, 7, 9, 16), (9, 16, 80), _window((3, 3), stride=2, padding=1, groups=2, shared=True), (1, 7, 9, 16), (9, 8, 40)),
        "conv, long reach": (_window((3,), padding=300, dilation=300), (2, 70, 24), (3, 24, 40), _window((1,)), (2, 70, 16), (1, 16, 40)),
        "empty": (flat, (0, 8), (1, 8, 16), flat, (0, 8), (1, 8, 16)),
    }  # fmt: skip


def _hadamard_rows():
    """As Hopper's kernels of few positions take it, and as they do not."""
    for name, rows, (inputs, outputs), rank in (
        ("odd", (2, 3), (5, 11), 3),
        ("few", (13,), (136, 72), 8),
        ("image", (2, 3, 9), (72, 200), 16),
        ("many", (300,), (24, 40), 16),
        ("none", (0,), (8, 16), 8),
    ):
        down, up, y = (1, inputs, rank), (1, rank, outputs), (*rows, outputs)
        yield Row(
            "hadamard_product",
            name,
            lambda x, w, b, a, d1, u1, d2, u2, s: ops.hadamard_product(
                x, w, (d1, u1, d2, u2), scale=s, add=a, bias=b
            ),
            lambda x, w, b, a, d1, u1, d2, u2, s: (
                a + b + x @ (w[0] + s * (d1[0] @ u1[0]) * (d2[0] @ u2[0]))
            ),
            ((*rows, inputs), (1, inputs, outputs), (outputs,), y, down, up, down, up, FACTOR),
            2 * inputs + 3 * rank + 4,
            wide=(8,),
            fixed=(8,),
            roundings=2.0,  # the change is rounded by itself
            gradient_roundings=2.0,  # and what is shared by the gradients of the factors
        )


def _extended_rows():
    """Each case as it is, and with a scale of the layer's own columns, which is differentiated too."""
    for name, (window, x, w, other, x2, w2) in _extended_cases().items():
        y = np.shape(naive.product(np.zeros(x), np.zeros(w), window))
        shapes, depth = (x, w, (y[-1],), y, x2, w2), w[0] * w[1] + w2[0] * w2[1] + 4
        yield Row(
            "extended",
            name,
            lambda x, w, b, a, x2, w2, s, window=window, other=other: ops.extended(
                x, w, window, ops.pending(x2, w2, other, add=a, scale=s), bias=b
            ),
            lambda x, w, b, a, x2, w2, s, window=window, other=other: (
                a + b + naive.product(x, w, window) + s * naive.product(x2, w2, other)
            ),
            (*shapes, FACTOR),
            depth,
            wide=(6,),
            fixed=(6,),
            roundings=2.0,  # where the second sum is written by itself, it is rounded by itself
        )
        yield Row(
            "extended",
            f"second bias, {name}",
            lambda x, w, b, x2, w2, b2, s, window=window, other=other: ops.extended(
                x, w, window, ops.pending(x2, w2, other, scale=s, bias=b2), bias=b
            ),
            lambda x, w, b, x2, w2, b2, s, window=window, other=other: (
                b + naive.product(x, w, window) + s * (naive.product(x2, w2, other) + b2)
            ),
            (x, w, (y[-1],), x2, w2, (y[-1],), FACTOR),
            depth,
            wide=(6,),
            fixed=(6,),
            roundings=3.0,  # as above, and the scaled bias by itself
        )
        yield Row(
            "extended",
            f"one x, {name}",
            lambda x, w, b, w2, b2, s, window=window: ops.extended(
                x, w, window, ops.pending(x, w2, window, scale=s, bias=b2), bias=b
            ),
            lambda x, w, b, w2, b2, s, window=window: (
                b + naive.product(x, w, window) + s * (naive.product(x, w2, window) + b2)
            ),
            (x, w, (y[-1],), w, (y[-1],), FACTOR),
            2 * w[0] * w[1] + 4,
            wide=(5,),
            fixed=(5,),
            roundings=3.0,
            gradient_roundings=2.0,  # of x: elsewhere one of its two terms is rounded by itself
        )
        yield Row(
            "extended",
            f"columns, {name}",
            lambda x, w, b, a, x2, w2, c, window=window, other=other: ops.extended(
                x, w, window, ops.pending(x2, w2, other, add=a), bias=b, c=c
            ),
            lambda x, w, b, a, x2, w2, c, window=window, other=other: (
                a + b + c * naive.product(x, w, window) + naive.product(x2, w2, other)
            ),
            (*shapes, (y[-1],)),
            depth,
            wide=(6,),
            roundings=3.0,  # elsewhere both sums are written by themselves, and rounded
            gradient_roundings=2.0,  # c * g, and x * w beside it
        )


def _product_rows():
    for name, (window, x, outputs) in GEOMETRIES.items():
        inputs = x[-1] // window.groups
        w = (window.taps, inputs, outputs if window.shared else outputs * window.groups)
        space = x[1:-1] if window.axes else ()
        y = (
            (x[0], *window.out_space(space), outputs * window.groups)
            if window.axes
            else (*x[:-1], outputs)
        )
        if not window.axes and window.groups > 1:
            y = (*x[:-1], outputs * window.groups)
        depth = window.taps * inputs
        positions = int(np.prod(y[:-1])) * (window.groups if window.shared else 1)
        yield Row(
            "product",
            name,
            lambda x, w, window=window: ops.product(x, w, window),
            lambda x, w, window=window: naive.product(x, w, window),
            (x, w),
            depth,
        )
        yield Row(
            "product",
            f"{name}, all terms",
            lambda x, w, b, a, s, window=window: ops.product(x, w, window, bias=b, add=a, scale=s),
            lambda x, w, b, a, s, window=window: a + s * naive.product(x, w, window) + b,
            (x, w, (y[-1],), y, FACTOR),
            depth + 3,
            wide=(4,),
            fixed=(4,),
        )
        yield Row(
            "product_dx",
            name,
            lambda g, w, a, s, window=window, space=space: ops.product_dx(
                g, w, window, space, add=a, scale=s
            ),
            lambda g, w, a, s, window=window, space=space: (
                a + s * naive.product_dx(g, w, window, space)
            ),
            (y, w, x, FACTOR),
            window.taps * outputs + 2,
            wide=(3,),
            fixed=(3,),
        )
        yield Row(
            "product_dw",
            name,
            lambda x, g, s, window=window: ops.product_dw(x, g, window, scale=s),
            lambda x, g, s, window=window: s * naive.product_dw(x, g, window),
            (x, y, FACTOR),
            positions,
            wide=(2,),
            fixed=(2,),
        )
    window, x, outputs = GEOMETRIES["3x3"]
    yield Row(
        "product",
        "bias, rounded",
        lambda x, w, b: ops.product(x, w, window, bias=b),
        lambda x, w, b: naive.product(x, w, window) + b,
        (x, (9, 7, 11), (11,)),
        64,
    )
    # One rounding after the bias, whatever kernel cuBLASLt picks.
    for m, k, n in (
        (6, 16, 24),
        (15, 12, 20),
        (64, 256, 512),
        (1, 64, 8),
        (300, 40, 136),
        (7, 6, 5),
    ):
        yield Row(
            "product",
            f"linear bias {m} {k} {n}",
            lambda x, w, b: ops.product(x, w, bias=b),
            lambda x, w, b: naive.product(x, w, _window()) + b,
            ((m, k), (1, k, n), (n,)),
            k + 1,
        )


def _low_rank_rows():
    """The aligned ones with few positions and up to 16 ranks are one launch on Hopper."""
    flat, square = _window(), _window((3, 3), padding=1)
    cases = {
        "odd": (flat, (2, 3), (1, 7, 3), 5, flat),
        "none": (flat, (0,), (1, 8, 8), 8, flat),
        "vector": (flat, (), (1, 136, 16), 72, flat),
        "few": (flat, (61,), (1, 200, 16), 264, flat),
        "rank 8": (flat, (3, 7), (1, 328, 8), 136, flat),
        "two bands": (flat, (67,), (1, 72, 16), 136, flat),
        "rank 24": (flat, (5,), (1, 72, 24), 40, flat),
        "many positions": (flat, (131,), (1, 16, 16), 8, flat),
        "1x1": (_window((1, 1)), (2, 3, 5), (1, 72, 8), 24, _window((1, 1))),
        "conv": (square, (1, 4, 5), (9, 8, 8), 16, _window((1, 1))),
    }
    for name, (window, lead, down, columns, other) in cases.items():
        taps, inputs, rank = down
        yield Row(
            "extended",
            f"low rank, {name}",
            lambda x, w, down, up, b, a, b2, s, window=window, other=other: ops.extended(
                x,
                w,
                window,
                ops.pending(x, up, other, add=a, scale=s, bias=b2, before=by_down(down, window)),
                bias=b,
            ),
            lambda x, w, down, up, b, a, b2, s, window=window, other=other: (
                a
                + b
                + naive.product(x, w, window)
                + s * (naive.product(naive.product(x, down, window), up, other) + b2)
            ),
            (
                (*lead, inputs), (taps, inputs, columns), down, (1, rank, columns), (columns,),
                (*lead, columns), (columns,), FACTOR,
            ),
            2 * taps * inputs + rank + int(np.prod(lead)) + taps * columns + 4,
            wide=(7,),
            fixed=(7,),
            roundings=3.0,  # the inner product, and elsewhere the second sum and the scaled bias
            gradient_roundings=2.0,
        )  # fmt: skip
