"""The Tucker-2 approximation of a convolution's change, by higher-order orthogonal iteration.  De
Lathauwer, De Moor and Vandewalle 2000; Kim et al. 2016, arXiv 1511.06530.

    change[t] ~ down @ mid[t] @ up
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .arrays import Array, module_of, to_device
from .ranks import RankRule
from .svd import Svd

_ROUNDS = 25  # at most; each costs two thin decompositions
_STILL = 1e-9  # a round that gains less than this share of the norm is the last


class Tucker2(NamedTuple):
    """down: (IN, Q) with orthonormal columns. mid: (taps, Q, P). up: (P, OUT) with orthonormal
    rows. error: relative, Frobenius.
    """

    down: Array
    mid: Array
    up: Array
    error: float


def tucker2(change: Array, rank: int) -> Tucker2:
    """The best that the iteration finds with Q = P = rank, from the truncated higher-order SVD on.

    change: (taps, IN, OUT), f64, or f32 on a GPU. rank: cut to what each side has.
    """
    xp = module_of(change)
    norm = float(xp.linalg.norm(change))
    down = _leading(_by_inputs(change), rank)
    up = _leading(_by_outputs(change), rank).T
    gained = 0.0
    for _ in range(_ROUNDS):
        down = _leading(_by_inputs(change @ up.T), rank)
        up = _leading(_by_outputs(down.T @ change), rank).T
        mid = down.T @ change @ up.T
        size = float(xp.linalg.norm(mid))
        if size - gained <= _STILL * norm:
            break
        gained = size
    left_out = float(xp.linalg.norm(change - down @ mid @ up))
    return Tucker2(down, mid, up, left_out / norm if norm else 0.0)


def tucker_rank(change: Array, rule: RankRule) -> int:
    """The larger of the ranks that the rule chooses for the two sides: other programs read files
    whose core is square.
    """
    sides = (_by_inputs(change), _by_outputs(change))
    return max(rule.choose(Svd(_values(side))) for side in sides)


def _by_inputs(change: Array) -> Array:
    """(IN, taps * OUT)."""
    return change.transpose(1, 0, 2).reshape(change.shape[1], -1)


def _by_outputs(change: Array) -> Array:
    """(OUT, taps * IN)."""
    return change.transpose(2, 0, 1).reshape(change.shape[2], -1)


def _leading(wide: Array, rank: int) -> Array:
    """The first left singular vectors, (rows, rank or fewer). Of a matrix with more columns than
    rows, by way of the triangle of its transpose: no squares are taken, small values stay exact.
    """
    xp = module_of(wide)
    core: Array = wide
    if wide.shape[1] > wide.shape[0]:
        triangle: Array = xp.linalg.qr(wide.T, mode="r")  # pyright: ignore
        core = triangle.T
    return xp.linalg.svd(core, full_matrices=False)[0][:, :rank]


def _values(wide: Array) -> np.ndarray:
    xp = module_of(wide)
    core = xp.linalg.qr(wide.T, mode="r") if wide.shape[1] > wide.shape[0] else wide
    return to_device(xp.linalg.svd(core, compute_uv=False), "cpu")
