"""The gradients of a LoKr with a factored w2 beside a layer, where one launch makes both factors'
(`thin_outer_gpu`).

    y = scale * z * up,  z = mix_blocks(inner, w1),  inner = x * down

    dz = scale * g @ up^T         dinner = mix_blocks(dz, w1^T)
    dup = scale * z^T @ g         ddown = x^T @ dinner

All rows are blocks of positions. For few positions see `few_mixed_gpu`.
"""

from __future__ import annotations

from ..arrays import Array
from . import product_gpu
from .conv_gpu import processors
from .extended_gpu import takes
from .kron import mix_gradients
from .product import in_space_of
from .thin_outer_gpu import Outer, plan_thin_outers, thin_outers
from .window import Window


def mixed_back(
    g, z, up, other: Window, scale, inner, w1, x, down, window: Window
) -> tuple[Array, Array, Array, Array] | None:
    """(dinner as inner, dw1, dup, ddown), by the gradient g of y; None where launches of their own
    are estimated to be better, or all there is.

    g: (..., L * K). z: (..., L * R). up: (1, R, K), shared by the L groups of other.
    inner: (..., M * R). w1: (L, M). x: (..., M * C). down: (1, C, R), shared by the M groups of
    window. scale: (1,) f32, or None for 1.
    """
    if not all(v.pointwise and v.shared for v in (window, other)) or w1.shape[0] != w1.shape[1]:
        return None
    of_down, of_up = down.shape[1:], up.shape[1:]
    rows = g.size // of_up[1]
    planned = plan_thin_outers(rows, (of_down, of_up), processors())
    if planned is None or not planned.better or not takes(g, z, up, inner, x, down):
        return None
    dz = product_gpu.dx(g, up, other, in_space_of(z, other), scale=scale, add=None)
    dinner, dw1 = mix_gradients(dz, inner, w1)
    sides = (x, of_down[0]), (dinner, of_down[1]), (z, of_up[0]), (g, of_up[1])
    a, b, c, d = (array.reshape(rows, n) for array, n in sides)
    ddown, dup = thin_outers(Outer(a, b), Outer(c, d, scale))
    return dinner, dw1, dup, ddown
