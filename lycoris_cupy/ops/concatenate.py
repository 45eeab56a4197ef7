"""concatenate and split along any axis. On channels-last arrays the axes behind the chosen one are
part of its columns, so both are what join.py does with columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from ..arrays import Array, require_same
from ..errors import ShapeError
from ..tape import value_of
from .join import join_columns, take_columns
from .shapes import reshape


def concatenate(arrays: Sequence[Array], axis: int = -1) -> Array:
    """The arrays one after the other along an axis; all other axes are equal, and so are dtypes.

    Skip connections of a U-Net: concatenate([x, skip]). Raises ShapeError, DtypeError.
    """
    if not arrays:
        raise ShapeError("concatenate was given no arrays, expected one or more")
    first = arrays[0]
    at = _axis(axis, first.ndim)
    for i, array in enumerate(arrays[1:], 1):
        require_same("array 0", value_of(first), f"array {i}", value_of(array))
        others = [shape[:at] + shape[at + 1 :] for shape in (first.shape, array.shape)]
        if array.ndim != first.ndim or others[0] != others[1]:
            raise ShapeError(
                f"array {i} has shape {tuple(array.shape)}, expected that of array 0, "
                f"{tuple(first.shape)}, but for axis {axis}"
            )
    if len(arrays) == 1:
        return first
    ranges, end = [], 0
    flat = [_columns(array, at) for array in arrays]
    for array in flat:
        ranges.append(((end, end + array.shape[1]),))
        end = ranges[-1][0][1]
    total = sum(array.shape[at] for array in arrays)
    joined = join_columns(flat, ranges, end)
    return reshape(joined, (*first.shape[:at], total, *first.shape[at + 1 :]))


def split(x: Array, lengths: Sequence[int], axis: int = -1) -> list[Array]:
    """x cut along an axis into parts of these lengths, which add up to it; each a copy.

    The query, key and value of one fused projection: split(y, [width] * 3). Raises ShapeError.
    """
    at = _axis(axis, x.ndim)
    if min(lengths, default=0) < 0 or sum(lengths) != x.shape[at]:
        raise ShapeError(
            f"lengths {list(lengths)} add up to {sum(lengths)}, expected {x.shape[at]}, axis "
            f"{axis} of x of shape {tuple(x.shape)}"
        )
    flat, behind, start, parts = _columns(x, at), prod(x.shape[at + 1 :]), 0, []
    for length in lengths:
        part = take_columns(flat, ((start * behind, (start + length) * behind),))
        parts.append(reshape(part, (*x.shape[:at], length, *x.shape[at + 1 :])))
        start += length
    return parts


def _axis(axis: int, axes: int) -> int:
    if not -axes <= axis < axes:
        raise ShapeError(f"axis {axis} is not one of the {axes} axes")
    return axis % axes


def _columns(x: Array, at: int) -> Array:
    """x as a matrix whose columns are this axis and those behind it."""
    return reshape(x, (prod(x.shape[:at]), prod(x.shape[at:])))
