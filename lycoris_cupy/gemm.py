"""Dense products of row-major CuPy arrays by cuBLASLt, usable inside a CUDA graph capture.

CuPy refuses its own cuBLAS during capture, and `cupy.matmul` costs 35 us of host time; a repeated
call here costs a few. Sums are in the wide dtype (f32 without TF32; f64 for f64), split sums too,
so a result is rounded once. Descriptors and the chosen algorithm are kept by shapes, strides,
dtypes and alignments. Refused: dtypes other than bf16, f32 and f64, a last axis that is not
contiguous, shapes that do not match, a bias of another dtype than the result (cuBLASLt has no such
epilogue).
"""

from __future__ import annotations

import threading

import numpy as np

from .arrays import Array, wide_dtype
from .cublaslt import CUDA_TYPES, WORKSPACE, Plan, constants, describe, library, workspace
from .errors import DtypeError, KernelError, ShapeError

_ALIGNMENT = 256  # bytes; CuPy allocates with 512, cuBLASLt looks at no more than this
_PLANS = 4096


def gemm(
    a: Array,
    b: Array,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    scale: Array | None = None,
    add: Array | None = None,
    bias: Array | None = None,
    dtype=None,
    out: Array | None = None,
) -> Array:
    """scale * op(a) @ op(b) + add + bias, op(m) = m or its transpose; each batch for itself.

    op(a): (M, K) or (batch, M, K).  op(b): (K, N) or (batch, K, N).  A missing batch axis or a
    batch of 1 serves all. scale: one element of the wide dtype, read on the device; None is 1.
    add: like the result; not changed unless it is `out`. bias: (N,) in the result's dtype.  Returns
    (M, N) or (batch, M, N) in `dtype`, a's (default) or the wide one, written into the view `out`
    if there is one. Rows and batches may lie any stride apart; the last axis is contiguous.
    """
    import cupy

    key = (
        cupy.cuda.runtime.getDevice(), transpose_a, transpose_b, dtype,
        _layout(a), _layout(b), _layout(add), _layout(out),
        None if scale is None else (scale.dtype, scale.size),
        # A bias pointer is part of its descriptor, so threads do not share one.
        None if bias is None else (_layout(bias), threading.get_ident()),
    )  # fmt: skip
    plan = _plans.get(key)
    if plan is None:
        plan = _remember(key, _plan(*key))
    c: Array = cupy.empty(plan.shape, plan.dtype) if out is None else out
    if plan.k == 0 or 0 in plan.shape:
        return _without_product(c, add, bias)
    zero, one = constants(key[0], plan.wide)
    stream = cupy.cuda.get_current_stream().ptr
    to = c.data.ptr
    if bias is not None:
        plan.bias[0] = bias.data.ptr
        at = plan.bias.ctypes.data
        library().matmul_desc_set_attribute(plan.product, plan.bias_attribute, at, 8)
    # In place cuBLASLt asks for one layout, not for two that are equal.
    in_place = add is not None and add.data.ptr == to
    library().matmul(
        plan.handle, plan.product,
        one if scale is None else scale.data.ptr,
        b.data.ptr, plan.b, a.data.ptr, plan.a,  # row-major c = a @ b is column-major c = b @ a
        zero if add is None else one,
        to if add is None else add.data.ptr, plan.out if in_place else plan.add, to, plan.out,
        plan.algorithm, workspace(key[0], stream), WORKSPACE, stream,
    )  # fmt: skip
    return c


_plans: dict[tuple, Plan] = {}


def _remember(key, plan: Plan) -> Plan:
    if len(_plans) >= _PLANS:  # shapes that change all the time: start over rather than grow
        for old in list(_plans):
            _plans.pop(old).destroy()
    _plans[key] = plan
    return plan


def _layout(x: Array | None):
    if x is None:
        return None
    pointer = x.data.ptr
    return x.dtype, x.shape, x.strides, min(_ALIGNMENT, pointer & -pointer) or _ALIGNMENT


def _plan(device, transpose_a, transpose_b, dtype, a, b, add, out, scale, bias) -> Plan:
    bias = bias and bias[0]
    if a[0] not in CUDA_TYPES:
        raise DtypeError(f"a has dtype {a[0]}, expected bf16, f32 or f64")
    if b[0] != a[0]:
        raise DtypeError(f"a is {a[0]} but b is {b[0]}: cast one of them")
    wide = wide_dtype(a[0])
    result = np.dtype(a[0] if dtype is None and out is None else out[0] if dtype is None else dtype)
    if result not in (a[0], wide):
        raise DtypeError(
            f"the result is asked for in {result}, expected {a[0]} or, in the wide dtype, {wide}"
        )
    rows, columns, shape, k = _shapes(a[1], b[1], transpose_a, transpose_b)
    batch = shape[0] if len(shape) == 3 else 1
    for name, given in (("add", add), ("out", out)):
        if given is not None and given[1] != shape:
            raise ShapeError(f"{name} has shape {given[1]}, expected {shape}")
        if given is not None and given[0] != result:
            raise DtypeError(f"{name} is {given[0]}, expected {result} like the result")
    if scale is not None and scale != (wide, 1):
        raise DtypeError(f"scale is {scale[1]} element(s) of {scale[0]}, expected one of {wide}")
    if bias is not None and (
        bias[1] != (columns,) or bias[0] != result or bias[2] != (result.itemsize,)
    ):
        raise DtypeError(
            f"bias is {bias[0]} of shape {bias[1]}, expected {result} of shape "
            f"{(columns,)}, contiguous: cuBLASLt adds only a "
            "bias of the result's dtype; add it apart"
        )
    plan = Plan(shape, result, wide, k)
    if k == 0 or 0 in shape:
        return plan
    itemsize = result.itemsize
    dense = (
        result,
        shape,
        (rows * columns * itemsize, columns * itemsize, itemsize)[-len(shape) :],
        _ALIGNMENT,
    )
    layouts = {"a": a, "b": b, "add": add or out or dense, "out": out or dense}
    try:
        describe(plan, device, transpose_a, transpose_b, layouts, batch, bias)
    except library().cuBLASLtError as error:
        raise KernelError(
            f"cuBLASLt has no product for a {a[1]} {a[2]}, b {b[1]} {b[2]} of {a[0]}, transposed "
            f"{transpose_a, transpose_b}, to {shape} of {result}"
            f"{' with a bias' * (bias is not None)}: {error}"
        ) from error
    return plan


def _shapes(a, b, transpose_a, transpose_b):
    """(M, N, shape of the result, K)."""
    if len(a) not in (2, 3) or len(b) not in (2, 3):
        raise ShapeError(f"a has shape {a} and b {b}, expected 2 axes, or 3 with a batch in front")
    rows, k = a[-2:][::-1] if transpose_a else a[-2:]
    inner, columns = b[-2:][::-1] if transpose_b else b[-2:]
    if k != inner:
        raise ShapeError(
            f"a {a}{' transposed' * transpose_a} has {k} columns, "
            f"b {b}{' transposed' * transpose_b} has {inner} rows"
        )
    batches = {x[0] for x in (a, b) if len(x) == 3}
    if len(batches - {1}) > 1:
        raise ShapeError(f"a {a} and b {b} have different batches")
    batch = (max(batches - {1}, default=1) if 0 not in batches else 0,) if batches else ()
    return rows, columns, (*batch, rows, columns), k


def _without_product(out: Array, add, bias) -> Array:
    if out.size:  # K is 0
        wide = wide_dtype(out.dtype)
        total = out.dtype.type(0) if add is None else add.astype(wide)
        if bias is not None:
            total = total + bias.astype(wide) if add is not None else bias
        out[...] = total.astype(out.dtype) if hasattr(total, "astype") else total
    return out
