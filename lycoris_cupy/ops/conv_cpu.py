"""The windowed product on NumPy: patches are gathered a few rows at a time and given to BLAS as one
matrix product.

Weights are (taps, in, columns) as everywhere; x is (N, *space, C), or (P, C) for a pointwise
window, whose positions are rows. All results are wide (f32; f64 for f64).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod

import numpy as np

from ..arrays import wide
from .window import Window

# Columns of one chunk: large enough for BLAS to reach its speed, small enough to stay in the last
# cache level and to be served from memory that is mapped already (16 MiB chunks took 1.6 times as
# long in a training step, in page faults).
CHUNK_BYTES = 4 << 20


def conv(x: np.ndarray, w: np.ndarray, window: Window) -> np.ndarray:
    """y[n, o, (q, j)] = sum over taps t and inputs i of x[n, o * stride - padding + t * dilation,
    (q, i)] * w[t, i, (q, j)].
    """
    w = wide(w)
    columns = w.shape[2] * (window.groups if window.shared else 1)
    if x.ndim == 2:
        y = np.matmul(_grouped(wide(x), window), _weight(w, window))
        return _ungrouped(y, window).reshape(x.shape[0], columns)
    patches = _patches(_padded(wide(x), window), window)
    y = np.zeros((*patches.shape[: 1 + window.axes], columns), w.dtype)
    for rows in _chunks(patches):
        block = _grouped(patches[rows], window)
        y[rows] = _ungrouped(np.matmul(block, _weight(w, window)), window).reshape(y[rows].shape)
    return y


def conv_dx(g: np.ndarray, w: np.ndarray, window: Window, in_space: tuple[int, ...]) -> np.ndarray:
    """The gradient of conv for x: each output adds g times its taps' weights to the positions it
    read.
    """
    g, w = wide(g), wide(w)
    inputs = w.shape[1] * window.groups
    turned = _weight(w, window).swapaxes(-1, -2)
    if g.ndim == 2:
        block = _ungrouped_taps(np.matmul(_cotangent(g, window), turned), window, w.shape[1])
        return np.ascontiguousarray(block).reshape(g.shape[0], inputs)
    turned_around = _turned_around(w, window)
    if turned_around is not None:
        return conv(g, *turned_around)
    space = tuple(n + 2 * p for n, p in zip(in_space, window.padding, strict=True))
    padded = np.zeros((g.shape[0], *space, inputs), w.dtype)
    # A writable view with the patches' axes; adding tap by tap never writes one place twice in one
    # statement.
    patches = _patches(padded, window, writable=True)
    for rows in _chunks(patches):
        d = _ungrouped_taps(np.matmul(_cotangent(g[rows], window), turned), window, w.shape[1])
        target = patches[rows]
        d = d.reshape(target.shape)
        for tap in np.ndindex(*window.kernel):
            at = (Ellipsis, *tap, slice(None))
            target[at] += d[at]
    inner = tuple(slice(p, p + n) for p, n in zip(window.padding, in_space, strict=True))
    return np.ascontiguousarray(padded[(slice(None), *inner)])


def _turned_around(w: np.ndarray, window: Window) -> tuple[np.ndarray, Window] | None:
    """(weight, window) with which conv gives conv_dx, where that is cheaper: it gathers from g.

    A dense convolution of stride 1 with no more outputs than inputs: its taps in reverse order, and
    the padding that is left of the kernel's reach.
    """
    reach = [d * (k - 1) for d, k in zip(window.dilation, window.kernel, strict=True)]
    padding = tuple(r - p for r, p in zip(reach, window.padding, strict=True))
    dense = window.groups == 1 and all(s == 1 for s in window.stride)
    if not dense or w.shape[2] > w.shape[1] or min(padding) < 0:
        return None
    flipped = np.ascontiguousarray(w[::-1].swapaxes(1, 2))
    return flipped, replace(window, padding=padding)


def conv_dw(x: np.ndarray, g: np.ndarray, window: Window) -> np.ndarray:
    """The gradient of conv for w: sum over positions of patch^T @ g, (taps, in, columns)."""
    x, g = wide(x), wide(g)
    patches = x if x.ndim == 2 else _patches(_padded(x, window), window)
    inputs, groups = x.shape[-1] // window.groups, window.groups
    outputs = g.shape[-1] // groups
    single = groups == 1 or window.shared
    dw = np.zeros(
        (window.taps * inputs, outputs) if single else (groups, window.taps * inputs, outputs),
        x.dtype,
    )
    for rows in _chunks(patches):
        block = _grouped(patches[rows], window)
        dw += np.matmul(block.swapaxes(-1, -2), _cotangent(g[rows], window))
    if single:
        return dw.reshape(window.taps, inputs, outputs)
    dw = dw.reshape(groups, window.taps, inputs, outputs).transpose(1, 2, 0, 3)
    return np.ascontiguousarray(dw).reshape(window.taps, inputs, groups * outputs)


def _padded(x: np.ndarray, window: Window) -> np.ndarray:
    if not any(window.padding):
        return x
    return np.pad(x, [(0, 0), *((p, p) for p in window.padding), (0, 0)])


def _patches(padded: np.ndarray, window: Window, writable: bool = False) -> np.ndarray:
    """A view (N, *out, *kernel, C) of the padded input (N, *space, C)."""
    reach = tuple(d * (k - 1) + 1 for d, k in zip(window.dilation, window.kernel, strict=True))
    axes = tuple(range(1, 1 + window.axes))
    view = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=axes, writeable=writable)
    steps = tuple(slice(None, None, s) for s in window.stride)
    jumps = tuple(slice(None, None, d) for d in window.dilation)
    return np.moveaxis(view[(slice(None), *steps, slice(None), *jumps)], 1 + window.axes, -1)


def _chunks(patches: np.ndarray) -> Iterator[tuple]:
    """Index tuples over the first two axes whose patches fit CHUNK_BYTES."""
    if patches.size == 0:
        return
    if patches.ndim == 2:  # rows, read in place
        yield (slice(None),)
        return
    whole = patches[0, 0].nbytes
    rows = max(CHUNK_BYTES // max(whole, 1), 1)
    if rows >= patches.shape[1]:
        step = max(rows // patches.shape[1], 1)
        yield from ((slice(n, n + step),) for n in range(0, patches.shape[0], step))
    else:
        for n in range(patches.shape[0]):
            yield from (
                (slice(n, n + 1), slice(r, r + rows)) for r in range(0, patches.shape[1], rows)
            )


def _grouped(patches: np.ndarray, window: Window) -> np.ndarray:
    """Patches as matrices: (P, taps * C) for one group, (P * groups, taps * in) shared, else
    (groups, P, taps * in).
    """
    *lead, channels = patches.shape
    positions, inputs = prod(lead) // window.taps, channels // window.groups
    if window.groups == 1:
        return patches.reshape(positions, window.taps * inputs)
    split = patches.reshape(positions, window.taps, window.groups, inputs)
    if window.shared:
        return split.transpose(0, 2, 1, 3).reshape(positions * window.groups, window.taps * inputs)
    return split.transpose(2, 0, 1, 3).reshape(window.groups, positions, window.taps * inputs)


def _cotangent(g: np.ndarray, window: Window) -> np.ndarray:
    """g as (P, columns), (P * groups, out) shared, or (groups, P, out): the rows of _grouped."""
    positions, outputs = prod(g.shape[:-1]), g.shape[-1] // window.groups
    if window.shared or window.groups == 1:
        return g.reshape(positions * window.groups, outputs)
    return g.reshape(positions, window.groups, outputs).swapaxes(0, 1)


def _ungrouped(block: np.ndarray, window: Window) -> np.ndarray:
    return block if block.ndim == 2 else block.swapaxes(0, 1)


def _ungrouped_taps(block: np.ndarray, window: Window, inputs: int) -> np.ndarray:
    """The inverse of _grouped: (P, taps, groups * in)."""
    if window.groups == 1:
        return block
    if window.shared:
        split = (block.shape[0] // window.groups, window.groups, window.taps, inputs)
        return block.reshape(split).transpose(0, 2, 1, 3)
    return block.reshape(window.groups, block.shape[1], window.taps, inputs).transpose(1, 2, 0, 3)


def _weight(w: np.ndarray, window: Window) -> np.ndarray:
    """w as (taps * in, columns), or (groups, taps * in, out) when groups have their own columns."""
    taps, inputs, columns = w.shape
    if window.groups == 1 or window.shared:
        return w.reshape(taps * inputs, columns)
    outputs = columns // window.groups
    split = w.reshape(taps, inputs, window.groups, outputs).transpose(2, 0, 1, 3)
    return split.reshape(window.groups, taps * inputs, outputs)
