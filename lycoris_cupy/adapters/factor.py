"""Factor: the form of one trainable array, here and in a file; and what a file's tensors tell.

On disk torch's order, in memory Flame layout: this is the only place that turns one into the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ..errors import FileFormatError, ShapeError
from ..layers import LayerShape
from ..ops.window import Window


class Factor(NamedTuple):
    """(taps, rows, columns) if spatial, else (1, rows, columns); rows are the input side.

    A file holds the same numbers as (columns, rows, *kernel) under `key`. `flat` files merge
    (rows, *kernel) into one axis; `turned` files store (rows, columns), as Tucker's output-side
    factors do; `plain` has this very shape everywhere, but files may keep it as `stored`. `wide`
    ones are kept in f32 beside bf16 factors: their rounding would be one of the whole weight.
    """

    key: str
    rows: int = 0
    columns: int = 0
    spatial: bool = False
    flat: bool = False
    turned: bool = False
    plain: tuple[int, ...] | None = None
    stored: tuple[int, ...] | None = None
    wide: bool = False

    def canonical(self, shape: LayerShape) -> tuple[int, ...]:
        """The shape in which algorithms see it."""
        return self.plain or (shape.taps if self.spatial else 1, self.rows, self.columns)

    def flame(self, shape: LayerShape) -> tuple[int, ...]:
        """The shape in which people see it: the taps are the kernel's axes."""
        return self.plain or shape.flame(self.rows, self.columns, self.spatial)

    def in_file(self, shape: LayerShape) -> tuple[int, ...]:
        """The shape in which LyCORIS saves it."""
        kernel = shape.window.kernel
        if self.plain or self.turned:
            return self.stored or self.plain or (self.rows, self.columns)
        if self.flat:
            return (self.columns, self.rows * (shape.taps if self.spatial else 1))
        return (self.columns, self.rows, *(kernel if self.spatial else (1,) * len(kernel)))

    def read(self, tensor: np.ndarray, shape: LayerShape) -> np.ndarray:
        """A file's tensor in Flame layout. Raises ShapeError; never reshapes by count alone."""
        if not self._accepts(tuple(tensor.shape), shape):
            raise ShapeError(
                f"{self.key} has shape {tuple(tensor.shape)}, expected "
                f"{self.in_file(shape)} on {shape}"
            )
        if not (self.plain or self.turned):
            taps = shape.taps if self.spatial else 1
            tensor = tensor.reshape(self.columns, self.rows, taps).transpose(2, 1, 0)
        return np.ascontiguousarray(tensor).reshape(self.flame(shape))

    def write(self, array: np.ndarray, shape: LayerShape) -> np.ndarray:
        """The tensor for a file: the inverse of `read`."""
        array = array.reshape(self.canonical(shape))
        if not (self.plain or self.turned):
            array = array.transpose(2, 1, 0)
        return np.ascontiguousarray(array).reshape(self.in_file(shape))

    def _accepts(self, given: tuple[int, ...], shape: LayerShape) -> bool:
        # A 1x1 convolution and a linear layer share their files: trailing ones come and go between
        # exporters. Flat columns may also stand unfolded.
        if _squeezed(given) == _squeezed(self.in_file(shape)):
            return True
        if self.stored and given == self.plain:
            return True
        unfolded = (self.columns, self.rows, *shape.window.kernel)
        return self.flat and self.spatial and given == unfolded


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """shape without the ones after its second axis, if nothing else stands there."""
    return shape[:2] if all(n == 1 for n in shape[2:]) else shape


def require(tensors: Mapping[str, np.ndarray], *keys: str) -> None:
    """Raise FileFormatError unless a file's module has these tensors."""
    for key in keys:
        if key not in tensors:
            raise FileFormatError(f"{key} is missing beside {', '.join(sorted(tensors))}")


def require_two_axes(tensors: Mapping[str, np.ndarray], *keys: str) -> None:
    """Raise unless these tensors are there and have the two axes that ranks are read from."""
    require(tensors, *keys)
    for key in keys:
        if tensors[key].ndim < 2:
            shape = tuple(tensors[key].shape)
            raise ShapeError(f"{key} has shape {shape}, expected at least two axes")


def extents(tensors: Mapping[str, np.ndarray], key: str) -> tuple[int, int]:
    """The first two extents of a file's tensor, 1 for what is not there."""
    columns, rows, *_ = (*tensors[key].shape, 1, 1) if key in tensors else (1, 1)
    return columns, rows


def kernel_of(tensors: Mapping[str, np.ndarray], *keys: str) -> Window:
    """The window of the kernel that the first of these tensors that is there shows."""
    return Window.of(next((tensors[key].shape[2:] for key in keys if key in tensors), ()))
