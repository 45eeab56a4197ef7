"""Changed weights: W + dW in the dtype of W, summed wide and rounded once, in one pass over W.

For inference and for merging: nothing here is differentiated, and the change is not kept.
"""

from __future__ import annotations

import numpy as np

from ..arrays import Array, like, on_gpu, require_axes, require_same, wide, wide_dtype
from ..errors import ShapeError
from ..kernels import kernel
from .columns import rows_of
from .elementwise import cast, require_factor
from .factored_gpu import Pair, factored_changed
from .hadamard import hadamard_weight
from .low_rank import fold_core, low_rank_weight

_KRON_ROWS = 4  # of kron_changed, as in kron.cu


def changed(weight: Array, delta: Array) -> Array:
    """weight + delta.  weight: any shape. delta: the same shape, wide."""
    _require_shape(weight, delta.shape)
    if not on_gpu(weight):
        return like(wide(weight) + delta, weight)
    import cupy

    out = cupy.empty(weight.shape, weight.dtype)
    if out.size:
        grid = (min((out.size + 255) // 256, 1 << 20),)
        kernel("elementwise.cu", "add_wide", weight.dtype)(
            grid, (256,), weight, cast(delta, wide_dtype(weight.dtype)), out, out.size
        )
    return out


def scaled_changed(weight: Array, delta: Array, scale: Array) -> Array:
    """weight + scale[0] * delta.  weight, delta: of one shape and dtype. scale: (1,) wide."""
    require_same("weight", weight, "delta", delta)
    require_factor(scale, weight)
    _require_shape(weight, delta.shape)
    if not on_gpu(weight):
        return like(wide(weight) + wide(delta) * scale, weight)
    import cupy

    out = cupy.empty(weight.shape, weight.dtype)
    if out.size:
        grid = (min((out.size + 2047) // 2048, 65535),)  # 16 bytes a thread of a bf16
        kernel("elementwise.cu", "add_scaled", weight.dtype)(
            grid, (256,), weight, delta, scale, out, out.size
        )
    return out


def low_rank_changed(
    weight: Array, down: Array, up: Array, scale: Array, core: Array | None = None
) -> Array:
    """weight[t] + scale[0] * down[t] @ up, where down[t] is down @ core[t] of a pair with a core.

    weight: (taps, IN, OUT). down: (taps, IN, R), or (1, IN, Q). core: None, or (taps, Q, R). up:
    (1, R, OUT), all of one dtype. scale: (1,) wide. Raises ShapeError, DtypeError.
    """
    require_factor(scale, weight)
    pair = _pair(weight, "", down, up, core)
    if not on_gpu(weight):
        total = np.matmul(wide(_folded(pair)), wide(up))
        total *= scale
        total += wide(weight)
        return like(total, weight)
    out = factored_changed(weight, scale, pair)
    if out is not None:
        return out
    down = _folded(pair)
    if down.dtype != weight.dtype:
        return changed(weight, low_rank_weight(down, up, scale))
    from ..gemm import gemm

    # The weight is what the product's accumulators start from.
    out = gemm(rows_of(down), up[0], scale=scale, add=rows_of(weight))
    return out.reshape(weight.shape)


def hadamard_changed(
    weight: Array,
    down1: Array,
    up1: Array,
    down2: Array,
    up2: Array,
    scale: Array,
    core1: Array | None = None,
    core2: Array | None = None,
) -> Array:
    """weight[t] + scale[0] * (down1[t] @ up1) * (down2[t] @ up2), each pair as those of
    `low_rank_changed`, and both with a core or neither.
    """
    require_factor(scale, weight)
    pairs = _pair(weight, "1", down1, up1, core1), _pair(weight, "2", down2, up2, core2)
    out = factored_changed(weight, scale, *pairs) if on_gpu(weight) else None
    if out is not None:
        return out
    first, second = map(_folded, pairs)
    return changed(weight, hadamard_weight(first, up1, second, up2, scale))


def kron_changed(weight: Array, w1: Array, w2: Array, scale: Array) -> Array:
    """weight[t] + scale[0] * w1 kron w2[t], laid out as by `kron_weight`.  weight: (taps, M * N, L
    * K). w1: (L, M). w2: (taps, N, K), either dtype. scale: (1,) wide.
    """
    require_factor(scale, weight)
    kept = wide_dtype(weight.dtype)
    (rows, columns), (taps, n, k) = w1.shape, w2.shape
    _require_shape(weight, (taps, columns * n, rows * k))
    if not on_gpu(weight):
        w1, w2 = wide(w1), wide(w2)
        total = (w1 * scale).T[None, :, None, :, None] * w2[:, None, :, None, :]
        total = total.reshape(weight.shape)
        total += wide(weight)
        return like(total, weight)
    import cupy

    out = cupy.empty(weight.shape, weight.dtype)
    if out.size:
        width = 16 // weight.dtype.itemsize
        whole = all(a.data.ptr % 16 == 0 for a in (weight, w2))
        vec = width if k % width == 0 and whole else 1
        chunks = rows * k // vec
        across = -(-chunks // 256)
        # Of a narrow weight no thread of a block is without columns.
        block = -(-chunks // across // 32) * 32
        grid = (-(-chunks // block), min(n * -(-columns // _KRON_ROWS), 65535), taps)
        factors = [(a, None) if a.dtype != kept else (None, a) for a in (w1, w2)]
        kernel("kron.cu", "kron_changed", weight.dtype, VEC=vec)(
            grid, (block,), weight, *factors[0], *factors[1], scale, out, rows, columns, n, k
        )
    return out


def _pair(weight: Array, name: str, down: Array, up: Array, core: Array | None) -> Pair:
    """The factors, which fit each other and the weight."""
    given = {"down": down, "up": up} | ({} if core is None else {"core": core})
    for what, factor in given.items():
        require_axes(factor, 3, f"{what}{name}", "(taps or 1, rows, columns)")
        require_same("weight", weight, f"{what}{name}", factor)
    left = down if core is None else core
    _require_shape(weight, (left.shape[0], down.shape[1], up.shape[2]))
    expected = {"up": (1, left.shape[2], up.shape[2])}
    if core is not None:
        expected["down"] = (1, down.shape[1], core.shape[1])
    for what, shape in expected.items():
        if tuple(given[what].shape) != shape:
            raise ShapeError(f"{what}{name} has shape {tuple(given[what].shape)}, expected {shape}")
    return Pair(down, up, core)


def _folded(pair: Pair) -> Array:
    """The down factor of a plain pair: (taps, IN, R), of a Tucker pair wide."""
    return pair.down if pair.core is None else fold_core(pair.down[0], pair.core)


def _require_shape(weight: Array, expected) -> None:
    if tuple(weight.shape) != tuple(expected):
        raise ShapeError(f"weight has shape {tuple(weight.shape)}, expected {tuple(expected)}")
