"""Singular value decompositions of matrices that are known by their factors, in f64 on the CPU.

A product of thin factors is never multiplied out: each factor is brought into triangular form, and
only the small core between them is decomposed. A Kronecker product is decomposed side by side.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .errors import ShapeError

# Values below this share of the largest are rounding of the f64 sums, and count as zero.
NOISE = 1e-12


class Svd(NamedTuple):
    """left @ diag(values) @ right, values falling.

    left: (rows, R), orthonormal columns. right: (R, columns), orthonormal rows. Both are None where
    only the values were asked for.
    """

    values: np.ndarray
    left: np.ndarray | None = None
    right: np.ndarray | None = None

    @property
    def norm(self) -> float:
        """The Frobenius norm."""
        return float(np.linalg.norm(self.values))

    @property
    def rank(self) -> int:
        """How many values are more than rounding."""
        return int((self.values > NOISE * self.values[0]).sum()) if self.values.size else 0

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the values' shares; 0 of nothing.  Roy and Vetterli 2007."""
        total = self.values.sum()
        if not total:
            return 0.0
        shares = self.values[self.values > 0] / total
        return float(np.exp(-(shares * np.log(shares)).sum()))

    def error(self, rank: int) -> float:
        """The Frobenius norm of what a best approximation of this rank leaves out, as a share of
        the whole; 0 of nothing.  Eckart and Young 1936.
        """
        return float(np.linalg.norm(self.values[rank:])) / self.norm if self.norm else 0.0

    def factors(self, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """(down, up), (rows, rank) and (rank, columns), whose product is the best approximation of
        this rank. The values are shared evenly; what is missing up to the rank is zero.
        """
        if self.left is None or self.right is None:
            raise ShapeError("this decomposition has its values only: ask for the vectors too")
        down = np.zeros((self.left.shape[0], rank))
        up = np.zeros((rank, self.right.shape[1]))
        kept = min(rank, self.values.size)
        root = np.sqrt(self.values[:kept])
        down[:, :kept] = self.left[:, :kept] * root
        up[:kept] = root[:, None] * self.right[:kept]
        return down, up

    def scaled(self, scale: float) -> Svd:
        """That of scale times the matrix."""
        left = None if self.left is None else self.left * (-1.0 if scale < 0 else 1.0)
        return Svd(self.values * abs(scale), left, self.right)


def flat_rows(array: np.ndarray) -> np.ndarray:
    """(taps, rows, columns) as a matrix (taps * rows, columns)."""
    return array.reshape(-1, array.shape[-1])


def matrix_svd(matrix: np.ndarray, vectors: bool = True) -> Svd:
    """Of a matrix (rows, columns).

    Without vectors, and with more than 512 on both sides, the values are roots of the eigenvalues
    of the smaller Gram matrix: then those below 1e-8 of the largest are noise.
    """
    matrix = np.asarray(matrix, np.float64)
    if vectors:
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
        return Svd(values, left, right)
    if min(matrix.shape) > 512:
        gram = matrix @ matrix.T if matrix.shape[0] < matrix.shape[1] else matrix.T @ matrix
        return Svd(np.sqrt(np.maximum(np.linalg.eigvalsh(gram)[::-1], 0)))
    return Svd(np.linalg.svd(matrix, compute_uv=False))


def product_svd(down: np.ndarray, up: np.ndarray, vectors: bool = True) -> Svd:
    """Of down @ up, through a core of min(rows, R) x min(R, columns).

    down: (rows, R). up: (R, columns).
    """
    down, up = np.asarray(down, np.float64), np.asarray(up, np.float64)
    if not vectors:
        first, second = (np.asarray(np.linalg.qr(side, "r")) for side in (down, up.T))
        return matrix_svd(first @ second.T, False)
    left, first = np.linalg.qr(down)
    right, second = np.linalg.qr(up.T)
    core = matrix_svd(first @ second.T)
    assert core.left is not None and core.right is not None
    return Svd(core.values, left @ core.left, core.right @ right.T)


def kron_svd(first: Svd, second: Svd) -> Svd:
    """Of the Kronecker product of two matrices, from theirs: the values are all products of two.

    Rows are (row of first, row of second), columns likewise. Values that are rounding are left out
    first: their vectors would take as much room as the product itself.
    """
    first, second = _without_noise(first), _without_noise(second)
    values = np.outer(first.values, second.values).ravel()
    order = np.argsort(-values, kind="stable")
    if first.left is None or second.left is None or first.right is None or second.right is None:
        return Svd(values[order])
    i, j = np.divmod(order, second.values.size)
    left = first.left[:, None, i] * second.left[None, :, j]
    right = first.right[i, :, None] * second.right[j, None, :]
    rows, columns = left.shape[0] * left.shape[1], right.shape[1] * right.shape[2]
    return Svd(values[order], left.reshape(rows, -1), right.reshape(-1, columns))


def _without_noise(svd: Svd) -> Svd:
    rank = svd.rank
    return Svd(
        svd.values[:rank],
        None if svd.left is None else svd.left[:, :rank],
        None if svd.right is None else svd.right[:rank],
    )
