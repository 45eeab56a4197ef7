"""The Kronecker product that is nearest to a weight.  Van Loan and Pitsianis 1993.

Rearranged so that every block of the weight is a row, a Kronecker product is a matrix of rank one:
the nearest one is the largest singular triple of the rearranged weight.
"""

from __future__ import annotations

from typing import NamedTuple

from .arrays import Array, module_of


class NearestKron(NamedTuple):
    """w1: (L, M). w2: (taps, N, K), of the same norm. error: relative, Frobenius."""

    w1: Array
    w2: Array
    error: float


def nearest_kron(change: Array, split: tuple[int, int, int, int]) -> NearestKron:
    """w1 and w2 with change[t][m * N + n, l * K + k] ~ w1[l, m] * w2[t][n, k].

    change: (taps, M * N, L * K), f64, or f32 on a GPU. split: (L, K, M, N) as of LoKr.
    """
    xp = module_of(change)
    rows, columns, blocks, width = split
    taps = change.shape[0]
    blocked = change.reshape(taps, blocks, width, rows, columns)
    flat = blocked.transpose(3, 1, 0, 2, 4).reshape(rows * blocks, -1)
    tall = flat.shape[0] > flat.shape[1]
    thin = flat.T if tall else flat  # few long rows
    # The largest eigenvector of the small Gram matrix; only its own accuracy counts, not that of
    # the small values, which squares would spoil.
    first = xp.linalg.eigh(thin @ thin.T)[1][:, -1]
    second = first @ thin
    size = float(xp.linalg.norm(second))
    norm = float(xp.linalg.norm(flat))
    if size:
        left_out = float(xp.linalg.norm(thin - first[:, None] * second))
        first, second = first * size**0.5, second / size**0.5
    else:
        left_out = norm
    a, b = (second, first) if tall else (first, second)
    return NearestKron(
        a.reshape(rows, blocks),
        b.reshape(taps, width, columns),
        left_out / norm if norm else 0.0,
    )
