"""SparseLoCon: a LoCon, and beside it the largest entries of what its factors leave out.

    weight' = weight + strength * alpha / rank * (change of the factors + residual)

LyCORIS's extraction writes it (as a "sparse bias"), and its releases from 4 on do not read it. In
a file the residual is a list of places in the weight as a matrix (OUT, IN * taps) and their values;
in memory it is dense, in Flame layout. File keys: those of LoCon, bias_indices (2, n), bias_values
(n,), bias_size (2,).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np

from ..arrays import Array
from ..errors import DtypeError, ShapeError
from ..layers import LayerShape
from ..ops import elementwise
from ..ops.elementwise import add, cast
from ..svd import Svd, flat_rows, matrix_svd
from .base import Parameters
from .factor import Factor, require
from .locon import LoCon
from .start import zeros

RESIDUAL = "residual"
KEYS = ("bias_indices", "bias_values", "bias_size")


@dataclass(frozen=True)
class SparseLoCon(LoCon):
    """Made by `over`, of a LoCon."""

    keys = (*LoCon.keys, *KEYS)
    marks = ()
    decomposable = False
    drops = ""  # the residual has no ranks

    @classmethod
    def over(cls, on: LoCon) -> SparseLoCon:
        """The same factors with a residual beside them."""
        return cls(**{field.name: getattr(on, field.name) for field in fields(on)})

    @property
    def title(self) -> str:
        return "locon with a sparse residual"

    def factors(self) -> dict[str, Factor]:
        whole = Factor("bias_values", self.shape.inputs, self.shape.outputs, spatial=True)
        return {**super().factors(), RESIDUAL: whole}

    def init(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        form = self.flame_shape(self.factors()[RESIDUAL])
        return {**super().init(rng), RESIDUAL: zeros(form)}

    def costs(self) -> dict[str, int]:
        return {"delta": super().costs()["delta"]}  # the residual is dense in memory

    def delta_weight(self, weight: Array, p: Parameters, scale: Array) -> Array:
        change = super().delta_weight(weight, p, scale)
        return add(change, elementwise.scale(cast(p[RESIDUAL], change.dtype), scale))

    def svd(self, p: Mapping[str, np.ndarray], vectors: bool = True) -> Svd | None:
        return matrix_svd(flat_rows(self.delta_weight(None, p, np.ones(1))), vectors)

    def load(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        forms = super().factors()
        require(tensors, *(factor.key for factor in forms.values()), *KEYS)
        out = {n: factor.read(tensors[factor.key], self.shape) for n, factor in forms.items()}
        return {**out, RESIDUAL: dense(tensors, self.shape)}

    def save(self, p: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        forms, form = super().factors(), self.factors()[RESIDUAL]
        out = {factor.key: factor.write(p[n], self.shape) for n, factor in forms.items()}
        matrix = form.write(p[RESIDUAL], self.shape).reshape(self.shape.outputs, -1)
        places = np.nonzero(matrix)
        # The reference's int16 overflows beyond 32767 columns.
        indices, size = np.stack(places).astype(np.int32), np.array(matrix.shape, np.int32)
        values = np.ascontiguousarray(matrix[places])
        return {**out, "bias_indices": indices, "bias_values": values, "bias_size": size}


def dense(tensors: Mapping[str, np.ndarray], shape: LayerShape) -> np.ndarray:
    """The residual in Flame layout, in the dtype of its values, from a file's tensors.

    16-bit indices that ran over are put right where that can be done. Raises ShapeError or
    DtypeError.
    """
    indices, values = tensors["bias_indices"], tensors["bias_values"]
    size = (shape.outputs, shape.inputs * shape.taps)
    if indices.dtype.kind not in "iu":
        raise DtypeError(f"bias_indices is {indices.dtype}, expected integers")
    if values.ndim != 1 or indices.shape != (2, values.size):
        raise ShapeError(
            f"bias_indices has shape {indices.shape} and bias_values {values.shape}, expected "
            "(2, n) and (n,)"
        )
    if indices.dtype == np.int16 and max(size) <= 1 << 16:
        indices = indices.view(np.uint16)
    rows, columns = indices.astype(np.int64)
    beyond = (rows < 0) | (rows >= size[0]) | (columns < 0) | (columns >= size[1])
    if beyond.any():
        at = int(np.argmax(beyond))
        raise ShapeError(
            f"bias_indices names the place ({rows[at]}, {columns[at]}), expected one within {size}"
        )
    matrix = np.zeros(size, values.dtype)
    matrix[rows, columns] = values
    return Factor("", shape.inputs, shape.outputs, spatial=True).read(
        matrix.reshape(shape.file_shape), shape
    )
