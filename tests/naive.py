"""The operations once more, written from their definitions with loops and einsum in f64: what the
package is held against.
"""

import itertools

import numpy as np


def taps_of(window):
    return list(itertools.product(*(range(k) for k in window.kernel)))


def gathered(x, window):
    """(taps, N, *out, C): what each tap sees, zero outside. Plain index arithmetic, one position at
    a time per axis.
    """
    space = x.shape[1 : 1 + window.axes]
    out = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(
            space, window.kernel, window.stride, window.padding, window.dilation, strict=True
        )
    ]
    seen = np.zeros((window.taps, x.shape[0], *out, x.shape[-1]))
    for t, position, source in _walk(window, space, out):
        seen[(t, slice(None), *position)] = x[(slice(None), *source)]
    return seen


def scattered(seen, window, space):
    """The adjoint of gathered: add what each tap holds to the position it saw."""
    x = np.zeros((seen.shape[1], *space, seen.shape[-1]))
    for t, position, source in _walk(window, space, seen.shape[2 : 2 + window.axes]):
        x[(slice(None), *source)] += seen[(t, slice(None), *position)]
    return x


def _walk(window, space, out):
    """(tap, position in out, position in space that it sees), where that is inside."""
    for t, tap in enumerate(taps_of(window)):
        for position in itertools.product(*(range(o) for o in out)):
            source = [
                o * s - p + k * d
                for o, s, p, k, d in zip(
                    position, window.stride, window.padding, tap, window.dilation, strict=True
                )
            ]
            if all(0 <= c < n for c, n in zip(source, space, strict=True)):
                yield t, position, source


def grouped_weight(w, window):
    """(taps, in, columns) as (groups, taps, in, out)."""
    taps, inputs, columns = w.shape
    if window.shared:
        return np.broadcast_to(w, (window.groups, taps, inputs, columns))
    return w.reshape(taps, inputs, window.groups, columns // window.groups).transpose(2, 0, 1, 3)


def product(x, w, window):
    if not window.axes:
        seen = x[None]
        lead = x.shape[:-1]
    else:
        seen = gathered(x, window)
        lead = seen.shape[1:-1]
    seen = seen.reshape(window.taps, int(np.prod(lead)), window.groups, w.shape[1])
    y = np.einsum("tpgi,gtio->pgo", seen, grouped_weight(w, window))
    return y.reshape(*lead, y.shape[1] * y.shape[2])


def product_dx(g, w, window, space):
    rows = g.reshape(int(np.prod(g.shape[:-1])), window.groups, g.shape[-1] // window.groups)
    seen = np.einsum("pgo,gtio->tpgi", rows, grouped_weight(w, window))
    channels = window.groups * w.shape[1]
    if not window.axes:
        return seen.reshape(*g.shape[:-1], channels)
    return scattered(seen.reshape(window.taps, *g.shape[:-1], channels), window, space)


def product_dw(x, g, window):
    seen = gathered(x, window) if window.axes else x[None]
    inputs = x.shape[-1] // window.groups
    positions = int(np.prod(g.shape[:-1]))
    seen = seen.reshape(window.taps, positions, window.groups, inputs)
    rows = g.reshape(positions, window.groups, g.shape[-1] // window.groups)
    if window.shared:
        return np.einsum("tpgi,pgo->tio", seen, rows)
    return np.einsum("tpgi,pgo->tigo", seen, rows).reshape(window.taps, inputs, g.shape[-1])


def kron(w1, w2):
    return np.stack([np.kron(w1.T, tap) for tap in w2])


def mix(x, w1):
    n = x.shape[-1] // w1.shape[1]
    blocks = x.reshape(*x.shape[:-1], w1.shape[1], n)
    return np.einsum("lm,...mn->...ln", w1, blocks).reshape(*x.shape[:-1], w1.shape[0] * n)
