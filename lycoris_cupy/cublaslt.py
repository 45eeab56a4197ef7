"""cuBLASLt's side of a product: descriptors, layouts, the algorithm, and what lives with them.

Through `nvmath.bindings`, on addresses; `gemm` checks what comes in and keeps the plans. cuBLASLt
is column-major: its first operand is our b, its second our a.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np

from .arrays import Array, bf16, f32, f64
from .errors import KernelError, ShapeError

WORKSPACE = 32 * 2**20  # bytes; what cuBLAS itself takes on Hopper
CUDA_TYPES = {bf16: 14, f32: 0, f64: 1}  # cudaDataType_t: R_16BF, R_32F, R_64F


@dataclass
class Plan:
    """A product but for its addresses."""

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
            library().matmul_desc_destroy(self.product)
            for layout in (self.a, self.b, self.add, self.out):
                library().matrix_layout_destroy(layout)


def describe(plan: Plan, device, transpose_a, transpose_b, layouts, batch, bias) -> None:
    """Fill the plan: descriptor, layouts of a, b, add and out, and the algorithm for them."""
    lt = library()
    plan.handle = _handle(device)
    compute, scale_type = (
        (70, 1) if plan.wide == f64 else (68, 0)
    )  # COMPUTE_64F, COMPUTE_32F (no TF32); the dtype of scale
    plan.product = lt.matmul_desc_create(compute, scale_type)
    desc = lt.MatmulDescAttribute

    def put(attribute, value):
        _set(
            lt.matmul_desc_set_attribute,
            plan.product,
            attribute,
            value,
            lt.get_matmul_desc_attribute_dtype(attribute),
        )

    # In column-major terms the first operand is b, the second a; a row-major transpose stays one.
    put(desc.TRANSA, int(transpose_b))
    put(desc.TRANSB, int(transpose_a))
    put(desc.POINTER_MODE, int(lt.PointerMode.DEVICE))
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

        prefer(choose.MAX_WORKSPACE_BYTES, WORKSPACE)
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
            put(desc.BIAS_POINTER, bias[3])
            put(desc.EPILOGUE, int(lt.Epilogue.BIAS))
            put(desc.BIAS_DATA_TYPE, CUDA_TYPES[bias[0]])
            # The algorithm of the product without a bias is kept where it can add one: those that
            # the heuristic names for both together are slower (640 -> 640, 16384 rows, H200: 47 us
            # with a bias, 30 us without).
            if not _takes(plan):
                _choose(plan, preference)
    finally:
        lt.matmul_preference_destroy(preference)
    plan.algorithm = plan.chosen.ctypes.data  # `algo` is the first field of the result


def _choose(plan: Plan, preference: int) -> None:
    """Put the heuristic's first algorithm into the plan."""
    lt = library()
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


def _takes(plan: Plan) -> bool:
    """Whether the plan's algorithm also does the product as it is described now, within the
    workspace.
    """
    lt = library()
    result = np.zeros(1, lt.matmul_heuristic_result_dtype)
    try:
        lt.matmul_algo_check(
            plan.handle, plan.product, plan.b, plan.a, plan.add, plan.out,
            plan.chosen.ctypes.data, result.ctypes.data,
        )  # fmt: skip
    except lt.cuBLASLtError:
        return False
    return int(result["workspace_size"][0]) <= WORKSPACE


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
    lt = library()
    out = lt.matrix_layout_create(CUDA_TYPES[dtype], columns, rows, row)
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


@functools.cache
def library():
    """The bindings; KernelError, saying what to install, where they are missing."""
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
        return library().create()
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
def constants(device: int, dtype: np.dtype) -> tuple[int, int]:
    """The addresses of 0 and of 1 on the device."""
    start = _constants_array(device, dtype).data.ptr
    return start, start + dtype.itemsize


_workspaces: dict[tuple[int, int], Array] = {}


def workspace(device: int, stream: int) -> int:
    """The address of WORKSPACE bytes that products on this stream may use."""
    # One a stream: products on one stream follow each other, products on two may overlap.
    kept = _workspaces.get((device, stream))
    if kept is None:
        import cupy

        kept = _workspaces[device, stream] = cupy.cuda.alloc(WORKSPACE)
    return kept.ptr
