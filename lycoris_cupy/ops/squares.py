"""Squared norms of a changed weight, per output or per input: from the change itself, or from its
low-rank factors without building it.

The weight is frozen: it has no gradient. A convolution has one norm a channel, over all its taps.
"""

from __future__ import annotations

from ..arrays import Array, on_gpu, require_axes, require_float, wide, wide_dtype
from ..errors import LycorisError, ShapeError
from ..kernels import kernel
from ..tape import Primitive, Var, value_of
from .columns import column_sum
from .dense import matmul
from .elementwise import add, cast, require_factor
from .shapes import reshape

AXES = ("output", "input")


def changed_square(weight: Array, delta: Array | None = None, *, axis: str) -> Array:
    """sum of (weight + delta)^2 over all but one axis: (OUT,) for 'output', (IN,) for 'input'.

    weight: (taps, IN, OUT), a constant. delta: the same shape, wide, or None for 0. Returns the
    wide dtype. Raises ShapeError, LycorisError.
    """
    require_weight(weight, axis)
    if delta is not None:
        if tuple(delta.shape) != tuple(weight.shape):
            raise ShapeError(
                f"delta has shape {tuple(delta.shape)}, expected {tuple(weight.shape)}"
            )
        delta = cast(delta, wide_dtype(weight.dtype))
    return over_taps(_changed_square(weight, delta, axis=axis), weight, axis)


def low_rank_square(
    down: Array, up: Array, weight: Array, square: Array, scale: Array, *, axis: str
) -> Array:
    """|weight + scale[0] * down @ up|^2 per output or input, from products as thin as the rank:

        output   square + 2 s <P, up> + s^2 <(down^T down) up, up>      P = down^T weight
        input    square + 2 s <Q, down> + s^2 <down (up up^T), down>    Q = weight up^T

    down: (taps, IN, R). up: (taps, R, OUT), or (1, R, OUT) to serve all taps. weight: (taps, IN,
    OUT), a constant. square: changed_square(weight). scale: (1,) wide, a constant. Returns (OUT,)
    or (IN,), wide. The weight is read once forward and once backward. Raises ShapeError.
    """
    require_weight(weight, axis)
    down, up = cast(down, weight.dtype), cast(up, weight.dtype)
    taps, inputs, outputs = weight.shape
    rank, length = down.shape[-1], outputs if axis == "output" else inputs
    for name, factor, expected in (
        ("down", down, [(taps, inputs, rank)]),
        ("up", up, [(1, rank, outputs), (taps, rank, outputs)]),
        ("square", square, [(length,)]),
    ):
        if tuple(factor.shape) not in expected:
            raise ShapeError(f"{name} has shape {tuple(factor.shape)}, expected {expected[0]}")
    require_factor(scale, weight)
    rows = weight
    if up.shape[0] == 1:  # one up for all taps: they are only more rows
        down = reshape(down, (1, taps * inputs, rank))
        rows = weight.reshape(1, taps * inputs, outputs)
    own, other = (up, down) if axis == "output" else (down, up)
    cross = _against_weight(other, rows, axis=axis)
    part = _low_rank_norm(own, other, cross, scale, axis=axis)
    return add(over_taps(part, weight, axis), square)


def require_weight(weight: Array, axis: str) -> None:
    """Raise unless weight is (taps, IN, OUT) and no Var, and axis one of AXES."""
    if isinstance(weight, Var):
        raise LycorisError("weight is a constant of the tape: layers are frozen")
    require_float(value_of(weight), "weight")
    require_axes(weight, 3, "weight", "(taps, IN, OUT)")
    if axis not in AXES:
        raise ShapeError(f"axis {axis!r} is unknown: a norm is per 'output' or per 'input'")


def over_taps(sums: Array, weight: Array, axis: str) -> Array:
    """Per 'output' as it is; per 'input' (taps * IN,) summed to (IN,)."""
    taps, inputs, _ = weight.shape
    return sums if axis == "output" or taps == 1 else column_sum(reshape(sums, (taps, inputs)))


def _rows(weight):
    """(rows, columns) of (taps, IN, OUT)."""
    return weight.shape[0] * weight.shape[1], weight.shape[2]


def _changed_square_cpu(weight, delta, *, axis):
    total = wide(weight) if delta is None else wide(weight) + delta
    total = (total * total).reshape(_rows(weight))
    return total.sum(axis=0 if axis == "output" else 1)


def _changed_square_gpu(weight, delta, *, axis):
    import cupy

    kept, (rows, columns) = wide_dtype(weight.dtype), _rows(weight)
    if not weight.size:
        return cupy.zeros((columns if axis == "output" else rows,), kept)
    if axis == "input":
        out = cupy.empty((rows,), kept)
        kernel("squares.cu", "square_rows", weight.dtype)(
            ((rows + 7) // 8,), (32, 8), weight, delta, out, rows, columns
        )
        return out
    # Parts of the rows in a fixed order, then their sum; some eight blocks a multiprocessor.
    tiles = (columns + 31) // 32
    parts = max(min(rows // 64, 1056 // tiles), 1)
    partial = cupy.empty((parts, columns), kept)
    kernel("squares.cu", "square_columns", weight.dtype)(
        (tiles, parts), (32, 8), weight, delta, partial, rows, columns
    )
    return column_sum(partial)


def _changed_square_vjp(needs, out, weight, delta, *, axis):
    def pull(g):
        return None, _changed_square_d(g, weight, delta, axis) if needs[1] else None

    return pull


def _changed_square_d(g, weight, delta, axis):
    """2 * g * (weight + delta), g spread over the axis it belongs to."""
    rows, columns = _rows(weight)
    if not on_gpu(weight):
        spread = g if axis == "output" else g[:, None]
        return (2 * spread * (wide(weight) + delta).reshape(rows, columns)).reshape(weight.shape)
    import cupy

    out = cupy.empty(weight.shape, delta.dtype)
    if out.size:
        grid = ((columns + 255) // 256, min(rows, 65535))
        kernel("squares.cu", "square_d", weight.dtype)(
            grid, (256,), g, weight, delta, out, rows, columns, int(axis == "input")
        )
    return out


_changed_square = Primitive(
    "changed_square", _changed_square_cpu, _changed_square_gpu, _changed_square_vjp
)


def _run_against_weight(factor, weight, *, axis):
    """factor^T @ weight for down (B, I, R), weight @ factor^T for up (B, R, O); wide."""
    if axis == "output":
        return matmul(factor, weight, transpose_a=True)
    return matmul(weight, factor, transpose_b=True)


def _against_weight_vjp(needs, out, factor, weight, *, axis):
    def pull(g):
        g = cast(g, weight.dtype)  # the frozen weight is read as it lies
        if axis == "output":
            return matmul(weight, g, transpose_b=True), None
        return matmul(g, weight, transpose_a=True), None

    return pull


_against_weight = Primitive(
    "against_weight", _run_against_weight, _run_against_weight, _against_weight_vjp
)


def _through_gram(own, other, axis):
    """(other^T other) @ own for an up, own @ (other other^T) for a down; wide."""
    kept = wide_dtype(own.dtype)
    if axis == "output":
        return matmul(matmul(other, other, transpose_a=True), cast(own, kept))
    return matmul(cast(own, kept), matmul(other, other, transpose_b=True))


def _low_rank_norm_cpu(own, other, cross, scale, *, axis, keep):
    through = _through_gram(own, other, axis)
    terms = wide(own) * (2 * scale * cross + scale * scale * through)
    return terms.sum(axis=(0, 1)) if axis == "output" else terms.sum(axis=2).reshape(-1), through


def _low_rank_norm_gpu(own, other, cross, scale, *, axis, keep):
    import cupy

    through, (rows, columns) = _through_gram(own, other, axis), _rows(own)
    out = cupy.empty((columns if axis == "output" else rows,), cross.dtype)
    if out.size:
        op = "dot_columns" if axis == "output" else "dot_rows"
        kernel("squares.cu", op, own.dtype)(
            ((out.size + 127) // 128,),
            (128,),
            *(own, cross, through, scale, out, rows, columns),
        )
    return out, through


def _low_rank_norm_vjp(needs, out, own, other, cross, scale, *, axis, kept):
    """kept: `_through_gram`, as thin as the rank."""
    many = cross.dtype

    def pull(g):
        d_own, flow = _dot_gradients(g, own, cross, kept, scale, axis)
        # flow = 2 s q own is what reaches cross; through the Gram matrix s * flow reaches other.
        thin = cast(flow, own.dtype)
        if axis == "output":
            core = matmul(thin, own, transpose_b=True)
            d_other = matmul(cast(other, many), core, scale=scale)
        else:
            core = matmul(thin, own, transpose_a=True)
            d_other = matmul(core, cast(other, many), scale=scale)
        return d_own, d_other, flow, None

    return pull


def _dot_gradients(g, own, cross, through, scale, axis):
    """(2 q (s cross + s^2 through), 2 s q own), wide; q is g spread over the axis it belongs to."""
    if not on_gpu(own):
        q = g if axis == "output" else g.reshape(*own.shape[:2], 1)
        return 2 * q * (scale * cross + scale * scale * through), 2 * scale * q * wide(own)
    import cupy

    rows, columns = _rows(own)
    d_own, flow = cupy.empty(own.shape, cross.dtype), cupy.empty(own.shape, cross.dtype)
    if d_own.size:
        grid = ((columns + 255) // 256, min(rows, 65535))
        arrays = (g, own, cross, through, scale, d_own, flow)
        kernel("squares.cu", "dot_d", own.dtype)(
            grid, (256,), *arrays, rows, columns, int(axis == "input")
        )
    return d_own, flow


_low_rank_norm = Primitive(
    "low_rank_norm", _low_rank_norm_cpu, _low_rank_norm_gpu, _low_rank_norm_vjp, keeps=True
)
