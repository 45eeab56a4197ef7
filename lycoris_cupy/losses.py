"""Losses for training steps: each is loss(y, target, ...) -> (value, dy), as `Engine.capture_step`
and `train.fit` take it. dy is the gradient of the value for y, in the dtype of y.

The value is an array without axes on the device of y, in the wide dtype. Sums are wide and made in
a fixed order, nothing is read back. To set an option: functools.partial(charbonnier, eps=1e-6).
"""

from __future__ import annotations

from math import prod

import numpy as np

from .arrays import Array, like, on_gpu, require_float, wide, wide_dtype
from .errors import DeviceError, DtypeError, LycorisError, ShapeError
from .kernels import kernel
from .ops.embedding import require_indices

Loss = tuple[Array, Array]  # the value, dy
_PIECE = 1 << 20  # logits at a time on the CPU: 4 MiB in f32


def mse(y: Array, target: Array, weights: Array | None = None) -> Loss:
    """The mean of (y - target)^2 over all elements.

    target: like y, or in the wide dtype. weights: (N,), what the elements of each sample, along the
    first axis, are multiplied by; they do not change what the sum is divided by. Raises ShapeError,
    DtypeError.
    """
    return _difference("square", y, target, weights, 0.0)


def l1(y: Array, target: Array, weights: Array | None = None) -> Loss:
    """The mean of |y - target| over all elements; its slope is 0 where they are equal. See mse."""
    return _difference("absolute", y, target, weights, 0.0)


def charbonnier(y: Array, target: Array, weights: Array | None = None, *, eps=1e-3) -> Loss:
    """The mean of sqrt((y - target)^2 + eps^2) over all elements: the absolute difference, rounded
    off within eps.  Lai et al. 2017, arXiv 1704.03915. See mse.
    """
    if not eps > 0:
        raise LycorisError(f"charbonnier: eps is {eps!r}, expected a number above 0 (l1 has none)")
    return _difference("charbonnier", y, target, weights, float(eps))


def cross_entropy(
    y: Array,
    target: Array,
    weights: Array | None = None,
    *,
    ignore: int = -100,
    smoothing: float = 0.0,
) -> Loss:
    """The mean over positions of -log softmax(y)[target].

    y: (N, ..., classes), logits. target: (N, ...), whole numbers; positions whose target is
    `ignore` are left out, also from the count that the sum is divided by, and with all of them left
    out value and dy are 0. smoothing: this share of each target is spread evenly over all classes
    (Szegedy et al. 2015, arXiv 1512.00567). weights: (N,), a factor a sample.

    A target that is no class: on the CPU a ShapeError; on a GPU, where no value is read back, value
    and row are NaN. Raises ShapeError, DtypeError.
    """
    require_float(y, "y")
    if y.ndim < 2 or tuple(target.shape) != tuple(y.shape[:-1]):
        raise ShapeError(
            f"target has shape {tuple(target.shape)}, expected {tuple(y.shape[:-1])} for y of "
            f"shape {tuple(y.shape)}: (N, ..., classes), and a class a position"
        )
    if not 0 <= smoothing <= 1:
        raise LycorisError(f"cross_entropy: smoothing is {smoothing}, expected 0 to 1")
    target = require_indices(target, "target", y)
    weights = _checked_weights(weights, y)
    run = _cross_entropy_gpu if on_gpu(y) else _cross_entropy_cpu
    return run(y, target, weights, int(ignore), float(smoothing))


def _checked_weights(weights, y):
    if weights is None:
        return None
    if y.ndim < 1 or tuple(weights.shape) != (y.shape[0],):
        raise ShapeError(
            f"weights have shape {tuple(weights.shape)}, expected ({y.shape[0] if y.ndim else 1},):"
            " one a sample"
        )
    _require_beside(weights, y, "weights")
    return weights.astype(wide_dtype(y.dtype), copy=False)


def _require_beside(array, y, name):
    require_float(array, name)
    if on_gpu(array) != on_gpu(y):
        raise DeviceError(f"{name} and y lie on different devices: move one with to_device")


def _difference(kind, y, target, weights, eps) -> Loss:
    require_float(y, "y")
    _require_beside(target, y, "target")
    if tuple(target.shape) != tuple(y.shape):
        raise ShapeError(
            f"target has shape {tuple(target.shape)}, expected that of y, {tuple(y.shape)}"
        )
    if target.dtype not in (y.dtype, wide_dtype(y.dtype)):
        raise DtypeError(
            f"target is {target.dtype}, expected {y.dtype} or {wide_dtype(y.dtype)} beside it"
        )
    weights = _checked_weights(weights, y)
    return (_difference_gpu if on_gpu(y) else _difference_cpu)(kind, y, target, weights, eps)


_CPU = {
    "square": (lambda d, eps: d * d, lambda d, eps: 2 * d),
    "absolute": (lambda d, eps: np.abs(d), lambda d, eps: np.sign(d)),
    "charbonnier": (
        lambda d, eps: np.sqrt(d * d + eps * eps),
        lambda d, eps: d / np.sqrt(d * d + eps * eps),
    ),
}


def _difference_cpu(kind, y, target, weights, eps) -> Loss:
    value, slope = _CPU[kind]
    d = wide(y) - wide(target)
    eps, share = d.dtype.type(eps), d.dtype.type(1 / max(d.size, 1))
    if weights is not None:
        share = (weights * share).reshape(-1, *[1] * (y.ndim - 1))
    return np.asarray((value(d, eps) * share).sum()), like(slope(d, eps) * share, y)


def _difference_gpu(kind, y, target, weights, eps) -> Loss:
    import cupy

    kept = wide_dtype(y.dtype)
    if not y.size:
        return cupy.zeros((), kept), cupy.empty(y.shape, y.dtype)
    y, target = cupy.ascontiguousarray(y), cupy.ascontiguousarray(target)
    dy, value = cupy.empty(y.shape, y.dtype), cupy.empty((), kept)
    partial = cupy.empty((min((y.size + 2047) // 2048, 1024),), kept)  # 8 elements a thread
    given = (target, None) if target.dtype == y.dtype else (None, target)
    kernel("losses.cu", kind, y.dtype)(
        partial.shape, (256,), y, *given, weights, dy, partial, eps, 1 / y.size, y.size,
        y.size // (y.shape[0] if y.ndim else 1),
    )  # fmt: skip
    kernel("losses.cu", "total", y.dtype)((1,), (1024,), partial, value, partial.size)
    return value, dy


def _cross_entropy_cpu(y, target, weights, ignore, smoothing) -> Loss:
    classes, labels = y.shape[-1], target.reshape(-1)
    counted = labels != ignore
    seen = labels[counted]
    if seen.size and not 0 <= seen.min() <= seen.max() < classes:
        raise ShapeError(
            f"target reaches from {seen.min()} to {seen.max()}, expected 0 to {classes - 1}, or "
            f"{ignore} where a position is left out"
        )
    kept = wide_dtype(y.dtype).type
    rows, dy = y.reshape(labels.size, classes), np.empty((labels.size, classes), y.dtype)
    share = counted * kept(1 / max(seen.size, 1))
    if weights is not None:
        share = share * np.repeat(weights, labels.size // max(y.shape[0], 1))
    even, own, losses = kept(smoothing / max(classes, 1)), kept(1 - smoothing), np.zeros_like(share)
    labels = np.where(counted, labels, 0)
    step = max(_PIECE // max(classes, 1), 1)
    for first in range(0, labels.size if classes else 0, step):
        part = slice(first, first + step)
        scores = np.array(wide(rows[part]))
        scores -= scores.max(axis=1, keepdims=True)
        at = (np.arange(scores.shape[0]), labels[part])
        losses[part] = -own * scores[at] - even * scores.sum(axis=1)
        np.exp(scores, out=scores)
        total = scores.sum(axis=1, keepdims=True)
        losses[part] += np.log(total[:, 0])
        scores /= total
        scores -= even
        scores[at] -= own
        scores *= share[part, None]
        dy[part] = like(scores, y)
    return np.asarray((losses * share).sum()), dy.reshape(y.shape)


def _cross_entropy_gpu(y, target, weights, ignore, smoothing) -> Loss:
    import cupy

    kept, rows = wide_dtype(y.dtype), prod(y.shape[:-1])
    if not y.size:
        return cupy.zeros((), kept), cupy.empty(y.shape, y.dtype)
    y, dy = cupy.ascontiguousarray(y), cupy.empty(y.shape, y.dtype)
    share, losses, value = cupy.empty((1,), kept), cupy.empty((rows,), kept), cupy.empty((), kept)
    kernel("losses.cu", "counted_share", y.dtype)((1,), (1024,), target, share, rows, ignore)
    kernel("losses.cu", "cross_entropy", y.dtype)(
        (rows,), (256 if y.shape[-1] > 256 else 32,), y, target, weights, share, dy, losses,
        smoothing, y.shape[-1], ignore, rows // y.shape[0],
    )  # fmt: skip
    kernel("losses.cu", "total", y.dtype)((1,), (1024,), losses, value, rows)
    return value, dy
