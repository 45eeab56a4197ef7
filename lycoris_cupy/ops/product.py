"""product: the one operation that every layer and every adapter is made of, and its two gradients.

    y = add + scale * (x * w) + bias

where x * w is a matrix product (linear) or a convolution over one to three axes, dense, grouped or
with shared groups. The three primitives are closed under differentiation: each one's gradients are
the other two.
"""

from __future__ import annotations

from ..arrays import Array, like, on_gpu, require_float, require_same, wide_dtype
from ..errors import LycorisError, ShapeError
from ..tape import Deferred, Primitive, Var, value_of
from . import conv_cpu, product_gpu
from .columns import column_sum, rows_of
from .elementwise import cast, require_factor
from .few_gpu import few_gradients
from .shapes import reshape
from .thin_gpu import pays, thin_gradients
from .window import Window

LINEAR = Window()


def product(
    x: Array,
    w: Array,
    window: Window = LINEAR,
    *,
    bias: Array | None = None,
    add: Array | None = None,
    scale: Array | None = None,
    spend: bool = False,
) -> Array:
    """add + scale[0] * (x * w) + bias, summed wide, rounded once.

    x: (..., IN) linear, (N, *space, C) convolution; C = groups * IN. w: (taps, IN, OUT), or
    (taps, IN, groups * OUT) when groups have their own columns (a window with `shared` gives all
    groups the same); a wide w is rounded to the dtype of x. bias: (columns,). add: the output's
    shape. scale: (1,) wide, a constant of the tape. spend: add is read nowhere else, and may be
    where the result is written. Returns (..., columns) in the dtype of x. Raises ShapeError,
    DtypeError.
    """
    require_float(value_of(x), "x")
    if w.dtype != x.dtype and w.dtype == wide_dtype(x.dtype):
        w = cast(w, x.dtype)
    require_same("x", value_of(x), "w", value_of(w))
    shape = out_shape(x.shape, w.shape, window)
    if isinstance(scale, Var):
        raise LycorisError("product: scale is a constant of the tape; watch a factor of w instead")
    if scale is not None:
        require_factor(scale, x)
    for name, array, expected in (("bias", bias, shape[-1:]), ("add", add, shape)):
        if array is not None:
            require_same("x", value_of(x), name, value_of(array))
            if tuple(array.shape) != expected:
                raise ShapeError(f"{name} has shape {tuple(array.shape)}, expected {expected}")
    return _product(x, w, bias, add, scale, window=window, spend=spend)


def convolution(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
) -> Array:
    """Convolution over one to three axes, channels last; dense, grouped or depthwise.

    x: (N, *space, IC). weight: (*kernel, IC / groups, OC), Flame layout. bias: (OC,) or None.
    stride, padding, dilation: a number, or one an axis; padding also 'same' or 'valid'. Returns
    (N, *out, OC) in the dtype of x, summed wide, rounded once. Cross-correlation, as everywhere.
    Raises ShapeError, DtypeError.
    """
    if not 3 <= weight.ndim <= 5:
        raise ShapeError(f"weight has shape {tuple(weight.shape)}, expected (*kernel, IN, OUT)")
    window = Window.of(weight.shape[:-2], stride, padding, dilation, groups)
    matrix = reshape(weight, (window.taps, *weight.shape[-2:]))
    return product(x, matrix, window, bias=bias)


def out_shape(x: tuple[int, ...], w: tuple[int, ...], window: Window) -> tuple[int, ...]:
    """The shape of x * w, after checking that both fit the window."""
    if len(w) != 3 or w[0] != window.taps:
        raise ShapeError(
            f"w has shape {tuple(w)}, expected (taps, in, out) with {window.taps} taps for {window}"
        )
    if window.axes and len(x) != window.axes + 2:
        raise ShapeError(f"x has shape {tuple(x)}, expected (N, {window.axes} spatial axes, C)")
    if len(x) < 1 or x[-1] != w[1] * window.groups:
        expected = w[1] * window.groups
        raise ShapeError(
            f"x has shape {tuple(x)}, expected {expected} channels in the last axis ({w[1]} x "
            f"{window.groups} groups)"
        )
    if not window.shared and w[2] % window.groups:
        raise ShapeError(f"w has {w[2]} columns, expected a multiple of the {window.groups} groups")
    columns = w[2] * (window.groups if window.shared else 1)
    if not window.axes:
        return (*x[:-1], columns)
    return (x[0], *window.out_space(x[1:-1]), columns)


def product_dx(
    g: Array,
    w: Array,
    window: Window,
    in_space: tuple[int, ...],
    *,
    add: Array | None = None,
    scale: Array | None = None,
) -> Array:
    """add + scale[0] * the gradient of <g, x * w> for x, (N, *in_space, C) in the dtype of g,
    rounded once.

    For a linear product that is add + scale[0] * g @ w^T, and in_space is not looked at.
    """
    return _product_dx(g, w, add, scale, window=window, in_space=tuple(in_space))


def product_dw(x: Array, g: Array, window: Window, *, scale: Array | None = None) -> Array:
    """scale[0] * the gradient of <g, x * w> for w, (taps, in, columns), wide. For a linear product:
    x^T @ g.
    """
    return _product_dw(x, g, scale, window=window)


def finished(total, scale, add, bias, x):
    """The wide sum, which is written over, with all that is added to it, rounded once. CPU."""
    if scale is not None:
        total *= scale
    for more in (add, bias):
        if more is not None:
            total += more.astype(total.dtype, copy=False)
    return like(total, x)


def wide_product(x, w, window):
    total = conv_cpu.conv(rows_of(x) if window.pointwise else x, w, window)
    return total.reshape(out_shape(x.shape, w.shape, window))


# On the CPU there is nothing to gain from writing into add: the wide sum is an array of its own.
def _product_cpu(x, w, bias, add, scale, *, window, spend=False):
    return finished(wide_product(x, w, window), scale, add, bias, x)


def _product_gpu(x, w, bias, add, scale, *, window, spend=False):
    return product_gpu.forward(x, w, window, scale=scale, add=add, bias=bias, spend=spend)


def in_space_of(x, window):
    return x.shape[1:-1] if window.axes else x.shape[:-1]


def _product_vjp(needs, out, x, w, bias, add, scale, *, window, spend=False):
    in_space = in_space_of(x, window)
    x, w = (x if needs[1] else None), (w if needs[0] else None)

    def pull(g):
        return (
            *product_gradients(g, x, w, scale, window, in_space),
            column_sum(g) if needs[2] else None,
            g if needs[3] else None,
            None,
        )

    return pull


_product = Primitive("product", _product_cpu, _product_gpu, _product_vjp)


def product_gradients(g, x, w, scale, window, in_space):
    """The gradients of a product's x and w; None for that of x without w, of w without x."""
    if x is not None and w is not None and on_gpu(g):
        thin = thin_gradients(g, x, w, window, scale) if pays(g, w) else None
        if thin is not None:
            return thin.dx, thin.dw
        few = few_gradients(g, x, w, window, scale)
        if few is not None:
            return few
    return (
        None if w is None else deferred_dx(g, w, scale, window, in_space),
        None if x is None else _product_dw(x, g, scale, window=window),
    )


def deferred_dx(g, w, scale, window, in_space) -> Deferred:
    """The gradient of a product's x, which waits for other contributions to add to it."""

    def run(add, term, spend):
        if term is None:
            return _product_dx(g, w, add, scale, window=window, in_space=in_space, spend=spend)
        if on_gpu(g):
            extra = product_gpu.Extra(*term)
            return product_gpu.dx(
                g, w, window, in_space, scale=None, add=add, extra=extra, spend=spend
            )
        more, more_w, more_window, more_scale = term
        total = _dx_wide(more, more_w, more_window, in_space)
        if more_scale is not None:
            total *= more_scale
        total += _dx_wide(g, w, window, in_space)
        return finished(total, None, add, None, g)

    return Deferred(run, term=(g, w, window, scale), extends=scale is None)


def _deferred_product(x, w, scale, window) -> Deferred:
    def run(add, term, spend):
        return _product(x, w, None, add, scale, window=window, spend=spend)

    return Deferred(run)


def _dx_wide(g, w, window, in_space):
    if not window.pointwise:
        return conv_cpu.conv_dx(g, w, window, in_space)
    shape = (*g.shape[:-1], w.shape[1] * window.groups)
    return conv_cpu.conv_dx(rows_of(g), w, window, ()).reshape(shape)


def _product_dx_cpu(g, w, add, scale, *, window, in_space, spend=False):
    return finished(_dx_wide(g, w, window, in_space), scale, add, None, g)


def _product_dx_gpu(g, w, add, scale, *, window, in_space, spend=False):
    return product_gpu.dx(g, w, window, in_space, scale=scale, add=add, spend=spend)


def _product_dx_vjp(needs, out, g, w, add, scale, *, window, in_space, spend=False):
    g, w = (g if needs[1] else None), (w if needs[0] else None)

    def pull(c):
        dg = _deferred_product(c, w, scale, window)
        dw = _product_dw(c, g, scale, window=window) if needs[1] else None
        return dg if needs[0] else None, dw, c if needs[2] else None, None

    return pull


_product_dx = Primitive("product_dx", _product_dx_cpu, _product_dx_gpu, _product_dx_vjp)


def _product_dw_cpu(x, g, scale, *, window):
    dw = conv_cpu.conv_dw(*((rows_of(x), rows_of(g)) if window.pointwise else (x, g)), window)
    return dw if scale is None else dw * scale


def _product_dw_gpu(x, g, scale, *, window):
    return product_gpu.dw(x, g, window, scale=scale)


def _product_dw_vjp(needs, out, x, g, scale, *, window):
    in_space, dtype = in_space_of(x, window), x.dtype
    x, g = (x if needs[1] else None), (g if needs[0] else None)

    def pull(c):
        c = cast(c, dtype)
        dx = None if g is None else deferred_dx(g, c, scale, window, in_space)
        dg = _deferred_product(x, c, scale, window)
        return dx, dg if needs[1] else None, None

    return pull


_product_dw = Primitive("product_dw", _product_dw_cpu, _product_dw_gpu, _product_dw_vjp)
