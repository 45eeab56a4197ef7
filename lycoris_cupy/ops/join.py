"""join_columns and take_columns: arrays set side by side at given columns of a wider one, and
columns taken out. Each is the other's gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..arrays import Array, module_of
from ..errors import ShapeError
from ..tape import Primitive
from .columns import bits, moved

Ranges = tuple[tuple[int, int], ...]  # begin, end


def join_columns(arrays: Sequence[Array], ranges: Sequence[Ranges], total: int) -> Array:
    """out (..., total): columns ranges[i], in order, hold arrays[i] (..., C_i); all else is 0.

    Returns the dtype of the arrays. Raises ShapeError if a range lies outside, if ranges overlap,
    or if an array has not as many columns as its ranges.
    """
    if not arrays or len(arrays) != len(ranges):
        raise ShapeError(
            f"{len(arrays)} arrays and ranges for {len(ranges)}, expected one for each"
        )
    end = 0
    # An empty range may stand anywhere.
    for begin, stop in sorted(pair for own in ranges for pair in own if pair[0] != pair[1]):
        if not end <= begin <= stop <= total:
            raise ShapeError(f"columns {begin}:{stop} overlap others or end after {total}")
        end = stop
    for array, own in zip(arrays, ranges, strict=True):
        expected = (*arrays[0].shape[:-1], _count(own))
        if tuple(array.shape) != expected or array.dtype != arrays[0].dtype:
            raise ShapeError(
                f"an array has shape {tuple(array.shape)} and dtype {array.dtype}, expected "
                f"{expected} and {arrays[0].dtype}"
            )
    return _join_columns(*arrays, ranges=tuple(map(tuple, ranges)), total=int(total))


def take_columns(x: Array, ranges: Ranges) -> Array:
    """The columns of x (..., C) in these ranges, one after the other."""
    for begin, stop in ranges:
        if not 0 <= begin <= stop <= x.shape[-1]:
            raise ShapeError(f"columns {begin}:{stop} are not among the {x.shape[-1]} of x")
    return _take_columns(x, ranges=tuple(ranges))


def _count(ranges: Ranges) -> int:
    return sum(stop - begin for begin, stop in ranges)


def _run_join(*arrays, ranges, total):
    first = arrays[0]
    # Filled with zeros only where nothing is set.
    fill = module_of(first).empty if sum(map(_count, ranges)) == total else module_of(first).zeros
    out = fill((*first.shape[:-1], total), bits(first).dtype)
    for array, own in zip(arrays, ranges, strict=True):
        at = 0
        for begin, stop in own:
            out[..., begin:stop] = bits(array)[..., at : at + stop - begin]
            at += stop - begin
    return out.view(first.dtype)


def _join_vjp(needs, out, *arrays, ranges, total):
    def pull(g):
        return tuple(
            _take_columns(g, ranges=own) if need else None
            for need, own in zip(needs, ranges, strict=True)
        )

    return pull


_join_columns = Primitive(
    "join_columns", cpu=_run_join, gpu=_run_join, vjp=_join_vjp, keeps_wide=True
)


def _run_take(x, *, ranges):
    def taken(b):
        return module_of(b).concatenate([b[..., begin:stop] for begin, stop in ranges], axis=-1)

    return moved(x, taken)


_take_columns = Primitive(
    "take_columns",
    cpu=_run_take,
    gpu=_run_take,
    vjp=lambda needs, out, x, *, ranges: (
        lambda g, total=x.shape[-1]: (_join_columns(g, ranges=(ranges,), total=total),)
    ),
    keeps_wide=True,
)
