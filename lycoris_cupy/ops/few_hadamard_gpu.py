"""The gradients of all four factors of a LoHa on a linear layer of few positions, from one launch
on Hopper.

    y = x * w,  w = scale * (d1 @ u1) * (d2 @ u2)

Neither w's gradient nor a product of factors is made: see cuda_src/few_hadamard.cu.
"""

from __future__ import annotations

import functools
from math import prod
from typing import NamedTuple

from ..arrays import Array, bf16, f32
from ..kernels import Kernel, kernel
from .counters import counters
from .extended_gpu import takes
from .skinny_gpu import MOST

_RANKS = (8, 16)
# As in few_hadamard.cu: positions and ranks whose h is made together; blocks of a cluster, and
# warps of a block; channels of a step; columns of a block.
_ROWS, _QUAD, _CLUSTER, _STEP, _TILE = 32, 4, 8, 16, 48
_THREADS = 32 * _CLUSTER
_STEP_BYTES = (_ROWS + 2 * _RANKS[-1]) * _STEP * bf16.itemsize
_SENT = _ROWS * _QUAD * _RANKS[-1] * f32.itemsize  # sums of a block
_SHARED = _CLUSTER * 4 * _STEP_BYTES + _SENT  # four steps of each warp, and what the block is sent


class Plan(NamedTuple):
    """A launch but for its arrays. numbers: positions, channels, columns, rank."""

    launch: Kernel
    grid: tuple[int]
    sums: tuple[int, ...]  # shape of h
    numbers: tuple[int, int, int, int]


@functools.lru_cache(maxsize=4096)
def plan_few_hadamard(positions: int, channels: int, columns: int, rank: int) -> Plan | None:
    """The plan for shapes; None where the kernel does not take them."""
    if rank not in _RANKS or not 1 <= positions <= MOST or channels % 8 or columns % 8:
        return None
    if not 0 < min(channels, columns) or max(channels, columns) * MOST >= 2**31:
        return None
    groups, tiles = -(-positions // _ROWS), -(-channels // _TILE) + -(-columns // _TILE)
    first = 2 * groups * (rank // _QUAD) * _CLUSTER  # of two sides
    second = -(-tiles // _CLUSTER) * _CLUSTER
    launch = kernel("few_hadamard.cu", "few_hadamard", bf16)
    sums = 2, -(-groups // 2), rank, 2 * _ROWS, _RANKS[-1]
    return Plan(launch, (first + second,), sums, (positions, channels, columns, rank))


def few_hadamard_plan(x, g, d1, u1, d2, u2) -> Plan | None:
    """`plan_few_hadamard` of these arrays, where the kernel takes them. x: (..., K). g: (..., N).
    d1, d2: (1, K, R). u1, u2: (1, R, N).
    """
    if not takes(x, g, d1, u1, d2, u2):
        return None
    channels, columns, rank = x.shape[-1], g.shape[-1], d1.shape[-1]
    down, up = (1, channels, rank), (1, rank, columns)
    if x.shape[:-1] != g.shape[:-1] or not tuple(d1.shape) == tuple(d2.shape) == down:
        return None
    if not tuple(u1.shape) == tuple(u2.shape) == up:
        return None
    return plan_few_hadamard(prod(x.shape[:-1]), channels, columns, rank)


def few_hadamard_gradients(
    x, g, factors, planned: Plan, *, scale
) -> tuple[Array, Array, Array, Array]:
    """(dd1, du1, dd2, du2), f32, of the shapes of the factors (d1, u1, d2, u2):

    with D = scale * x^T @ g, G1 = D * (d2 @ u2), G2 = D * (d1 @ u1):
    dd1 = G1 @ u1^T, du1 = d1^T @ G1, dd2 = G2 @ u2^T, du2 = d2^T @ G2

    g: the gradient of y. scale: (1,) f32, or None for 1. Only where `few_hadamard_plan` says so.
    """
    import cupy

    out = tuple(cupy.empty(f.shape, f32) for f in factors)
    sums = cupy.empty(planned.sums, bf16)
    args = (x, g, *factors, scale, sums, counters(), *out, *planned.numbers)
    planned.launch(planned.grid, (_THREADS,), *args, shared=_SHARED)
    return out
