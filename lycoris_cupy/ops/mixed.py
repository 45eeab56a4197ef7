"""mixed_product: blocks of channels through one narrow factor, and then mixed.

    z[..., l * R + r] = sum over m of w1[l, m] * inner[..., m * R + r],  inner = x * w

The first half of a LoKr whose w2 is a product. One launch for few positions on Hopper; else a
product and a mix. Yeh et al. 2023, arXiv 2309.14859.
"""

from __future__ import annotations

from math import prod

from .. import plan
from ..arrays import Array, bf16, require_axes, require_float, require_same
from ..errors import ShapeError
from ..kernels import kernel
from ..tape import Primitive, value_of
from ..tensor_map import ROW, matrix_map
from . import product_gpu, skinny_gpu
from .elementwise import cast
from .extended_gpu import takes
from .kron import _mix_blocks, _mix_blocks_dw1, mix_gradients
from .product import finished, in_space_of, out_shape, product_gradients, wide_product
from .window import Window


def mixed_product(x: Array, w: Array, w1: Array, window: Window) -> Array:
    """mix_blocks(x * w, w1), whose inner result is rounded too.

    x: (..., M * N), or (N, *space, M * N). w: (taps, N, R), shared by the M groups of the window.
    w1: (L, M) of the dtype of x. Returns (..., L * R) in the dtype of x. Raises ShapeError,
    DtypeError.
    """
    require_float(value_of(x), "x")
    require_axes(w1, 2, "w1", "(L, M)")
    w = cast(w, x.dtype)
    require_same("x", value_of(x), "w1", value_of(w1))
    out_shape(x.shape, w.shape, window)
    if w1.shape[1] != window.groups or not (window.shared or window.groups == 1):
        raise ShapeError(
            f"w1 has shape {tuple(w1.shape)}, expected a column for each of {window.groups} groups "
            "that share w"
        )
    return _mixed_product(x, w, w1, window=window)


def mixed_cpu(x, w, w1, *, window, keep):
    """(the result, inner if keep)."""
    inner = finished(wide_product(x, w, window), None, None, None, x)
    return _mix_blocks(inner, w1, turned=False), inner if keep else None


def mixed_gpu(x, w, w1, *, window, keep):
    """The same."""
    if _in_one_launch(x, w, w1, window):
        return _launch(x, w, w1, keep)
    inner = product_gpu.forward(x, w, window, scale=None, add=None, bias=None)
    return _mix_blocks(inner, w1, turned=False), inner if keep else None


def _in_one_launch(x, w, w1, window) -> bool:
    """Whether the kernel takes these, and is estimated to be the faster way."""
    n, positions = w.shape[1], prod(x.shape[:-1])
    if not window.pointwise or n % 8 or window.groups > ROW or positions > skinny_gpu.MOST:
        return False
    if not takes(x, w) or w1.dtype != bf16 or not w1.flags.c_contiguous:
        return False
    what = f"x {tuple(x.shape)} * w {tuple(w.shape)}, mixed by w1 {tuple(w1.shape)}"
    return plan.choose(what, *_ways(x, w, w1)) == "mixed"


def _ways(x, w, w1):
    """(seconds of each way, operations, bytes), pointwise, of arrays that Hopper's kernels take."""
    (_, n, columns), positions = w.shape, prod(x.shape[:-1])
    operations = 2 * positions * w1.shape[1] * n * columns
    results = positions * sum(w1.shape) * columns * 2
    moved = (x.size + w.size) * 2 + results
    ways = {
        "mixed": plan.skinny(moved, -(-n // ROW) * 2 * ROW * ROW * 2),
        "library": max(plan.library(operations), plan.moving(moved)) + plan.moving(results),
    }
    return ways, operations, moved


def seconds(x: Array, w: Array, w1: Array) -> float:
    """Estimated of mixed_product by itself, of the same."""
    return min(_ways(x, w, w1)[0].values())


def _launch(x, w, w1, keep):
    import cupy

    (rows, blocks), (_, n, columns), positions = w1.shape, w.shape, prod(x.shape[:-1])
    z = cupy.empty((*x.shape[:-1], rows * columns), x.dtype)
    inner = cupy.empty((*x.shape[:-1], blocks * columns), x.dtype) if keep else None
    maps = (
        matrix_map(a.data.ptr, shape, (ROW, ROW))
        for a, shape in ((x, (positions * blocks, n)), (w, (n, columns)))
    )
    grid = -(-positions // (ROW // blocks)), -(-columns // ROW)
    kernel("mixed.cu", "mixed", bf16)(
        grid, (skinny_gpu.THREADS,), *maps, w1, inner, z, positions, rows, blocks, n, columns,
        shared=skinny_gpu.SHARED,
    )  # fmt: skip
    return z, inner


def mixed_gradients(needs, g, x, w, w1, inner, window):
    """For x, w and w1, by that of the result; None for one that is not needed."""
    rows, columns = w1.shape
    if not any(needs[:2]):
        return None, None, _mix_blocks_dw1(g, inner, rows=rows, columns=columns)
    if needs[2]:
        flow, dw1 = mix_gradients(g, inner, w1)
    else:
        flow, dw1 = _mix_blocks(g, w1, turned=True), None
    own = (x if needs[1] else None), (w if needs[0] else None)
    return (*product_gradients(flow, *own, None, window, in_space_of(x, window)), dw1)


def _vjp(needs, out, x, w, w1, *, window, kept):
    return lambda g: mixed_gradients(needs, g, x, w, w1, kept, window)


_mixed_product = Primitive("mixed_product", mixed_cpu, mixed_gpu, _vjp, keeps=True)
