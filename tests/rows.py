"""One row a primitive: inputs, an independently written formula, static arguments. A primitive
without a row fails the suite.

Inputs are drawn in f64 and rounded to bf16 first, so that every dtype computes with the same
numbers. Shapes are odd, prime, one-sized and empty, and never square where an axis could be
swapped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lycoris_cupy import ops
from lycoris_cupy.ops.kron import _mix_blocks, mix_blocks_dw1
from lycoris_cupy.ops.kron_product import _kron_product
from lycoris_cupy.ops.kron_square import _kron_cross
from lycoris_cupy.ops.squares import _against_weight
from lycoris_cupy.ops.window import Window
from tests import naive
from tests.rows_network import network_rows
from tests.rows_transforms import transform_rows

FACTOR = np.array([0.703125])  # exact in bf16


@dataclass(frozen=True)
class Row:
    """call: on arrays of any device. formula: on f64. args: shapes, or arrays. wide: positions of
    arguments in the wide dtype.
    """

    primitive: str
    name: str
    call: Callable
    formula: Callable
    args: tuple
    depth: int = 1
    wide: tuple[int, ...] = ()
    fixed: tuple[int, ...] = ()  # arguments that are constants of the tape
    roundings: float = 1.0
    gradient_roundings: float = 1.0
    linear: bool = True  # a sum of products, whose magnitude is the formula over absolute values
    size: Callable | None = None  # the magnitude of any other: what its rounding errors scale with
    bend: float = 0.0  # third derivative over magnitude, for what a central difference leaves out
    dtypes: tuple[str, ...] = ("bf16", "f32", "f64")

    @property
    def id(self) -> str:
        return f"{self.primitive}-{self.name}"

    def draw(self, seed: int = 0) -> list[np.ndarray]:
        """The arguments in f64, exact in bf16."""
        from lycoris_cupy import bf16

        rng = np.random.default_rng([seed, *self.id.encode()])
        out = []
        for arg in self.args:
            value = (
                rng.standard_normal(arg) if isinstance(arg, tuple) else np.asarray(arg, np.float64)
            )
            out.append(value.astype(bf16).astype(np.float64))
        return out


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


def _kron_product_cases():
    """name: (window, x without its channels, w1, w2); the last ones are for the kernel in one piece,
    the wide ones in parts of their channels, the long one for blocks that do several pieces each."""
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
        "long": (flat, (17003,), (4, 4), (1, 16, 16)),
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


def _kron_rows():
    for name, w1, w2 in (
        ("odd", (3, 2), (5, 7, 4)),
        ("linear", (5, 4), (1, 6, 8)),
        ("one", (1, 1), (1, 1, 1)),
        ("tall", (17, 1), (4, 1, 37)),
        ("empty", (3, 2), (1, 0, 5)),
        ("large", (8, 6), (9, 40, 48)),
    ):
        yield Row(
            "kron_weight",
            name,
            ops.kron_weight,
            lambda a, b: naive.kron(a, b),
            (w1, w2),
            max(w2[1] * w2[2] * w2[0], 6),
        )
        yield Row(
            "kron_weight",
            f"{name}, scaled",
            ops.kron_weight,
            lambda a, b, s: s * naive.kron(a, b),
            (w1, w2, FACTOR),
            max(w2[1] * w2[2] * w2[0], w1[0] * w1[1]),
            wide=(2,),
            fixed=(2,),
        )
    for name, lead, w1, n in (
        ("odd", (5,), (3, 2), 7),
        ("space", (2, 3, 4), (9, 5), 3),
        ("one", (1,), (1, 1), 1),
        ("none", (0,), (3, 2), 5),
        ("many blocks", (33,), (21, 18), 40),
        ("more blocks", (5,), (9, 150), 3),
        ("wide blocks", (13,), (9, 7), 136),
        ("many positions", (700,), (4, 3), 8),
        ("eight blocks", (53,), (8, 7), 96),
        ("sixteen blocks", (2, 19), (13, 16), 40),
        ("more positions than warps", (13001,), (3, 2), 8),
    ):
        rows, columns = w1
        x, g = (*lead, columns * n), (*lead, rows * n)
        positions = int(np.prod(lead))
        yield Row(
            "mix_blocks", name, ops.mix_blocks, naive.mix, (x, w1), max(columns, positions * n)
        )
        yield Row(
            "mix_blocks",
            f"{name}, w1 turned",
            lambda x, w1: _mix_blocks(x, w1, turned=True),
            lambda x, w1: naive.mix(x, w1.T),
            (x, (columns, rows)),
            max(columns, positions * n),
        )
        yield Row(
            "mix_blocks_dw1",
            name,
            lambda g, x, w1=w1: mix_blocks_dw1(g, x, *w1),
            lambda g, x, w1=w1: np.einsum(
                "pln,pmn->lm",
                g.reshape(int(np.prod(g.shape[:-1])), w1[0], g.shape[-1] // w1[0]),
                x.reshape(int(np.prod(x.shape[:-1])), w1[1], x.shape[-1] // w1[1]),
            ),
            (g, x),
            positions * n,
        )


def _weight_rows():
    for name, taps, i, r, o in (
        ("odd", 5, 7, 3, 11),
        ("linear", 1, 24, 4, 40),
        ("one", 1, 1, 1, 1),
        ("rank 0", 2, 3, 0, 5),
        ("large", 9, 70, 17, 131),
    ):
        q = r + 2
        size = taps * max(i, o) * max(r, 1)
        yield Row(
            "low_rank_weight",
            name,
            ops.low_rank_weight,
            lambda d, u, s: s * np.einsum("tir,ro->tio", d, u[0]),
            ((taps, i, r), (1, r, o), FACTOR),
            size,
            wide=(2,),
            fixed=(2,),
        )
        yield Row(
            "low_rank_weight",
            f"{name}, an up a tap",
            ops.low_rank_weight,
            lambda d, u: np.einsum("tir,tro->tio", d, u),
            ((taps, i, r), (taps, r, o)),
            size,
        )
        yield Row(
            "tucker_weight",
            name,
            ops.tucker_weight,
            lambda d, m, u, s: s * np.einsum("iq,tqp,po->tio", d, m, u),
            ((i, q), (taps, q, r), (r, o), FACTOR),
            size * q + o * r,
            wide=(3,),
            fixed=(3,),
        )
        yield Row(
            "fold_core",
            name,
            ops.fold_core,
            lambda d, m: np.einsum("iq,tqp->tip", d, m),
            ((i, q), (taps, q, r)),
            size,
        )
        yield Row(
            "hadamard_weight",
            name,
            ops.hadamard_weight,
            lambda a, b, c, d, s: (
                s * np.einsum("tir,ro->tio", a, b[0]) * np.einsum("tir,ro->tio", c, d[0])
            ),
            ((taps, i, r), (1, r, o), (taps, i, q), (1, q, o), FACTOR),
            size * q,
            wide=(4,),
            fixed=(4,),
        )
        yield Row(
            "face_split",
            f"{name}, columns",
            lambda a, b: ops.face_split(a, b, -1),
            lambda a, b: np.einsum("tip,tiq->tipq", a, b).reshape(
                *a.shape[:-1], a.shape[-1] * b.shape[-1]
            ),
            ((taps, i, r), (taps, i, q)),
            q + r,
        )
        yield Row(
            "face_split",
            f"{name}, rows",
            lambda a, b: ops.face_split(a, b, -2),
            lambda a, b: np.einsum("tpo,tqo->tpqo", a, b).reshape(
                a.shape[0], a.shape[1] * b.shape[1], a.shape[-1]
            ),
            ((1, r, o), (1, q, o)),
            q + r,
        )


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


def _square_rows():
    """Norms of a changed weight. In bf16 the cotangent that meets the frozen weight is rounded to
    it once: two roundings for its gradients.
    """
    for name, taps, i, r, o in (
        ("odd", 5, 7, 3, 11),
        ("linear", 1, 24, 4, 40),
        ("one", 1, 1, 1, 1),
        ("rank 0", 2, 3, 0, 5),
        ("large", 9, 70, 17, 131),
    ):
        for axis, length in (("output", o), ("input", i)):
            over = (0, 1) if axis == "output" else (0, 2)
            weight = (taps, i, o)
            size = taps * i * o
            yield Row(
                "changed_square",
                f"{name}, {axis}",
                lambda w, d, axis=axis: ops.changed_square(w, d, axis=axis),
                lambda w, d, over=over: ((w + d) ** 2).sum(axis=over),
                (weight, weight),
                size,
                wide=(1,),
                fixed=(0,),
            )
            yield Row(
                "changed_square",
                f"{name}, {axis}, alone",
                lambda w, axis=axis: ops.changed_square(w, axis=axis),
                lambda w, over=over: (w**2).sum(axis=over),
                (weight,),
                size,
                fixed=(0,),
            )
            for ups, form in ((1, "tir,ro->tio"), (taps, "tir,tro->tio")):

                def norm(d, u, w, q, s, ups=ups, form=form, over=over):
                    delta = s * np.einsum(form, d, u[0] if ups == 1 and "tro" not in form else u)
                    return (2 * w * delta + delta**2).sum(axis=over) + q

                yield Row(
                    "low_rank_norm",
                    f"{name}, {axis}, {'an up a tap' if 'tro' in form else 'one up'}",
                    lambda d, u, w, q, s, axis=axis: ops.low_rank_square(d, u, w, q, s, axis=axis),
                    norm,
                    ((taps, i, r), (ups, r, o), weight, (length,), FACTOR),
                    size * max(r, 1) + 8,
                    wide=(3, 4),
                    fixed=(2, 4),
                    gradient_roundings=2,
                )
            yield Row(
                "against_weight",
                f"{name}, {axis}",
                lambda f, w, axis=axis: _against_weight(f, w, axis=axis),
                lambda f, w, form="tir,tio->tro" if axis == "output" else "tro,tio->tir": np.einsum(
                    form, f, w
                ),
                ((taps, i, r) if axis == "output" else (taps, r, o), weight),
                size * max(r, 1),
                fixed=(1,),
                gradient_roundings=2,
            )
    for name, w1, w2 in (
        ("odd", (3, 2), (5, 7, 4)),
        ("linear", (5, 4), (1, 6, 8)),
        ("one", (1, 1), (1, 1, 1)),
        ("tall", (17, 1), (4, 1, 37)),
        ("empty", (3, 2), (1, 0, 5)),
        ("large", (8, 6), (9, 40, 48)),
    ):
        (rows, blocks), (taps, n, k) = w1, w2
        weight = (taps, blocks * n, rows * k)
        for axis, over, length in (
            ("output", (0, 1), rows * k),
            ("input", (0, 2), blocks * n),
        ):

            def kron_norm(a, b, w, q, s, over=over):
                delta = s * naive.kron(a, b)
                return (2 * w * delta + delta**2).sum(axis=over) + q

            yield Row(
                "kron_norm",
                f"{name}, {axis}",
                lambda a, b, w, q, s, axis=axis: ops.kron_square(a, b, w, q, s, axis=axis),
                kron_norm,
                (w1, w2, weight, (length,), FACTOR),
                int(np.prod(weight)) + 8,
                wide=(3, 4),
                fixed=(2, 4),
            )
            split = {"rows": rows, "blocks": blocks, "axis": axis}
            yield Row(
                "kron_cross",
                f"{name}, {axis}",
                lambda b, w, split=split: _kron_cross(b, w, **split),
                lambda b, w, split=split: kron_cross(b, w, **split),
                (w2, weight),
                int(np.prod(weight)) + 8,
                wide=(0,),
                fixed=(1,),
            )


def kron_cross(w2, weight, rows, blocks, axis):
    """The weight against w2 in each of its blocks, block by block."""
    taps, n, k = w2.shape
    out = np.zeros((blocks, rows * k) if axis == "output" else (rows, blocks * n))
    for m in range(blocks):
        for l in range(rows):  # noqa: E741
            terms = weight[:, m * n : (m + 1) * n, l * k : (l + 1) * k] * w2
            if axis == "output":
                out[m, l * k : (l + 1) * k] = terms.sum(axis=(0, 1))
            else:
                out[l, m * n : (m + 1) * n] = terms.sum(axis=(0, 2))
    return out


def _magnitude_rows():
    # Squares from 4 to 9: where the third derivative is so small that a central difference of
    # width 2^-14 errs by less than the bound of 64 additions.
    rng = np.random.default_rng(0)
    for name, n in (("odd", 7), ("one", 1), ("none", 0), ("large", 1033)):
        squares = rng.uniform(4, 9, n)
        yield Row(
            "magnitude",
            name,
            ops.magnitude,
            lambda m, q, s: s * m / (np.sqrt(q) + 2.0**-52),
            ((n,), squares, FACTOR),
            64,
            wide=(0, 1, 2),
            fixed=(2,),
            linear=False,
        )
        yield Row(
            "shifted",
            name,
            ops.shifted,
            lambda k, s: 1 + (k - s),
            ((n,), FACTOR),
            4,
            wide=(0, 1),
            fixed=(1,),
            linear=False,
        )
        yield Row(
            "shifted",
            f"{name}, of a total",
            ops.shifted,
            lambda k, s, t: t + (k - s),
            ((n,), FACTOR, (n,)),
            4,
            wide=(0, 1, 2),
            fixed=(1,),
            linear=False,
        )


ROWS = [
    *_product_rows(),
    *_extended_rows(),
    *_kron_product_rows(),
    *_kron_rows(),
    *_weight_rows(),
    *_elementwise_rows(),
    *_shape_rows(),
    *_column_rows(),
    *_square_rows(),
    *_magnitude_rows(),
    *(Row(**row) for row in transform_rows()),
    *(Row(**row) for row in network_rows()),
]
