"""Dense products of row-major CuPy arrays by cuBLASLt, usable inside a CUDA graph capture.

CuPy refuses its own cuBLAS during capture, and `cupy.matmul` costs 35 us of host time; a repeated
call here costs a few. Sums are in the wide dtype (f32 without TF32; f64 for f64), split sums too,
so a result is rounded once. Descriptors and the chosen algorithm are kept by shapes, strides,
dtypes and alignments. Refused: dtypes other than bf16, f32 and f64, a last axis that is not
contiguous, shapes that do not match, a bias of another dtype than the result (cuBLASLt has no such
epilogue).
"""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass, field

import numpy as np

from .arrays import Array, bf16, f32, f64, wide_dtype
from .errors import DtypeError, KernelError, ShapeError

_WORKSPACE = 32 * 2**20  # bytes; what cuBLAS itself takes on Hopper
_ALIGNMENT = 256  # bytes; CuPy allocates with 512, cuBLASLt looks at no more than this
_PLANS = 4096
_CUDA = {bf16: 14, f32: 0, f64: 1}  # cudaDataType_t: R_16BF, R_32F, R_64F


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
    zero, one = _constants(key[0], plan.wide)
    stream = cupy.cuda.get_current_stream().ptr
    to = c.data.ptr
    if bias is not None:
        plan.bias[0] = bias.data.ptr
        _lt().matmul_desc_set_attribute(plan.product, plan.bias_attribute, plan.bias.ctypes.data, 8)
    _lt().matmul(
        plan.handle, plan.product,
        one if scale is None else scale.data.ptr,
        b.data.ptr, plan.b, a.data.ptr, plan.a,  # row-major c = a @ b is column-major c = b @ a
        zero if add is None else one,
        to if add is None else add.data.ptr, plan.add, to, plan.out,
        plan.algorithm, _workspace(key[0], stream), _WORKSPACE, stream,
    )  # fmt: skip
    return c


def prepare() -> None:
    """Make what a product on the current device and stream needs, so that a capture on this stream
    allocates nothing.
    """
    import cupy

    device = cupy.cuda.runtime.getDevice()
    _handle(device)
    for wide in (f32, f64):
        _constants(device, wide)
    _workspace(device, cupy.cuda.get_current_stream().ptr)


# -- plans -----------------------------------------------------------------------------------------


@dataclass
class _Plan:
    shape: tuple[int, ...]
    dtype: np.dtype
    wide: np.dtype
    k: int
    handle: int = 0
    product: int = 0  # the matmul descriptor; a, b, add, out: matrix layouts
    a: int = 0
    b: int = 0
    add: int = 0
    out: int = 0
    algorithm: int = 0  # an address inside `chosen`
    chosen: np.ndarray = field(default_factory=lambda: np.zeros(0))
    bias: np.ndarray = field(default_factory=lambda: np.zeros(1, np.uint64))  # its address
    bias_attribute: int = 0

    def destroy(self) -> None:
        if self.handle:
            _lt().matmul_desc_destroy(self.product)
            for layout in (self.a, self.b, self.add, self.out):
                _lt().matrix_layout_destroy(layout)


_plans: dict[tuple, _Plan] = {}


def _remember(key, plan: _Plan) -> _Plan:
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


def _plan(device, transpose_a, transpose_b, dtype, a, b, add, out, scale, bias) -> _Plan:
    bias = bias and bias[0]
    if a[0] not in _CUDA:
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
    plan = _Plan(shape, result, wide, k)
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
        _describe(plan, device, transpose_a, transpose_b, layouts, batch, bias)
    except _lt().cuBLASLtError as error:
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


def _describe(plan: _Plan, device, transpose_a, transpose_b, layouts, batch, bias) -> None:
    lt = _lt()
    plan.handle = _handle(device)
    compute, scale_type = (
        (70, 1) if plan.wide == f64 else (68, 0)
    )  # COMPUTE_64F, COMPUTE_32F (no TF32); the dtype of scale
    plan.product = lt.matmul_desc_create(compute, scale_type)
    desc = lt.MatmulDescAttribute

    def describe(attribute, value):
        _set(
            lt.matmul_desc_set_attribute,
            plan.product,
            attribute,
            value,
            lt.get_matmul_desc_attribute_dtype(attribute),
        )

    # In column-major terms the first operand is b, the second a; a row-major transpose stays one.
    describe(desc.TRANSA, int(transpose_b))
    describe(desc.TRANSB, int(transpose_a))
    describe(desc.POINTER_MODE, int(lt.PointerMode.DEVICE))
    if bias is not None:
        plan.bias_attribute = int(desc.BIAS_POINTER)
    for name, layout in layouts.items():
        setattr(plan, name, _matrix(layout, name, batch))

    preference = lt.matmul_preference_create()
    try:
        choose = lt.MatmulPreferenceAttribute

        def prefer(attribute, value):
            dtype = lt.get_matmul_preference_attribute_dtype(attribute)
            _set(lt.matmul_preference_set_attribute, preference, attribute, value, dtype)

        prefer(choose.MAX_WORKSPACE_BYTES, _WORKSPACE)
        prefer(
            choose.REDUCTION_SCHEME_MASK, 2
        )  # COMPUTE_TYPE: partial sums are never rounded to bf16
        prefer(choose.MIN_ALIGNMENT_A_BYTES, layouts["b"][3])
        prefer(choose.MIN_ALIGNMENT_B_BYTES, layouts["a"][3])
        prefer(choose.MIN_ALIGNMENT_C_BYTES, layouts["add"][3])
        prefer(choose.MIN_ALIGNMENT_D_BYTES, layouts["out"][3])
        _choose(plan, preference)
        if bias is not None:
            # Not an address yet, but as aligned as those that will come.
            describe(desc.BIAS_POINTER, bias[3])
            describe(desc.EPILOGUE, int(lt.Epilogue.BIAS))
            describe(desc.BIAS_DATA_TYPE, _CUDA[bias[0]])
            # The algorithm of the product without a bias is kept where it can add one: those that
            # the heuristic names for both together are slower (640 -> 640, 16384 rows, H200: 47 us
            # with a bias, 30 us without).
            if not _takes(plan):
                _choose(plan, preference)
    finally:
        lt.matmul_preference_destroy(preference)
    plan.algorithm = plan.chosen.ctypes.data  # `algo` is the first field of the result


def _choose(plan: _Plan, preference: int) -> None:
    """Put the heuristic's first algorithm into the plan."""
    lt = _lt()
    plan.chosen = np.zeros(1, lt.matmul_heuristic_result_dtype)
    count = np.zeros(1, np.int32)
    lt.matmul_algo_get_heuristic(
        plan.handle, plan.product, plan.b, plan.a, plan.add, plan.out,
        preference, 1, plan.chosen.ctypes.data, count.ctypes.data,
    )  # fmt: skip
    if count[0] == 0:
        raise KernelError(
            f"cuBLASLt knows no algorithm for a product to {plan.shape} of {plan.dtype}"
        )


def _takes(plan: _Plan) -> bool:
    """Whether the plan's algorithm also does the product as it is described now, within the
    workspace.
    """
    lt = _lt()
    result = np.zeros(1, lt.matmul_heuristic_result_dtype)
    try:
        lt.matmul_algo_check(
            plan.handle, plan.product, plan.b, plan.a, plan.add, plan.out,
            plan.chosen.ctypes.data, result.ctypes.data,
        )  # fmt: skip
    except lt.cuBLASLtError:
        return False
    return int(result["workspace_size"][0]) <= _WORKSPACE


def _matrix(layout, name: str, batch: int) -> int:
    dtype, shape, strides, _ = layout
    size = dtype.itemsize
    rows, columns = shape[-2:]
    row = strides[-2] // size if rows > 1 else columns  # a single row has no stride to speak of
    if (columns > 1 and strides[-1] != size) or row < columns or strides[-2] % size:
        raise ShapeError(
            f"{name} of shape {shape} and strides {strides} bytes: the last axis must be "
            "contiguous and rows must not overlap; "
            "use transpose_a, transpose_b or a copy"
        )
    lt = _lt()
    out = lt.matrix_layout_create(_CUDA[dtype], columns, rows, row)
    if batch > 1:
        step = strides[0] // size if len(shape) == 3 and shape[0] > 1 else 0
        attribute = lt.MatrixLayoutAttribute
        for what, value in ((attribute.BATCH_COUNT, batch), (attribute.STRIDED_BATCH_OFFSET, step)):
            _set(
                lt.matrix_layout_set_attribute,
                out,
                what,
                value,
                lt.get_matrix_layout_attribute_dtype(what),
            )
    return out


def _set(setter, descriptor, attribute, value, dtype) -> None:
    buffer = np.array([value], dtype)
    setter(descriptor, int(attribute), buffer.ctypes.data, buffer.nbytes)


def _without_product(out: Array, add, bias) -> Array:
    if out.size:  # K is 0
        wide = wide_dtype(out.dtype)
        total = out.dtype.type(0) if add is None else add.astype(wide)
        if bias is not None:
            total = total + bias.astype(wide) if add is not None else bias
        out[...] = total.astype(out.dtype) if hasattr(total, "astype") else total
    return out


# -- what lives as long as the process -------------------------------------------------------------


@functools.cache
def _lt():
    try:
        from nvmath.bindings import cublasLt
    except ImportError as error:
        raise KernelError(
            f"dense products need nvmath-python, which cannot be imported ({error}): "
            'pip install "lycoris_cupy[cuda12]"'
        ) from error
    return cublasLt


@functools.cache
def _handle(device: int) -> int:
    try:
        return _lt().create()
    except KernelError:
        raise
    except Exception as error:  # the library is not there, or does not fit the driver
        raise KernelError(
            f'cuBLASLt cannot be loaded ({error}): pip install "lycoris_cupy[cuda12]" brings it'
        ) from error


@functools.cache
def _constants_array(device: int, dtype: np.dtype):
    import cupy

    return cupy.arange(2, dtype=dtype)


@functools.cache
def _constants(device: int, dtype: np.dtype) -> tuple[int, int]:
    """The addresses of 0 and of 1 on the device."""
    start = _constants_array(device, dtype).data.ptr
    return start, start + dtype.itemsize


_workspaces: dict[tuple[int, int], Array] = {}


def _workspace(device: int, stream: int) -> int:
    # One a stream: products on one stream follow each other, products on two may overlap.
    kept = _workspaces.get((device, stream))
    if kept is None:
        import cupy

        kept = _workspaces[device, stream] = cupy.cuda.alloc(_WORKSPACE)
    return kept.ptr
