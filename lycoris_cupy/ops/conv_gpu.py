"""The GPU launches of convolution: conv, conv_dx, conv_dw of cuda_src/conv.cu, up to three axes;
the first two also with a second sum in the same accumulators.

A plan (kernel, grid, numbers) is made once for a shape and cached; a launch allocates, passes the
arguments and returns.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from ..arrays import Array, wide_dtype
from . import conv_extended_plan
from .conv_extended_plan import term_of
from .conv_plan import dw_shape, plan_conv, plan_dw, plan_dx
from .window import Window

if TYPE_CHECKING:
    from .extended_gpu import Extra


def conv(x, w, window: Window, *, scale=None, add=None, bias=None, out=None) -> Array:
    """scale * the sum over taps and channels of x at each output position times w, + add + bias.

    x: (N, *space, groups * I).  w: (taps, I, groups * O), or (taps, I, O) if window.shared.  scale:
    (1,) wide, or None. add: like the result.  bias: (groups * O,).  out: where the result goes,
    a new array by default; may be add.  Returns (N, *out_space, groups * O) in the dtype of x,
    rounded once. All arrays C-contiguous. Cross-correlation, as in every framework.
    """
    plan = plan_conv(x.dtype, x.shape, w.shape, window, _aligned(x), _aligned(w), processors())
    return _run(plan, out, (x, w, scale, add, bias))


def conv_dx(
    dy, w, window: Window, in_space: tuple[int, ...], *, scale=None, add=None, out=None
) -> Array:
    """The gradient of conv's x: scale * the sum over taps and columns of dy at the positions that
    read p, times w, + add.

    dy: (N, *out_space, groups * O).  w as in conv.  add: like the result.  out: as in conv.
    Returns (N, *in_space, groups * I) in the dtype of dy, rounded once.
    """
    shapes = (dy.dtype, dy.shape, w.shape, window, tuple(in_space))
    plan = plan_dx(*shapes, _aligned(dy), _aligned(w), processors())
    return _run(plan, out, (dy, w, scale, add))


def conv_extended(x, w, window: Window, extra: Extra, *, add=None, bias=None, out=None) -> Array:
    """conv of bf16 plus extra in one accumulator, rounded once: see `joins` of conv_extended_plan.

    extra.x: (N, *space, blocks * C), or (N, *out_space, blocks * C) where its window is pointwise.
    """
    plan = conv_extended_plan.plan_forward(
        x.shape, w.shape, window, term_of(extra.w.shape, extra.window),
        _aligned(x, extra.x), _aligned(w, extra.w), processors(),
    )  # fmt: skip
    return _run(plan, out, (x, w, extra.x, extra.w, extra.scale, add, bias, extra.bias))


def conv_extended_dx(dy, w, window: Window, in_space, extra: Extra, *, add=None, out=None) -> Array:
    """conv_dx of bf16 plus the gradient of another conv's x. As above; extra.x: (N, *out_space,
    columns), or (N, *in_space, columns) where its window is pointwise.
    """
    plan = conv_extended_plan.plan_dx(
        dy.shape, w.shape, window, tuple(in_space), term_of(extra.w.shape, extra.window, True),
        _aligned(dy, extra.x), _aligned(w, extra.w), processors(),
    )  # fmt: skip
    return _run(plan, out, (dy, w, extra.x, extra.w, extra.scale, add))


def _run(plan, out, arrays) -> Array:
    import cupy

    out = cupy.empty(plan.shape, arrays[0].dtype) if out is None else out
    if out.size:
        terms = (plan.other,) if isinstance(plan, conv_extended_plan.ExtendedPlan) else ()
        args = (*arrays, out, plan.geometry, *terms, *plan.numbers)
        plan.launch(plan.grid, plan.block, *args, shared=plan.shared)
    return out


def conv_dw(x, dy, window: Window, *, scale=None) -> Array:
    """The gradient of conv's w: scale * the sum over positions of x at each tap times dy; over
    groups too if shared.

    x: (N, *space, groups * I).  dy: (N, *out_space, groups * O).  Returns (taps, I, groups * O), or
    (taps, I, O) if window.shared, in the wide dtype. Always summed in the same order.
    """
    import cupy

    dtype = wide_dtype(x.dtype)
    if 0 in x.shape or 0 in dy.shape:
        return cupy.zeros(dw_shape(x.shape, dy.shape, window), dtype)
    plan = plan_dw(x.dtype, x.shape, dy.shape, window, _aligned(x), _aligned(dy), processors())
    dw = cupy.empty(plan.shape, dtype)
    if not plan.sum:
        plan.launch(
            plan.grid,
            plan.block,
            x,
            dy,
            scale,
            dw,
            plan.geometry,
            *plan.numbers,
            shared=plan.shared,
        )
        return dw
    partials = cupy.empty((plan.splits, plan.size), dtype)
    first = (x, dy, partials) if plan.launch.op == "conv_narrow_dw" else (x, dy, None, partials)
    plan.launch(plan.grid, plan.block, *first, plan.geometry, *plan.numbers, shared=plan.shared)
    total, grid, block, numbers = plan.sum
    total(grid, block, partials, scale, dw, *numbers)
    return dw


def _aligned(*arrays: Array) -> bool:
    return all(array.data.ptr % 16 == 0 for array in arrays)


def processors() -> int:
    """Multiprocessors of the current device."""
    import cupy

    return _processor_count(cupy.cuda.runtime.getDevice())


@functools.cache
def _processor_count(device: int) -> int:
    import cupy

    return cupy.cuda.runtime.deviceGetAttribute(16, device)  # cudaDevAttrMultiProcessorCount
