"""Weights from low-rank factors: the plain product of LoCon and LoKr, and the Tucker product of a
convolution.

All results are wide (f32; f64 for f64): they are rounded once, by whoever adds them to a weight or
multiplies with them.
"""

from __future__ import annotations

from ..arrays import Array, require_axes, require_float, require_same, wide_dtype
from ..errors import ShapeError
from ..kernels import kernel
from ..tape import Primitive, value_of
from .columns import rows_of
from .dense import matmul
from .elementwise import cast, require_factor
from .shapes import transpose
from .small_sums import Sum, small, small_sums


def low_rank_weight(down: Array, up: Array, scale: Array | None = None) -> Array:
    """out[t] = scale[0] * down[t] @ up[t]: the update of a LoRA or LoCon.  Hu et al. 2021, arXiv
    2106.09685.

    down: (taps, IN, R). up: (taps, R, OUT), or (1, R, OUT) to serve all taps. scale: (1,) wide, a
    constant, or None for 1. Returns (taps, IN, OUT), wide. Raises ShapeError, DtypeError.
    """
    require_axes(down, 3, "down", "(taps, IN, R)")
    require_axes(up, 3, "up", "(taps or 1, R, OUT)")
    down, up = same_dtype(down, up)
    require_same("down", value_of(down), "up", value_of(up))
    if down.shape[2] != up.shape[1] or up.shape[0] not in (1, down.shape[0]):
        raise ShapeError(
            f"up has shape {tuple(up.shape)}, expected ({down.shape[0]} or 1, {down.shape[2]}, OUT)"
        )
    if scale is not None:
        require_factor(scale, down)
    return _low_rank_weight(down, up, scale)


def tucker_weight(down: Array, mid: Array, up: Array, scale: Array | None = None) -> Array:
    """out[t] = scale[0] * down @ mid[t] @ up: the Tucker-2 product of a convolution.  Tucker 1966;
    Kim et al. 2016, 1511.06530.

    down: (IN, Q). mid: (taps, Q, P), its first rank facing down. up: (P, OUT). scale: (1,) wide, a
    constant, or None for 1. Returns (taps, IN, OUT), wide. Raises ShapeError, DtypeError.
    """
    require_axes(down, 2, "down", "(IN, Q)")
    require_axes(mid, 3, "mid", "(taps, Q, P)")
    require_axes(up, 2, "up", "(P, OUT)")
    require_float(value_of(down), "down")
    require_same("down", value_of(down), "mid", value_of(mid))
    require_same("down", value_of(down), "up", value_of(up))
    if mid.shape[1] != down.shape[1] or mid.shape[2] != up.shape[0]:
        raise ShapeError(
            f"mid has shape {tuple(mid.shape)}, expected (taps, {down.shape[1]}, {up.shape[0]})"
        )
    if scale is not None:
        require_factor(scale, down)
    return _tucker_weight(down, mid, up, scale)


def same_dtype(*factors: Array) -> tuple[Array, ...]:
    """The factors, the narrow ones cast to the wide dtype when any of them is wide."""
    for factor in factors:
        require_float(value_of(factor), "a factor")
    widest = max((f.dtype for f in factors), key=lambda d: d.itemsize)
    return tuple(cast(f, widest) for f in factors)


def _low_rank(down, up, scale):
    return matmul(down, up, scale=scale)


def _sum_taps(a: Array, b: Array, scale) -> Array:
    """sum over t of a[t]^T @ b[t]: one product over taps and rows."""
    return matmul(rows_of(a), rows_of(b), transpose_a=True, scale=scale)


def _beside(a: Array) -> Array:
    """(taps, rows, P) as (rows, taps * P)."""
    return transpose(a, (1, 0, 2)).reshape(a.shape[1], a.shape[0] * a.shape[2])


def low_rank_gradients(needs, g, down, up, scale):
    """(ddown, dup), wide, of out[t] = scale * down[t] @ up[t] for a wide cotangent g."""
    kept = wide_dtype(down.dtype)
    g = cast(g, kept)
    if up.shape[0] == 1 and all(needs[:2]):
        sums = Sum("tio,po->tip", g, up[0]), Sum("tio,tip->po", g, down)
        if small(*sums):
            ddown, dup = small_sums(sums, scale)
            return ddown, dup[None]
    ddown = matmul(g, cast(up, kept), transpose_b=True, scale=scale) if needs[0] else None
    if not needs[1]:
        return ddown, None
    if up.shape[0] == 1:
        return ddown, _sum_taps(cast(down, kept), g, scale)[None]
    return ddown, matmul(cast(down, kept), g, transpose_a=True, scale=scale)


def _low_rank_vjp(needs, out, down, up, scale):
    return lambda g: (*low_rank_gradients(needs, g, down, up, scale), None)


_low_rank_weight = Primitive("low_rank_weight", _low_rank, _low_rank, _low_rank_vjp)


def _tucker_cpu(down, mid, up, scale):
    kept = wide_dtype(down.dtype)
    return matmul(matmul(down[None], mid), cast(up, kept)[None], scale=scale)


def _tucker_gpu(down, mid, up, scale):
    import cupy

    (inputs, q), (taps, _, p), outputs = down.shape, mid.shape, up.shape[1]
    out = cupy.empty((taps, inputs, outputs), wide_dtype(down.dtype))
    if out.size:
        grid = ((outputs + 63) // 64, (inputs + 63) // 64, taps)
        kernel("tucker.cu", "tucker_weight", down.dtype)(
            grid, (256,), down, mid, up, scale, out, inputs, q, p, outputs
        )
    return out


def _tucker_vjp(needs, out, down, mid, up, scale):
    def pull(g):
        kept = wide_dtype(down.dtype)
        g = cast(g, kept)
        first = Sum("tio,po->tip", g, up), Sum("tio,iq->tqo", g, down)
        if all(needs[:3]) and small(*first):
            middle, turned = small_sums(first, scale)
            then = [("tip,tqp->iq", middle, mid), ("tip,iq->tqp", middle, down)]
            return *small_sums([Sum(*s) for s in (*then, ("tqo,tqp->po", turned, mid))]), None
        d, m, u = cast(down, kept), cast(mid, kept), cast(up, kept)
        middle = (
            matmul(g, u[None], transpose_b=True, scale=scale) if needs[0] or needs[1] else None
        )  # (taps, IN, P)
        # The taps side by side make one product: (IN, taps * P) @ (taps * P, Q).
        ddown = None
        if needs[0]:
            ddown = matmul(_beside(middle), _beside(m), transpose_b=True)
        dmid = matmul(d[None], middle, transpose_a=True) if needs[1] else None
        dup = _sum_taps(matmul(d[None], m), g, scale) if needs[2] else None
        return ddown, dmid, dup, None

    return pull


_tucker_weight = Primitive("tucker_weight", _tucker_cpu, _tucker_gpu, _tucker_vjp)


def fold_core(down: Array, mid: Array) -> Array:
    """out[t] = down @ mid[t], (taps, IN, P), wide: a Tucker pair seen as the down factor of a plain
    low-rank product.
    """
    require_axes(down, 2, "down", "(IN, Q)")
    require_axes(mid, 3, "mid", "(taps, Q, P)")
    require_same("down", value_of(down), "mid", value_of(mid))
    if mid.shape[1] != down.shape[1]:
        raise ShapeError(f"mid has shape {tuple(mid.shape)}, expected (taps, {down.shape[1]}, P)")
    return _fold_core(down, mid)


def _run_fold_core(down, mid):
    return matmul(down[None], mid)


def _fold_core_vjp(needs, out, down, mid):
    def pull(g):
        kept = wide_dtype(down.dtype)
        g = cast(g, kept)
        ddown = None
        if needs[0]:
            ddown = matmul(_beside(g), _beside(cast(mid, kept)), transpose_b=True)
        return ddown, matmul(cast(down, kept)[None], g, transpose_a=True) if needs[1] else None

    return pull


_fold_core = Primitive("fold_core", _run_fold_core, _run_fold_core, _fold_core_vjp)
