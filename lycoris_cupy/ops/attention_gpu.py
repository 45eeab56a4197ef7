"""attention on the GPU: the fused kernels of attention.cu for bf16, batched products and a softmax
kernel for other dtypes and widths.
"""

from __future__ import annotations

from ..arrays import Array, bf16
from ..kernels import kernel
from .aligned import aligned
from .columns import rows_of
from .dense import matmul
from .elementwise import cast
from .softmax import softmax_d, team

WIDTHS = (64, 128)  # of the fused kernels; narrower heads are filled up with zeros
_ROWS, _KEYS, _COLUMNS = 64, 64, 32  # as in attention.cuh and attention.cu


def fused_width(q: Array, v: Array) -> int | None:
    """The width of the fused kernel that takes these heads; None if none does."""
    width = q.shape[3]
    if q.dtype != bf16 or v.shape[3] != width or width % 8 or not 0 < width <= WIDTHS[-1]:
        return None
    return next(w for w in WIDTHS if w >= width)


def _aligned(x: Array) -> Array:
    """x, or a copy of it where it does not begin at 16 bytes: the kernels copy so many at once."""
    return x if aligned(x) else x.copy()


def _mask_numbers(mask: Array | None) -> tuple:
    """(strides of a sample, a head, a query, in elements: 0 along axes of size 1)."""
    if mask is None:
        return 0, 0, 0
    _, heads, queries, keys = mask.shape
    strides = (heads * queries * keys, queries * keys, keys)
    return tuple(s if n > 1 else 0 for s, n in zip(strides, mask.shape[:3], strict=True))


def _mask_arrays(mask: Array | None) -> tuple:
    """(what is added, what is allowed), one of them None."""
    import cupy

    if mask is None:
        return None, None
    dense: Array = cupy.ascontiguousarray(mask)
    return (None, dense.view("u1")) if dense.dtype == bool else (dense, None)


def _launch(op, width, tiles, grid, arrays, q, k, mask, setting):
    """tiles: values of shared memory a row of which has 8 more than the kernel's width."""
    kernel("attention.cu", op, q.dtype, WIDTH=width)(
        grid, (128,), *arrays, setting.scale, q.shape[1], q.shape[2], k.shape[2], q.shape[3],
        *_mask_numbers(mask), int(setting.causal), shared=tiles * (width + 8) * 2,
    )  # fmt: skip


def _tiles(x: Array) -> tuple[int, int]:
    return x.shape[0] * x.shape[1], (x.shape[2] + _ROWS - 1) // _ROWS


def attention_gpu(q, k, v, mask, *, setting, kept):
    import cupy

    width, shape = fused_width(q, v), (*q.shape[:3], v.shape[3])
    if not k.shape[2]:
        return cupy.zeros(shape, q.dtype)
    out = cupy.empty(shape, q.dtype)
    if not out.size:
        return out
    if width is None:
        p = _probabilities(q, k, mask, setting)
        return cast(matmul(p, _heads(v)), q.dtype).reshape(out.shape)
    kept["powers"] = cupy.empty(q.shape[:3], "f4")
    arrays = (*map(_aligned, (q, k, v)), *_mask_arrays(mask), out, kept["powers"])
    _launch("attention", width, _ROWS + 2 * _KEYS, _tiles(q), arrays, q, k, mask, setting)
    return out


def attention_pull_gpu(needs, g, out, q, k, v, mask, setting, kept):
    """The gradients of q, k and v, those that are needed."""
    import cupy

    width = fused_width(q, v)
    if not out.size or not k.shape[2]:
        return tuple(cupy.zeros(x.shape, x.dtype) for x in (q, k, v))
    if width is None:
        return _pull_products(needs, g, q, k, v, mask, setting)
    along = cupy.empty(q.shape[:3], "f4")
    kernel("attention.cu", "attention_along", q.dtype, WIDTH=width)(
        ((along.size + 7) // 8,), (256,), g, out, along, along.size, q.shape[3]
    )
    read = (*map(_aligned, (q, k, v, g)), *_mask_arrays(mask), kept["powers"], along)
    tiles, dq, dk, dv = 2 * _ROWS + 4 * _COLUMNS, None, None, None
    if needs[0]:
        dq = cupy.empty(q.shape, q.dtype)
        _launch("attention_dq", width, tiles, _tiles(q), (*read, dq), q, k, mask, setting)
    if needs[1] or needs[2]:
        dk, dv = cupy.empty(k.shape, k.dtype), cupy.empty(v.shape, v.dtype)
        _launch("attention_dkv", width, tiles, _tiles(k), (*read, dk, dv), q, k, mask, setting)
    return dq, dk if needs[1] else None, dv if needs[2] else None


def _heads(x):
    """(N, heads, length, width) as (N * heads, length, width)."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _probabilities(q, k, mask, setting):
    """The softmax of all scores, (N * heads, L, S), in the dtype of q."""
    import cupy

    products = matmul(_heads(q), _heads(k), transpose_b=True)
    p = cupy.empty(products.shape, q.dtype)
    (rows, keys), (_, heads, queries, _) = rows_of(p).shape, q.shape
    kernel("softmax.cu", "softmax_scores", q.dtype)(
        *team(rows, keys), products, *_mask_arrays(mask), p, setting.scale, heads, queries, keys,
        *_mask_numbers(mask), int(setting.causal), rows,
    )  # fmt: skip
    return p


def _pull_products(needs, g, q, k, v, mask, setting):
    p, g = _probabilities(q, k, mask, setting), _heads(g)
    dq = dk = dv = None
    if needs[2]:
        dv = cast(matmul(p, g, transpose_a=True), v.dtype).reshape(v.shape)
    if needs[0] or needs[1]:
        h = softmax_d(matmul(g, _heads(v), transpose_b=True), p, setting.scale)
        if needs[0]:
            dq = cast(matmul(h, _heads(k)), q.dtype).reshape(q.shape)
        if needs[1]:
            dk = cast(matmul(h, _heads(q), transpose_a=True), k.dtype).reshape(k.shape)
    return dq, dk, dv
