"""Masks of dropout once more, from Philox as its paper has it, on Python's whole numbers."""

import functools

import numpy as np

WORD = 2**32


@functools.cache
def words(block, tensor, step, kind, seed):
    """The four words of a counter under a seed.  Salmon et al. 2011, section 3.3."""
    a, b, c, d = block, tensor, step, kind
    low, high = seed % WORD, seed // WORD
    for _ in range(10):
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (
            second // WORD ^ b ^ low,
            second % WORD,
            first // WORD ^ d ^ high,
            first % WORD,
        )
        low, high = (low + 0x9E3779B9) % WORD, (high + 0xBB67AE85) % WORD
    return a, b, c, d


def mask(entries, probability, *, step, tensor=0, kind=1, seed=0):
    """1 where an entry is kept, 0 where it is dropped: f64, (entries,)."""
    drawn = [words(i // 4, tensor, step, kind, seed)[i % 4] for i in range(entries)]
    return np.array([float(word >= round(probability * WORD)) for word in drawn])


def along(shape, axis, probability, **numbers):
    """A mask of the places along an axis, laid out to be multiplied with an array of that shape; of
    all elements where axis is None.
    """
    if axis is None:
        return mask(int(np.prod(shape)), probability, **numbers).reshape(shape)
    spread = [1] * len(shape)
    spread[axis] = shape[axis]
    return mask(shape[axis], probability, **numbers).reshape(spread)
