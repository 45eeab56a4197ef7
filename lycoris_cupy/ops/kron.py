"""The Kronecker product of LoKr: the weight itself, and the mix of blocks of channels that avoids
building it.

Yeh et al. 2023, "Navigating Text-To-Image Customization", arXiv 2309.14859.
"""

from __future__ import annotations

from math import prod

import numpy as np

from ..arrays import (
    Array,
    bf16,
    like,
    on_gpu,
    require_axes,
    require_float,
    require_same,
    wide,
    wide_dtype,
)
from ..errors import ShapeError
from ..kernels import kernel
from ..tape import Fresh, Primitive, value_of
from .aligned import aligned
from .columns import column_sum
from .conv_gpu import processors
from .counters import COUNTERS, counters
from .elementwise import cast, require_factor


def kron_weight(w1: Array, w2: Array, scale: Array | None = None) -> Array:
    """out[t, m * N + n, l * K + k] = scale[0] * w1[l, m] * w2[t, n, k]: the update of a LoKr.

    w1: (L, M), output side first as in files. w2: (taps, N, K). scale: (1,) wide, a constant, or
    None for 1. Returns (taps, M * N, L * K), wide. Raises ShapeError, DtypeError.
    """
    require_axes(w1, 2, "w1", "(L, M)")
    require_axes(w2, 3, "w2", "(taps, N, K)")
    require_float(value_of(w1), "w1")
    require_same("w1", value_of(w1), "w2", value_of(w2))
    if scale is not None:
        require_factor(scale, w1)
    return _kron_weight(w1, w2, scale)


def mix_blocks(x: Array, w1: Array) -> Array:
    """out[..., l * N + n] = sum over m of w1[l, m] * x[..., m * N + n]: blocks of channels mixed by
    w1.

    With w2 applied to each block afterwards this is x @ kron_weight(w1, w2). x: (..., M * N). w1:
    (L, M) of the dtype of x. Returns (..., L * N) in the dtype of x. Raises ShapeError, DtypeError.
    """
    require_axes(w1, 2, "w1", "(L, M)")
    require_float(value_of(x), "x")
    require_same("x", value_of(x), "w1", value_of(w1))
    mixed_shape(x.shape, w1.shape)
    return _mix_blocks(x, w1, turned=False)


def mixed_shape(x: tuple[int, ...], w1: tuple[int, ...]) -> tuple[int, ...]:
    """That of mix_blocks(x, w1), after checking that both fit."""
    if w1[1] == 0 or x[-1] % w1[1]:
        raise ShapeError(
            f"x has {x[-1]} channels, expected a multiple of the {w1[1]} columns of w1"
        )
    return (*x[:-1], x[-1] // w1[1] * w1[0])


def _kron_weight_cpu(w1, w2, scale):
    w1, w2 = wide(w1), wide(w2)
    w1 = w1 if scale is None else w1 * scale
    (rows, columns), (taps, n, k) = w1.shape, w2.shape
    out = w1.T[None, :, None, :, None] * w2[:, None, :, None, :]
    return out.reshape(taps, columns * n, rows * k)


def _kron_weight_gpu(w1, w2, scale):
    import cupy

    (rows, columns), (taps, n, k) = w1.shape, w2.shape
    out = cupy.empty((taps, columns * n, rows * k), wide_dtype(w1.dtype))
    if out.size:
        grid = ((rows * k + 255) // 256, min(columns * n, 65535), taps)
        kernel("kron.cu", "kron_weight", w1.dtype, VEC=1)(
            grid, (256,), w1, w2, scale, out, rows, columns, n, k
        )
    return out


def _kron_weight_vjp(needs, out, w1, w2, scale):
    def pull(g):
        run = _kron_pull_gpu if on_gpu(w1) else _kron_pull_cpu
        return (*run(needs, g, w1, w2, scale), None)

    return pull


def _kron_pull_cpu(needs, g, w1, w2, scale):
    (rows, columns), (taps, n, k) = w1.shape, w2.shape
    g = wide(g) if scale is None else wide(g) * scale
    # (taps, M, N, L, K) -> (L * M, taps * N * K): each gradient is then one matrix-vector product.
    g = (
        g.reshape(taps, columns, n, rows, k)
        .transpose(3, 1, 0, 2, 4)
        .reshape(rows * columns, taps * n * k)
    )
    dw1 = (g @ wide(w2).reshape(-1)).reshape(w1.shape) if needs[0] else None
    dw2 = (wide(w1).reshape(-1) @ g).reshape(w2.shape) if needs[1] else None
    return dw1, dw2


def _kron_pull_gpu(needs, g, w1, w2, scale):
    import cupy

    (rows, columns), (taps, n, k) = w1.shape, w2.shape
    g = cast(g, wide_dtype(w1.dtype))
    dw1 = dw2 = None
    sizes = (rows, columns, taps, n, k)
    if needs[0]:
        dw1 = (cupy.empty if g.size else cupy.zeros)(w1.shape, g.dtype)
        if g.size:
            kernel("kron.cu", "kron_weight_dw1", w1.dtype, VEC=1)(
                (rows, columns), (256,), g, w2, scale, dw1, *sizes
            )
    if needs[1]:
        dw2 = (cupy.empty if g.size else cupy.zeros)(w2.shape, g.dtype)
        if g.size:
            grid = ((w2.size + 255) // 256,)
            kernel("kron.cu", "kron_weight_dw2", w1.dtype, VEC=1)(
                grid, (256,), g, w1, scale, dw2, *sizes
            )
    return dw1, dw2


_kron_weight = Primitive("kron_weight", _kron_weight_cpu, _kron_weight_gpu, _kron_weight_vjp)


def _mix_sizes(x, w1, turned):
    """(positions, L, M, N) of a mix by w1 (L, M), or by the transpose of w1 (M, L)."""
    rows, columns = w1.shape[::-1] if turned else w1.shape
    return prod(x.shape[:-1]), rows, columns, x.shape[-1] // columns


def _mix_blocks_cpu(x, w1, *, turned):
    positions, rows, columns, n = _mix_sizes(x, w1, turned)
    out = np.matmul(wide(w1).T if turned else wide(w1), wide(x).reshape(positions, columns, n))
    return like(out, x).reshape(*x.shape[:-1], rows * n)


def _vector(n, *arrays):
    """How many values move as one access: 16 bytes if every row of n values allows it, or one."""
    width = 16 // arrays[0].dtype.itemsize
    return width if n % width == 0 and all(a.data.ptr % 16 == 0 for a in arrays) else 1


def _mix_blocks_gpu(x, w1, *, turned):
    import cupy

    positions, rows, columns, n = _mix_sizes(x, w1, turned)
    out = cupy.empty((*x.shape[:-1], rows * n), x.dtype)
    if out.size:
        vector = _vector(n, x, out)
        steps = (1, rows) if turned else (columns, 1)
        threads = positions * n // vector
        # Smaller blocks where larger ones are fewer than the multiprocessors.
        block = 256 if threads > 256 * processors() else 64
        grid = ((threads + block - 1) // block, (rows + 7) // 8)
        kernel("kron.cu", "mix_blocks", x.dtype, VEC=vector)(
            grid, (block,), x, w1, out, positions, rows, columns, n, *steps
        )
    return out


def mix_blocks_dw1(g: Array, x: Array, rows: int, columns: int) -> Array:
    """dw1[l, m] = sum over positions and n of g[..., l * N + n] * x[..., m * N + n], (L, M) wide.
    The gradient of a mix.
    """
    return _mix_blocks_dw1(g, x, rows=rows, columns=columns)


def _mix_blocks_dw1_cpu(g, x, *, rows, columns):
    g = wide(g).reshape(prod(g.shape[:-1]), rows, g.shape[-1] // rows)
    x = wide(x).reshape(prod(x.shape[:-1]), columns, x.shape[-1] // columns)
    return np.matmul(g, x.swapaxes(1, 2)).sum(axis=0)


def _mix_blocks_dw1_gpu(g, x, *, rows, columns):
    import cupy

    n = x.shape[-1] // columns
    positions = prod(x.shape[:-1])
    if not positions:
        return cupy.zeros((rows, columns), wide_dtype(x.dtype))
    if _in_chunks(g, x, n):
        return _gradients(g, x, (rows, columns))[1]
    # Parts are fixed shares of the positions, added in a fixed order.
    vector = 1 if x.dtype == bf16 else _vector(n, x, g)
    tiles = (columns + 7) // 8, (rows + 15) // 16
    # Up to 8 blocks of 128 threads on each of some 130 multiprocessors, each with work for a few
    # loads.
    parts = max(min(positions * n // 2048, 528 // (tiles[0] * tiles[1])), 1)
    partial = cupy.empty((parts, rows, columns), wide_dtype(x.dtype))
    kernel("kron.cu", "mix_blocks_dw1", x.dtype, VEC=vector)(
        (*tiles, parts), (128,), g, x, partial, positions, rows, columns, n
    )
    return column_sum(partial.reshape(parts, -1)).reshape(rows, columns)


def mix_gradients(g: Array, x: Array, w1: Array, *, turned: bool = False) -> tuple[Array, Array]:
    """(dx in the dtype of x, dw1 wide): the gradients of out = mix_blocks(x, w1), or of the mix by
    w1 turned, from that of out. One reading of g and x where a block of a kernel holds all of w1.
    """
    rows, columns = w1.shape
    fits = on_gpu(x) and x.size > 0 and max(w1.shape) <= _SIDES[-1]
    if fits and _in_chunks(g, x, x.shape[-1] // (rows if turned else columns)):
        return _gradients(g, x, (rows, columns), w1, turned=turned)
    dx = _mix_blocks(g, w1, turned=not turned)
    sides = (x, g) if turned else (g, x)
    return dx, _mix_blocks_dw1(*sides, rows=rows, columns=columns)


_SIDES = (8, 16)  # rows and columns of w1 that a block of kron_mix.cu does
_GRADIENT_WARPS = 8
_FEW_PARTS = 64  # that the last block adds sooner than another launch


def _in_chunks(g, x, n):
    """Whether kron_mix.cu takes these: rows of n values in chunks of 16 bytes, items that it can
    count.
    """
    return n % 8 == 0 and aligned(g, x) and prod(x.shape[:-1]) * -(-n // 32) < 2**31


def _gradients(g, x, shape, w1=None, *, turned=False):
    """(dx, dw1) of a mix by w1 of this shape, (L, M), or by w1 turned, (M, L); dx is None without
    w1.
    """
    import cupy

    rows, columns = shape[::-1] if turned else shape
    steps = (1, rows) if turned else (columns, 1)
    n = x.shape[-1] // columns
    side = next((s for s in _SIDES if max(shape) <= s), _SIDES[-1])
    tiles = -(-rows // side), -(-columns // side)
    dx = None if w1 is None else cupy.empty(x.shape, x.dtype)
    items = prod(x.shape[:-1]) * -(-n // 32)
    # A warp does 128 values of n at a time, or half of that with 16 rows. Three blocks on each
    # multiprocessor, unless there is work for fewer.
    blocks = -(-items * side // (32 * _GRADIENT_WARPS))
    parts = max(min(blocks, 3 * processors() // prod(tiles)), 1)
    partial = cupy.empty((parts, prod(shape)), wide_dtype(x.dtype))
    few = parts <= _FEW_PARTS and prod(tiles) <= COUNTERS
    dw1, seen = (cupy.empty(shape, partial.dtype), counters()) if few else (None, None)
    kernel("kron_mix.cu", "mix_gradients", x.dtype, SIDE=side)(
        (parts, *tiles), (32 * _GRADIENT_WARPS,), g, x, w1, dx, partial, dw1, seen, items,
        rows, columns, n, *steps,
    )  # fmt: skip
    return dx, column_sum(partial).reshape(shape) if dw1 is None else dw1


def _mix_blocks_vjp(needs, out, x, w1, *, turned):
    rows, columns = w1.shape
    x, w1 = (x if needs[1] else None), (w1 if needs[0] else None)

    def pull(g):
        if all(needs):
            dx, dw1 = mix_gradients(g, x, w1, turned=turned)
            return Fresh(dx), dw1
        if needs[0]:
            return Fresh(_mix_blocks(g, w1, turned=not turned)), None
        return None, _mix_blocks_dw1(*((x, g) if turned else (g, x)), rows=rows, columns=columns)

    return pull


_mix_blocks = Primitive("mix_blocks", _mix_blocks_cpu, _mix_blocks_gpu, _mix_blocks_vjp)


def _mix_blocks_dw1_vjp(needs, out, g, x, *, rows, columns):
    def pull(c):
        c = cast(c, x.dtype)
        dg = _mix_blocks(x, c, turned=False) if needs[0] else None
        return dg, _mix_blocks(g, c, turned=True) if needs[1] else None

    return pull


_mix_blocks_dw1 = Primitive(
    "mix_blocks_dw1", _mix_blocks_dw1_cpu, _mix_blocks_dw1_gpu, _mix_blocks_dw1_vjp
)
