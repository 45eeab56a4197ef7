"""attention: scaled dot products of queries and keys, their softmax, and the values it weighs."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ..arrays import (
    Array,
    like,
    on_gpu,
    require_axes,
    require_float,
    require_same,
    wide,
    wide_dtype,
)
from ..errors import DtypeError, LycorisError, ShapeError
from ..tape import Primitive, Var, value_of
from .attention_gpu import attention_gpu, attention_pull_gpu
from .softmax import softmax_rows

_SCORES = 1 << 20  # at a time on the CPU: 4 MiB in f32


class Setting(NamedTuple):
    """What an attention is made of beside its arrays."""

    scale: float
    causal: bool


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Array | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Array:
    """softmax(scale * q @ k^T + mask) @ v over each head.  Vaswani et al. 2017, arXiv 1706.03762.

    q: (N, heads, L, D). k: (N, heads, S, D). v: (N, heads, S, E). Returns (N, heads, L, E).
    mask: broadcast to (N, heads, L, S) from axes of size 1, its last axis S: booleans, True where a
    pair takes part, or floats that are added; a constant of the tape. causal: query i sees keys 0
    to i. scale: 1 / sqrt(D) by default. A query that sees no key gives 0.

    Softmax and sums are wide. No array of L x S is kept; on a GPU none is made in bf16 where
    D = E is a multiple of 8 up to 128 (the probabilities then meet the values in bf16), other
    heads go through batched products. Raises ShapeError, DtypeError.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        require_float(value_of(x), name)
        require_axes(x, 4, name, "(N, heads, length, width)")
        require_same("q", value_of(q), name, value_of(x))
    (n, heads, queries, width), keys = q.shape, k.shape[2]
    for name, x, expected in (
        ("k", k, (n, heads, keys, width)),
        ("v", v, (n, heads, keys, v.shape[-1])),
    ):
        if tuple(x.shape) != expected:
            raise ShapeError(
                f"{name} has shape {tuple(x.shape)}, expected {expected} beside q of shape "
                f"{tuple(q.shape)}"
            )
    if mask is not None:
        mask = _checked_mask(mask, (n, heads, queries, keys), value_of(q))
    if scale is None:
        scale = 1 / math.sqrt(width) if width else 1.0
    # The forward leaves here what the gradient needs of it beside its result.
    kept: dict[str, Array] = {}
    return _attention(q, k, v, mask, setting=Setting(float(scale), bool(causal)), kept=kept)


def _checked_mask(mask, full, q):
    """The mask with four axes, boolean or in the wide dtype of q."""
    if isinstance(mask, Var):
        raise LycorisError("attention: mask is a constant of the tape")
    shape = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    fits = len(shape) == 4 and all(a in (1, b) for a, b in zip(shape[:3], full[:3], strict=True))
    if not fits or shape[3] != full[3]:
        raise ShapeError(
            f"mask has shape {tuple(mask.shape)}, expected {full} or 1 in place of any but the last"
        )
    if on_gpu(mask) != on_gpu(q):
        raise LycorisError("mask and q lie on different devices: move one with to_device")
    if mask.dtype != bool:
        if np.dtype(mask.dtype).kind in "iu":
            raise DtypeError(f"mask is {mask.dtype}, expected booleans, or floats that are added")
        mask = mask.astype(wide_dtype(q.dtype), copy=False)
    return mask.reshape(shape)


def _blocks(q, k):
    """Slices of (heads of all samples, queries) whose scores are a few MiB."""
    heads, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    rows = max(min(queries, _SCORES // max(keys, 1)), 1)
    together = max(_SCORES // max(rows * keys, 1), 1)
    for first in range(0, heads, together):
        for start in range(0, queries, rows):
            yield slice(first, first + together), slice(start, start + rows)


def _probabilities(q, k, mask, setting, own, rows):
    """The softmax of the scores of these heads and queries, wide. q, k: (heads, length, width)."""
    scores = np.matmul(q[own, rows], k[own].swapaxes(1, 2))
    scores *= scores.dtype.type(setting.scale)
    queries, keys = scores.shape[1:]
    if mask is not None:
        part = mask[own, rows if mask.shape[1] > 1 else slice(None)]
        if mask.dtype == bool:
            np.copyto(scores, -np.inf, where=~part)
        else:
            scores += part
    if setting.causal:
        later = np.arange(keys) > np.arange(rows.start, rows.start + queries)[:, None]
        np.copyto(scores, -np.inf, where=later)
    return softmax_rows(scores)


def _flat(x) -> Array:
    """(N, heads, length, width) as (N * heads, length, width), wide."""
    return wide(x).reshape(_merged(x))


def _merged(x):
    return (x.shape[0] * x.shape[1], *x.shape[2:])


def _flat_mask(mask, q):
    if mask is None:
        return None
    spread = np.broadcast_to(mask, (*q.shape[:2], *mask.shape[2:]))
    return spread.reshape(_merged(spread))


def _attention_cpu(q, k, v, mask, *, setting, kept):
    a, b, c, m = _flat(q), _flat(k), _flat(v), _flat_mask(mask, q)
    out = np.empty((a.shape[0], a.shape[1], c.shape[-1]), a.dtype)
    for own, rows in _blocks(a, b):
        out[own, rows] = np.matmul(_probabilities(a, b, m, setting, own, rows), c[own])
    return like(out, q).reshape(*q.shape[:3], v.shape[3])


def _pull_cpu(g, q, k, v, mask, setting):
    a, b, c, d, m = _flat(q), _flat(k), _flat(v), _flat(g), _flat_mask(mask, q)
    dq, dk, dv = np.empty_like(a), np.zeros_like(b), np.zeros_like(c)
    for own, rows in _blocks(a, b):
        p = _probabilities(a, b, m, setting, own, rows)
        dv[own] += np.matmul(p.swapaxes(1, 2), d[own, rows])
        h = np.matmul(d[own, rows], c[own].swapaxes(1, 2))
        h -= (h * p).sum(axis=-1, keepdims=True)
        h *= p
        h *= h.dtype.type(setting.scale)
        dq[own, rows] = np.matmul(h, b[own])
        dk[own] += np.matmul(h.swapaxes(1, 2), a[own, rows])
    return tuple(like(d, x).reshape(x.shape) for d, x in ((dq, q), (dk, k), (dv, v)))


def _attention_vjp(needs, out, q, k, v, mask, *, setting, kept):
    def pull(g):
        if on_gpu(g):
            return (*attention_pull_gpu(needs, g, out, q, k, v, mask, setting, kept), None)
        return (*_pull_cpu(g, q, k, v, mask, setting), None)

    return pull


_attention = Primitive("attention", _attention_cpu, attention_gpu, _attention_vjp)
