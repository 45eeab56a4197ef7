"""The product where each output position reads one input position, on cuBLASLt; its gradient for a
thin w by a kernel of its own. A group is a column range of views.
"""

from __future__ import annotations

from math import prod

from ..arrays import wide_dtype
from ..gemm import gemm
from .columns import rows_of
from .conv_gpu import conv
from .thin_outer_gpu import Outer, thin_outers
from .window import Window


def pointwise(x, w, window: Window, *, scale, add, bias, out=None):
    """add + scale * (x * w) + bias on matrices (P, C); groups as a batch, shared groups as more
    rows. out: where the result goes, a new array by default; may be add.
    """
    import cupy

    groups = window.groups
    if bias is not None and x.size and (groups > 1 or not _fuses_bias(x, w, add)):
        spatial = x if window.axes else rows_of(x)
        add = None if add is None else add.reshape(*spatial.shape[:-1], add.shape[-1])
        y = conv(spatial, w, window, scale=scale, add=add, bias=bias, out=out)
        return y.reshape(*x.shape[:-1], y.shape[-1])
    if out is None:
        out = cupy.empty((*x.shape[:-1], w.shape[2] * (groups if window.shared else 1)), x.dtype)
    if out.size:
        x, add, to = (_matrices(a, window) for a in (x, add, out))
        gemm(x, _columns(w, window), scale=scale, add=add, bias=bias, out=to)
    return out


def pointwise_dx(g, w, window: Window, *, scale, add, out=None):
    """add + scale * g @ w^T.  out: as above."""
    import cupy

    if out is None:
        out = cupy.empty((*g.shape[:-1], w.shape[1] * window.groups), g.dtype)
    g, add, to = (_matrices(a, window) for a in (g, add, out))
    gemm(g, _columns(w, window), transpose_b=True, scale=scale, add=add, out=to)
    return out


def pointwise_dw(x, g, window: Window, *, scale):
    """scale * x^T @ g, (1, in, columns), wide."""
    import cupy

    columns = g.shape[-1] // (window.groups if window.shared else 1)
    shape = (1, x.shape[-1] // window.groups, columns)
    x, g = _matrices(x, window), _matrices(g, window)
    made = thin_outers(Outer(x, g, scale)) if x.ndim == 2 else None
    if made is not None:
        return made[0]
    out = cupy.empty(shape, wide_dtype(x.dtype))
    gemm(x, g, transpose_a=True, scale=scale, out=_columns(out, window))
    return out


def _fuses_bias(*arrays) -> bool:
    # cuBLASLt's epilogue adds the bias before the rounding only in kernels that move 16 bytes at a
    # time: with rows of 24 bytes (K = 12, N = 20; cuBLASLt 13.1, H200) the product was rounded
    # first and the bias added to that.
    return all(a is None or (a.shape[-1] % 8 == 0 and a.data.ptr % 16 == 0) for a in arrays)


def _matrices(x, window: Window):
    """(..., groups * c) as views: (P, c), (P * groups, c) for shared groups, (groups, P, c)
    otherwise.
    """
    if x is None:
        return None
    positions, channels = prod(x.shape[:-1]), x.shape[-1] // window.groups
    if window.groups == 1 or window.shared:
        return x.reshape(positions * window.groups, channels)
    return x.reshape(positions, window.groups, channels).transpose(1, 0, 2)


def _columns(w, window: Window):
    """(1, in, columns) as views: (in, columns), or (groups, in, out) when groups have their own
    columns.
    """
    if window.groups == 1 or window.shared:
        return w[0]
    return w[0].reshape(w.shape[1], window.groups, w.shape[2] // window.groups).transpose(1, 0, 2)
