"""Products of few positions with a LoHa on Hopper, in one launch:

    change = scale * (d1 @ u1) * (d2 @ u2), rounded
    y = x @ w + x @ change + add + bias,    dx = g @ (w and the change)^T + add

each one sum, rounded once. The change is made in tiles inside, from factors of at most 16 ranks,
and read by nobody else. See cuda_src/skinny_hadamard.cu.
"""

from __future__ import annotations

import functools
from math import prod

from .. import plan
from ..arrays import Array, bf16
from ..kernels import kernel
from ..tensor_map import ROW, matrix_map
from .conv_gpu import processors
from .extended_gpu import takes
from .skinny_gpu import MOST, Plan, Size, _choose, _launch

RANKS = (8, 16)
# (TILE_N, CLUSTER, EACH) of the variants, as in `skinny_gpu`. The fastest of eleven as measured
# (H100), each somewhere: 64 positions of 3072 -> 3072, one, 128, a wide result of a few steps.
VARIANTS = [(64, 4, 2), (128, 8, 2), (128, 4, 2), (128, 2, 1), (128, 1, 1)]
_ROWS = 16  # ranks of a box of a factor
# Cycles for 64 x 64 of w and of the change, estimated. Of the tensor cores: 10 products of 64 x 64
# x 16 of 32 cycles each. A block alone waits for d @ u, 2 of them and the way there and back, then
# its warps issue about 100 instructions to round the change, beside the 4 products with w, and then
# it waits for the 4 with the change.
_BUSY, _ALONE = 320, 440


class _Plan(Plan):
    """width2: the rank."""

    def seconds(self, moved: int) -> float:
        """Estimated, where x, w, what is added and the result are so many bytes."""
        _, columns, width, rank, *_ = self.numbers
        factors = 2 * (columns + width) * rank * bf16.itemsize
        return plan.skinny(moved + factors, self.copied, self.added)


class _Size(Size):
    def loads(self, variant) -> tuple[int, int]:
        """As Size, but `copied` is at least what could be copied while the tensor cores work, and
        blocks that do not run at once begin again."""
        (tile, cluster, each), (copied, added) = variant, super().loads(variant)
        turns = -(-prod(self.grid(variant)) // self.count)
        steps = turns * -(-self.steps // cluster)
        copied += steps * 2 * _ROWS * ROW * bf16.itemsize
        cycles = steps * (tile // 64) * (_BUSY if min(each, turns) > 1 else _ALONE)
        waves = -(-prod(self.grid(variant)) // (each * self.count))
        begins = (waves - 1) * plan.SOON
        return max(copied, int(cycles / plan.CLOCK * plan.BLOCK)) + int(begins * plan.BLOCK), added


def plan_hadamard_forward(x, w, rank: int, count: int) -> Plan | None:
    """The plan of y from the shapes of x (..., K) and w (1, K, N). count: multiprocessors."""
    return _plan(True, prod(x[:-1]), w[2], w[1], rank, count)


def plan_hadamard_dx(g, w, rank: int, count: int) -> Plan | None:
    """The plan of dx from the shapes of g (..., N) and w (1, K, N)."""
    return _plan(False, prod(g[:-1]), w[1], w[2], rank, count)


@functools.lru_cache(maxsize=4096)
def _plan(b_rows: bool, positions, columns, width, rank, count) -> Plan | None:
    if not 1 <= positions <= MOST or rank not in RANKS or columns % 8 or width % 8:
        return None
    numbers = positions, columns, width, rank, columns, 1
    size = _Size(numbers, -(-width // ROW), count)
    variant = _choose(size, VARIANTS)
    if variant is None:
        return None
    tile, cluster, each = variant
    defines = {"TILE_N": tile, "B_ROWS": int(b_rows), "CLUSTER": cluster, "EACH": each}
    launch = kernel("skinny_hadamard.cu", "skinny_hadamard", bf16, **defines)
    w_box = 1, ROW if b_rows else tile, ROW
    return _Plan(launch, *variant, size.grid(variant), w_box, numbers, *size.loads(variant))


def hadamard_plans(x, w, d1, u1, d2, u2, *more) -> tuple[Plan, Plan] | None:
    """The plans of y and dx of these arrays, where the kernel takes them. more: what is added, or
    None.
    """
    if w.ndim != 3 or x.shape[-1:] != w.shape[1:2] or d1.ndim != 3:
        return None
    (taps, inputs, outputs), rank = w.shape, d1.shape[2]
    if taps != 1 or not d1.shape == d2.shape == (1, inputs, rank):
        return None
    if not u1.shape == u2.shape == (1, rank, outputs) or not takes(x, w, d1, u1, d2, u2, *more):
        return None
    y = (*x.shape[:-1], outputs)
    forward = plan_hadamard_forward(tuple(x.shape), tuple(w.shape), rank, processors())
    dx = plan_hadamard_dx(y, tuple(w.shape), rank, processors())
    return None if forward is None or dx is None else (forward, dx)


def hadamard_forward(x, w, factors, planned: Plan, *, scale, add, bias, out=None) -> Array:
    """y as above, in the dtype of x. factors: (d1, u1, d2, u2). scale: (1,) f32, or None for 1.
    out: where it goes, a new array by default; may be add.
    """
    return _run(x, w, factors, planned, scale, add, bias, out)


def hadamard_dx(g, w, factors, planned: Plan, *, scale, add, out=None) -> Array:
    """dx as above, likewise."""
    return _run(g, w, factors, planned, scale, add, None, out)


def _run(x, w, factors, planned: Plan, scale, add, bias, out) -> Array:
    import cupy

    positions, columns, width, *_ = planned.numbers
    out = cupy.empty((*x.shape[:-1], columns), x.dtype) if out is None else out
    boxes = (1, ROW, _ROWS), (1, _ROWS, ROW)
    maps = [
        matrix_map(a.data.ptr, tuple(a.shape), box)
        for a, box in zip(factors, boxes * 2, strict=True)
    ]
    numbers = positions, columns, width
    _launch(planned, *planned.maps(x, w, width), *maps, scale, add, bias, out, *numbers)
    return out
