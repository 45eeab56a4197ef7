"""kron_product: x times the Kronecker product of w1 and w2, the change of a LoKr, without building
it or mixing x.

    y[p, l * K + k] = add + scale * sum over m of w1[l, m] * sum over t, n of x[p + t, m * N + n] *
                      w2[t, n, k]

w2 on every block of channels and the mix by w1 behind it, in one kernel that reads x once (see
`kron_gpu`). The other way is `mix_blocks` first, and then a product whose groups share w2, which
waits to be part of the layer's own. That one has the larger share of its work on the fastest units,
this one moves less: it wins where blocks are narrow.

Yeh et al. 2023, "Navigating Text-To-Image Customization", arXiv 2309.14859.
"""

from __future__ import annotations

import numpy as np

from ..arrays import Array, on_gpu, wide
from ..tape import Fresh, Primitive, value_of
from . import kron_gpu, product_gpu
from .columns import rows_of
from .kron import _mix_blocks, _mix_blocks_dw1, mix_gradients
from .product import finished, in_space_of, product_dw, product_dx, wide_product
from .window import Window


def kron_product(
    x: Array, w1: Array, w2: Array, window: Window, *, add: Array | None, scale: Array | None
) -> Array:
    """add + scale[0] * (x * kron_weight(w1, w2)), where `in_one_piece` says so.

    x: (..., M * N). w1: (L, M), w2: (taps, N, K), of the dtype of x. window: without groups. add:
    (..., L * K) or None. scale: (1,) wide, a constant of the tape, or None for 1.
    """
    return _kron_product(x, w1, w2, add, scale, window=window)


def in_one_piece(x: Array, w1: Array, w2: tuple[int, int, int], window: Window) -> bool:
    """Whether kron_product is one kernel here, and faster than mixing first, for a w2 of this
    shape.
    """
    x = value_of(x)
    return on_gpu(x) and kron_gpu.prefers(x, value_of(w1), w2, window)


def _cpu(x, w1, w2, add, scale, *, window):
    rows, columns = w1.shape
    parts = wide_product(x, w2, window.grouped(columns, shared=True))
    mixed = np.matmul(wide(w1), rows_of(parts).reshape(-1, columns, w2.shape[2]))
    return finished(mixed.reshape(*parts.shape[:-1], rows * w2.shape[2]), scale, add, None, x)


def _gpu(x, w1, w2, add, scale, *, window):
    if kron_gpu.takes(x, w1, tuple(w2.shape), window, w2, add):
        return kron_gpu.kron_conv(x, w1, w2, window, scale=scale, add=add)
    blocked = window.grouped(w1.shape[0], shared=True)
    mixed = _mix_blocks(x, w1, turned=False)
    return product_gpu.forward(mixed, w2, blocked, scale=scale, add=add, bias=None)


def _vjp(needs, out, x, w1, w2, add, scale, *, window):
    """The gradients of x and w1 come from one kernel, so that of x does not wait for others. That
    of w2 is made before them: what it takes for a moment is gone when that of x is there.
    """
    in_space, (rows, columns) = in_space_of(x, window), w1.shape
    blocked = window.grouped(rows, shared=True)

    def pull(g):
        dx = dw1 = dw2 = None
        one = on_gpu(g) and kron_gpu.takes(x, w1, tuple(w2.shape), window, w2, g)
        if needs[2] and one:
            dw2 = kron_gpu.kron_conv_dw(x, g, w1, w2, window, scale=scale)
        elif needs[2]:
            dw2 = product_dw(_mix_blocks(x, w1, turned=False), g, blocked, scale=scale)
        if one and any(needs[:2]):
            dx, dw1 = kron_gpu.kron_gradients(
                g, x, w1, w2, window, in_space, scale=scale, both=needs[1]
            )
        elif any(needs[:2]):
            flow = product_dx(g, w2, blocked, in_space, scale=scale)
            if all(needs[:2]):
                dx, dw1 = mix_gradients(flow, x, w1)
            elif needs[0]:
                dx = _mix_blocks(flow, w1, turned=True)
            else:
                dw1 = _mix_blocks_dw1(flow, x, rows=rows, columns=columns)
        return Fresh(dx) if needs[0] else None, dw1, dw2, g if needs[3] else None, None

    return pull


_kron_product = Primitive("kron_product", _cpu, _gpu, _vjp)
