"""Tucker-2 decomposition of a convolution weight by HOSVD: the best subspaces of its inputs and
outputs.

De Lathauwer et al. 2000, "A multilinear singular value decomposition". An offline tool: it computes
on the CPU in f64.
"""

from __future__ import annotations

import numpy as np

from ..arrays import Array, on_gpu, require_axes, require_float, to_device
from ..errors import ShapeError


def tucker_decompose(weight: Array, in_rank: int, out_rank: int) -> tuple[Array, Array, Array]:
    """(down, mid, up) with weight[t] ~ down @ mid[t] @ up, down and up orthonormal.

    weight: (taps, IN, OUT). down: (IN, in_rank), mid: (taps, in_rank, out_rank), up: (out_rank,
    OUT), in the dtype and on the device of weight. Exact when the ranks reach those of the two
    unfoldings; else the squared error is at most the sum of the squared singular values that both
    sides leave out, within a factor 2 of the best. Raises ShapeError.
    """
    require_axes(weight, 3, "weight", "(taps, IN, OUT)")
    require_float(weight, "weight")
    _, inputs, outputs = weight.shape
    if not (1 <= in_rank <= inputs and 1 <= out_rank <= outputs):
        raise ShapeError(f"ranks ({in_rank}, {out_rank}) must lie in 1 to ({inputs}, {outputs})")
    w = to_device(weight, "cpu").astype(np.float64)
    down = _leading(np.einsum("tio,tjo->ij", w, w, optimize=True), in_rank)
    up = _leading(np.einsum("tio,tip->op", w, w, optimize=True), out_rank).T
    mid = down.T @ w @ up.T
    device = f"cuda:{weight.device.id}" if on_gpu(weight) else "cpu"
    down, mid, up = (to_device(f.astype(weight.dtype), device) for f in (down, mid, up))
    return down, mid, up


def _leading(gram: np.ndarray, rank: int) -> np.ndarray:
    """The eigenvectors of the largest eigenvalues, as columns: the unfolding's left singular
    vectors.
    """
    _, vectors = np.linalg.eigh(gram)
    return vectors[:, ::-1][:, :rank]
