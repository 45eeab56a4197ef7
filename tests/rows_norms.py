"""Rows of the norms of changed weights, and of magnitudes over them."""

from __future__ import annotations

import numpy as np

from lycoris_cupy import ops
from lycoris_cupy.ops.kron_square import _kron_cross
from lycoris_cupy.ops.squares import _against_weight
from tests import naive
from tests.row import FACTOR, KRONECKER, LOW_RANK, Row


def norm_rows():
    yield from _square_rows()
    yield from _magnitude_rows()


def _square_rows():
    """Norms of a changed weight. In bf16 the cotangent that meets the frozen weight is rounded to
    it once: two roundings for its gradients.
    """
    for name, taps, i, r, o in LOW_RANK:
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
    for name, w1, w2 in KRONECKER:
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
