"""Counter-based random numbers, Philox 4x32-10: the same bits on NumPy and CuPy.

Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". Nothing is stored between draws:
a key and a counter give the bits, so that a run can be repeated anywhere, from any step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .arrays import Array, module_of

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)  # golden ratio, sqrt(3) - 1
_ROUNDS = 10
_WORD = 0xFFFFFFFF


def philox4x32(counter: Sequence[Array], key: tuple[int, int]) -> list[Array]:
    """Four u32 arrays from four of a counter, which broadcast, and a key of two 32-bit numbers."""
    a, b, c, d = counter
    for turn in range(_ROUNDS):
        first, second = (
            np.uint32((word + turn * step) & _WORD) for word, step in zip(key, _WEYL, strict=True)
        )
        high_a, low_a = _product(a, _MULTIPLIERS[0])
        high_c, low_c = _product(c, _MULTIPLIERS[1])
        a, b, c, d = high_c ^ b ^ first, low_c, high_a ^ d ^ second, low_a
    return [a, b, c, d]


def random_bits(
    shape: tuple[int, ...], seed: int, step: Array, tensor: int, kind: int = 0
) -> Array:
    """u32 array of a shape, on the device of step.

    seed: below 2^64, the key. step: u32, (1,), on the device, so that a captured graph draws anew.
    tensor: which of a step's tensors. kind: what is drawn for it. Element i in C order is word
    i % 4 of the counter (i // 4, tensor, step, kind).
    """
    xp = module_of(step)
    count = int(np.prod(shape, dtype=np.int64))
    blocks = xp.arange((count + 3) // 4, dtype=np.uint32)
    tensors = xp.full(1, tensor, np.uint32)
    words = random_words(blocks, tensors, seed, step, kind)
    return words.reshape(-1)[:count].reshape(shape)


def random_words(blocks: Array, tensors: Array, seed: int, step: Array, kind: int = 0) -> Array:
    """The bits of elements 4 b to 4 b + 3 of tensors, (..., 4): u32, of u32 that broadcast."""
    xp = module_of(step)
    counter = (blocks, tensors, step, xp.full(1, kind, np.uint32))
    return xp.stack(philox4x32(counter, (seed & _WORD, seed >> 32)), axis=-1)


def _product(word: Array, by: int) -> tuple[Array, Array]:
    """High and low half of the 64-bit product."""
    whole = word.astype(np.uint64) * np.uint64(by)
    return (whole >> np.uint64(32)).astype(np.uint32), whole.astype(np.uint32)
