"""Products of a wide x with up to 16 columns on Hopper, from one read of x: y = scale * x @ w, the
prologue of an adapter, by cuda_src/thin_product.cu.

A result so narrow costs what reading x costs: the launch keeps as many bytes under way as it can.
"""

from __future__ import annotations

import functools
from math import prod
from typing import NamedTuple

from .. import plan
from ..arrays import Array, bf16
from ..kernels import Kernel, kernel
from ..tensor_map import ROW, matrix_map
from .conv_gpu import processors

THIN_ROWS = 2048  # up to which it beats the library; at 4608 rows 16.8 us to 16.2 (H100)
# As in thin_product.cu.
_ROWS, _STEPS, _STAGES, _THREADS, _WIDTH = 128, 64, 4, 160, 16
_SPLITS = (8, 4, 2, 1)  # the most blocks first, so that every multiprocessor has some
# Bytes a second of a block by itself: its stages every 0.9 us, somewhat more than a read of memory
# takes that nobody else waits for. Estimated.
_ALONE = _STAGES * _ROWS * _STEPS * 2 / 0.9e-6
_MEET = 1e-6  # seconds until the blocks of a cluster have added up. Estimated
_SHARED = _STAGES * 2 * _STEPS * (_ROWS + _WIDTH) + 1024  # and what the alignment may cost


class Plan(NamedTuple):
    """A launch but for its arrays."""

    launch: Kernel
    grid: tuple[int]
    seconds: float


def thin_product(x: Array, w: Array, *, scale: Array | None) -> Array:
    """scale * x @ w, rounded once.  x: (..., IN).  w: (1, IN, R).  scale: (1,) f32 or None.

    Only where `extended_gpu.takes` the arrays and there is a `plan_thin`.
    """
    import cupy

    rows, (inner, ranks) = prod(x.shape[:-1]), w.shape[1:]
    out = cupy.empty((*x.shape[:-1], ranks), bf16)
    planned = plan_thin(rows, inner, ranks, processors())
    assert planned is not None
    x_map = matrix_map(x.data.ptr, (rows, inner), (_ROWS, ROW))
    w_map = matrix_map(w.data.ptr, (inner, ranks), (_STEPS, _WIDTH))
    args = (x_map, w_map, scale, out, rows, inner, ranks)
    planned.launch(planned.grid, (_THREADS,), *args, shared=_SHARED)
    return out


@functools.lru_cache(maxsize=4096)
def plan_thin(rows: int, inner: int, ranks: int, count: int) -> Plan | None:
    """The plan for shapes; None for more than 16 columns. count: multiprocessors."""
    if ranks > _WIDTH:
        return None
    steps = -(-inner // _STEPS)
    splits = next(s for s in _SPLITS if s <= max(steps, 1))
    blocks = -(-rows // _ROWS) * splits
    begin = plan.LAUNCH + (_MEET if splits > 1 else 0)
    moved = 2 * inner * (rows + ranks) + 2 * rows * ranks
    # Too few blocks do not keep the memory busy, and none is done before its own part is read.
    together = moved / (plan.READ * min(1.0, blocks / count))
    own = -(-steps // splits) * _ROWS * _STEPS * 2 / _ALONE
    launch = kernel("thin_product.cu", "thin_product", bf16, SPLITS=splits)
    return Plan(launch, (blocks,), begin + max(together, own))
