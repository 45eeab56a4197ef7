"""The largest singular values of a large matrix by random projections, with a check.  Halko,
Martinsson and Tropp 2011, arXiv 0909.4061.

On the CPU in f64, on a GPU in f32; the same code.
"""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple

import numpy as np

from .arrays import Array, module_of, on_gpu, to_device
from .ranks import RankRule
from .svd import Svd, matrix_svd

_POWERS = 2  # rounds of A A^T before the projection: what makes slowly falling values come out
_OVER = 10  # columns more than the rank asked for
_PROBES = 8  # vectors that look for the largest singular value of what is left
_PROBE_ROUNDS = 5  # they come within a few per cent of it from below
_MARGIN = 1.1
_SLACK = 0.02  # of the error that a truncation may have above the best one's
# What a sum of squares leaves of a norm when equal parts are taken from it, by the item's size.
_ROUNDING = {8: 1e-7, 4: 1e-3}


class Truncated(NamedTuple):
    """svd: of the rank and no more, on the CPU. error: relative, Frobenius, of the truncation.
    exact: False where random projections gave it.
    """

    svd: Svd
    rank: int
    error: float
    exact: bool


def truncated_svd(matrix: Array, rule: RankRule) -> Truncated:
    """A matrix cut by a rule, by random projections where they are good enough.

    They are where what they leave out is estimated to be at most 1.02 times what the best
    approximation of that rank must leave out; elsewhere, and where most values are wanted, the
    matrix is decomposed in full. The error told is what is left out, measured, in either case.
    """
    norm = float(module_of(matrix).linalg.norm(matrix))
    width = rule.cap if rule.cap is not None else 32
    while norm and not rule.needs_all and 4 * (width + _OVER) <= min(matrix.shape):
        found, missed, rest = _projected(matrix, width + _OVER)
        if rule.decided(found._replace(values=found.values[:width]), norm):
            rank = rule.choose(found, norm)
            kept = found.values[:rank] ** 2
            left_out = max(norm**2 - float(kept.sum()), 0.0)
            negligible = left_out <= (_ROUNDING[matrix.dtype.itemsize] * norm) ** 2
            if negligible or left_out <= (1 + _SLACK) ** 2 * (
                left_out - _deficit(kept, missed, rest)
            ):
                error = 0.0 if negligible else sqrt(left_out) / norm
                return Truncated(_cut(found, rank), rank, error, False)
            break
        width *= 2
    whole = _exact(matrix)
    rank = rule.choose(whole)
    return Truncated(_cut(whole, rank), rank, whole.error(rank), True)


def _projected(matrix: Array, width: int) -> tuple[Svd, np.ndarray, float]:
    """The decomposition of Q Q^T A for a random Q of this many columns; |(A - Q Q^T A) v|^2 of each
    right vector v; and an estimate of the largest singular value of A - Q Q^T A.
    """
    xp = module_of(matrix)
    basis, _ = xp.linalg.qr(matrix @ _normal(matrix, width))
    for _ in range(_POWERS):
        turned, _ = xp.linalg.qr(matrix.T @ basis)
        basis, _ = xp.linalg.qr(matrix @ turned)
    left, values, right = xp.linalg.svd(basis.T @ matrix, full_matrices=False)

    def rest(x):
        x = matrix @ x
        return x - basis @ (basis.T @ x)

    missed = to_device((rest(right.T) ** 2).sum(0), "cpu").astype(np.float64)
    probe, growth = _normal(matrix, _PROBES), 0.0
    for _ in range(_PROBE_ROUNDS):
        probe = probe / xp.maximum(xp.linalg.norm(probe, axis=0), np.finfo(probe.dtype).tiny)
        probe = rest(probe)
        growth = float(xp.linalg.norm(probe, axis=0).max())
        probe = matrix.T @ probe
    return _host(values, basis @ left, right), missed, _MARGIN * growth


def _deficit(kept: np.ndarray, missed: np.ndarray, rest: float) -> float:
    """How much the squares of the true values exceed those found, summed: the quadratic residual
    bound of Rayleigh and Ritz on A A^T.  Mathias 1998.

    kept: found, squared. missed: |(A - Q Q^T A) v|^2 of the right vectors. rest: see `_projected`.
    """
    if not kept[-1] > rest**2:
        return float("inf")
    return float((kept * missed[: kept.size] / (kept - rest**2)).sum())


def _normal(matrix: Array, columns: int) -> Array:
    """Random columns for the matrix to act on, the same on every device and in every run."""
    drawn = np.random.default_rng(columns).standard_normal((matrix.shape[1], columns))
    device = f"cuda:{matrix.device.id}" if on_gpu(matrix) else "cpu"
    return to_device(drawn.astype(matrix.dtype), device)


def _exact(matrix: Array) -> Svd:
    if not on_gpu(matrix):
        return matrix_svd(matrix)
    import cupy

    left, values, right = cupy.linalg.svd(matrix, full_matrices=False)
    return _host(values, left, right)


def _host(values: Array, left: Array, right: Array) -> Svd:
    values, left, right = (to_device(a, "cpu").astype(np.float64) for a in (values, left, right))
    return Svd(values, left, right)


def _cut(svd: Svd, rank: int) -> Svd:
    assert svd.left is not None and svd.right is not None
    return Svd(svd.values[:rank], svd.left[:, :rank], svd.right[:rank])
