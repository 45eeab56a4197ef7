"""Rows of weights that are built: Kronecker, low rank, Tucker, face-splitting; and the mix of blocks."""

from __future__ import annotations

import numpy as np

from lycoris_cupy import ops
from lycoris_cupy.ops.kron import _mix_blocks, mix_blocks_dw1
from tests import naive
from tests.row import FACTOR, KRONECKER, LOW_RANK, Row


def weight_rows():
    yield from _kron_rows()
    yield from _weight_rows()


def _kron_rows():
    for name, w1, w2 in KRONECKER:
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
        ("sixteen blocks, many positions", (1103,), (13, 9), 8),
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
    for name, taps, i, r, o in LOW_RANK:
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
