"""How a side of a layer is split into two factors, for LoKr and the rotations."""

from __future__ import annotations

from math import isqrt


def factorization(size: int, factor: int) -> tuple[int, int]:
    """The pair (m, n), m <= n, m * n = size, into which the reference splits a side of a layer.

    A positive factor that divides gives (factor, size / factor), sorted; otherwise m is the largest
    divisor with m * m <= size and m <= factor (any, if factor is negative). Only for new adapters:
    a file says its own split.
    """
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    cap = size if factor < 0 else max(factor, 1)
    m = next(m for m in range(min(isqrt(size), cap), 0, -1) if size % m == 0)
    return m, size // m
