"""The x2 of a LoKr with a factored w2 inside a product of few positions, on Hopper:

    x2[p, l * R + r] = sum over m of w1[l, m] * inner[p, m * R + r]
    inner[p, m * R + r] = sum over n of x[p, m * N + n] * down[n, r]

down as 16 more columns of w, as in `skinny_gpu` for a LoRA, but each block of a cluster has whole
blocks of x: inner is then complete in its registers, rounded there, and mixed. Blocks of a cluster
that do not divide those of x wait for the one that has the most; the estimate knows. See
cuda_src/skinny.cu.
"""

from __future__ import annotations

import functools

from ..arrays import Array, bf16
from ..tensor_map import ROW, matrix_map
from .conv_gpu import processors
from .extended_gpu import Extra, takes
from .extended_plan import Second
from .skinny_gpu import LOW_RANK, MOST_MIXED, RANKS, Plan, Size, inside, plan_forward
from .window import Window

VARIANTS = LOW_RANK
_WIDEST = 512  # channels of a block of x: down stays in shared memory


def plan_mixed_down(x, w, window: Window, down, w1, extra: Second, count: int) -> Plan | None:
    """The plan of x * w + (x * down, mixed by w1) * up, from shapes. down: (1, N, R), for M blocks
    of x. w1: (L, M), for L blocks of up.
    """
    apart = plan_forward(x, w, window, extra, count)
    (rows, blocks), (taps, n, ranks) = w1, down
    if apart is None or extra.window.groups != rows or ranks not in (8, RANKS) or n % 8:
        return None
    if n > _WIDEST:
        return None
    if (taps, blocks * n, ranks) != (1, w[1], extra.shape[1]) or not 1 < blocks <= MOST_MIXED:
        return None
    return _plan_mixed_down((*apart.numbers[:5], blocks), count)


@functools.lru_cache(maxsize=4096)
def _plan_mixed_down(numbers, count: int) -> Plan | None:
    _, _, width, _, _, blocks = numbers
    size = Size(numbers, blocks, count, -(-width // blocks // ROW))  # a step is a block of x
    return size.planned(VARIANTS, True, RANKS=RANKS)


def mixed_down_plan(x, w, window: Window, down, w1, up, other: Window, *more) -> Plan | None:
    """`plan_mixed_down` of these arrays, up shared by the groups of `other`, where the kernel takes
    them. more: what is added, or None.
    """
    if not other.shared or w1.dtype != bf16 or not w1.flags.c_contiguous:
        return None
    if not takes(x, w, down, up, *more):
        return None
    shapes = tuple(x.shape), tuple(w.shape), window, tuple(down.shape), tuple(w1.shape)
    return plan_mixed_down(*shapes, Second(tuple(up.shape), other), processors())


def skinny_mixed_down(
    x, w, down, w1, planned: Plan, extra: Extra, *, add, bias, keep, out=None
) -> tuple[Array, tuple[Array, Array] | None]:
    """(add + x * w + bias + extra, (x2, inner) if keep), where extra's x is x2, the mix of inner =
    x * down by w1; of inner (..., M * R) and x2 (..., L * R) as in `mixed_product`.
    """
    import cupy

    positions, columns, width, ranks, _, blocks = planned.numbers
    n = width // blocks
    maps = (
        matrix_map(x.data.ptr, (positions, blocks, n), (ROW, 1, ROW)),
        matrix_map(w.data.ptr, (blocks, n, columns), planned.w_box),
        *planned.low_rank_maps(down, extra.w),
    )
    inner = cupy.empty((*x.shape[:-1], blocks * ranks), x.dtype) if keep else None
    out, x2 = inside(x, maps, w1, planned, extra, add, bias, keep, out, inner)
    return out, None if x2 is None or inner is None else (x2, inner)
