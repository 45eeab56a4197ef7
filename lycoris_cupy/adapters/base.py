"""The contract of an algorithm: what it stores, how it starts, the weight it amounts to, and its
cheapest way to act.

An adapter is a frozen description (layer shape, rank, alpha, options). Its factors live outside, in
a dict of arrays, so that a tape can watch them. Every factor is (taps or 1, rows, columns) with the
input side in the rows, whatever kind of layer it sits on; in Flame layout the taps are the kernel's
axes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, NamedTuple

import numpy as np

from ..arrays import Array
from ..errors import FileFormatError, LycorisError, ShapeError
from ..layers import Layer, LayerShape
from ..ops.product import product

Parameters = Mapping[str, Array]


class Factor(NamedTuple):
    """One trainable factor: (taps, rows, columns) if spatial, else (1, rows, columns), and where a
    file keeps it.

    In a file the same numbers stand in torch's order: (columns, rows, *kernel). `flat` files merge
    (rows, *kernel) into one axis; `turned` files store (rows, columns), as Tucker's output-side
    factors do; `plain` has this very shape everywhere.
    """

    key: str
    rows: int = 0
    columns: int = 0
    spatial: bool = False
    flat: bool = False
    turned: bool = False
    plain: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Adapter(ABC):
    """One algorithm's trainable change of one layer."""

    shape: LayerShape
    rank: int
    alpha: float | None = None

    algorithm: ClassVar[str]
    keys: ClassVar[
        tuple[str, ...]
    ]  # every file key of the algorithm but `alpha`; the first ones tell it apart
    marks: ClassVar[tuple[str, ...]]  # a module with any of these keys is of this algorithm

    @abstractmethod
    def factors(self) -> dict[str, Factor]:
        """Name and form of each trainable factor."""

    @abstractmethod
    def init(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Factors, f32 and in Flame layout, with which the layer is unchanged."""

    @abstractmethod
    def delta_weight(self, weight: Array, p: Parameters, scale: Array) -> Array:
        """The change of the weight, (taps, IN, OUT), wide. scale: (1,), strength times alpha /
        rank.
        """

    @classmethod
    def create(cls, shape: LayerShape, rank: int, alpha: float | None = None, **options) -> Adapter:
        """A new adapter with the options that users know; an unknown one is an error. alpha: by
        default the rank.
        """
        known = [
            field.name for field in fields(cls) if field.name not in ("shape", "rank", "alpha")
        ]
        for option in options:
            if option not in known:
                raise LycorisError(
                    f"{cls.algorithm} has no option {option!r} (it has: "
                    f"{', '.join(known) or 'none'})"
                )
        return cls(shape, rank, alpha, **options)

    @classmethod
    @abstractmethod
    def read(
        cls, shape: LayerShape, tensors: Mapping[str, np.ndarray], alpha: float | None
    ) -> Adapter:
        """The adapter that these tensors of a file (by key, in torch's order) describe; ranks come
        from their shapes.
        """

    @property
    def scale(self) -> float:
        """alpha / rank: 0 for rank 0; 1 if alpha is missing or 0, as LyCORIS and kohya read such
        files.
        """
        return scale_of(self.alpha, self.rank)

    @property
    def saved_alpha(self) -> float | None:
        """The alpha that a file must carry for readers to find this scale; None for an algorithm
        without one.
        """
        return float(self.alpha) if self.alpha else float(self.rank)

    def delta_bias(self, p: Parameters) -> Array | None:
        """The change of the bias before scaling, (OUT,), or None."""
        return None

    def costs(self) -> dict[str, int]:
        """Multiply-adds an output position of each route that `apply` knows. 'delta' builds the
        change of the weight.
        """
        return {"delta": self.shape.taps * self.shape.inputs * self.shape.outputs}

    @property
    def route(self) -> str:
        """The cheapest route; at equal cost one that does not build the change of the weight."""
        costs = self.costs()
        return min(costs, key=lambda route: (costs[route], route == "delta"))

    def apply(
        self, change: Array | None, layer: Layer, x: Array, p: Parameters, scale: Array
    ) -> Array:
        """change (of earlier adapters, or None) plus this adapter's part of the layer's output.

        The law: layer.forward(x, apply(None, layer, x, p, s)) is what the layer gives with the
        weight W + delta_weight(W, p, s) and its changed bias, for every algorithm and layer. The
        change is rounded by itself and added in the accumulators of the layer's own product, whose
        result is rounded once: W + delta is never rounded.
        """
        return product(x, self.delta_weight(layer.matrix, p, scale), layer.window, add=change)

    def canonical(self, p: Mapping[str, Array]) -> dict[str, Array]:
        """Flame arrays as (taps, rows, columns): views."""
        forms = self.factors()
        return {
            name: array.reshape(self._canonical_shape(forms[name])) for name, array in p.items()
        }

    def flame_shape(self, factor: Factor) -> tuple[int, ...]:
        """The shape in which people see a factor."""
        if factor.plain is not None:
            return factor.plain
        return self.shape.flame(factor.rows, factor.columns, factor.spatial)

    def file_shape(self, factor: Factor) -> tuple[int, ...]:
        """The shape in which LyCORIS saves a factor."""
        kernel = self.shape.window.kernel
        if factor.plain is not None or factor.turned:
            return factor.plain or (factor.rows, factor.columns)
        if factor.flat:
            return (factor.columns, factor.rows * (math.prod(kernel) if factor.spatial else 1))
        return (factor.columns, factor.rows, *(kernel if factor.spatial else (1,) * len(kernel)))

    def load(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Factors in Flame layout from a file's tensors, dtype unchanged. Raises ShapeError; never
        reshapes by count alone.
        """
        out = {}
        for name, factor in self.factors().items():
            if factor.key not in tensors:
                raise FileFormatError(
                    f"{factor.key} is missing beside {', '.join(sorted(tensors))}"
                )
            tensor = tensors[factor.key]
            if not self._accepts(factor, tuple(tensor.shape)):
                raise ShapeError(
                    f"{factor.key} has shape {tuple(tensor.shape)}, expected "
                    f"{self.file_shape(factor)} on {self.shape}"
                )
            if factor.plain is None and not factor.turned:
                taps = self.shape.taps if factor.spatial else 1
                tensor = tensor.reshape(factor.columns, factor.rows, taps).transpose(2, 1, 0)
            out[name] = np.ascontiguousarray(tensor).reshape(self.flame_shape(factor))
        return out

    def save(self, p: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A file's tensors from factors in Flame layout: the inverse of `load`, dtype unchanged."""
        out = {}
        for name, factor in self.factors().items():
            array = p[name].reshape(self._canonical_shape(factor))
            if factor.plain is None and not factor.turned:
                array = array.transpose(2, 1, 0)
            out[factor.key] = np.ascontiguousarray(array).reshape(self.file_shape(factor))
        return out

    def _canonical_shape(self, factor: Factor) -> tuple[int, ...]:
        if factor.plain is not None:
            return factor.plain
        return (self.shape.taps if factor.spatial else 1, factor.rows, factor.columns)

    def _accepts(self, factor: Factor, shape: tuple[int, ...]) -> bool:
        # A 1x1 convolution and a linear layer share their files: trailing ones come and go between
        # exporters.
        expected = self.file_shape(factor)
        if shape == expected or _squeezed(shape) == _squeezed(expected):
            return True
        unflat = (factor.columns, factor.rows, *self.shape.window.kernel)
        return factor.flat and factor.spatial and shape == unflat


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """shape without the ones after its second axis, if nothing else stands there."""
    return shape[:2] if all(n == 1 for n in shape[2:]) else shape


def scale_of(alpha: float | None, rank: int) -> float:
    """alpha / rank, with the cases of a missing, zero or non-finite alpha and of rank 0."""
    if alpha is not None and not math.isfinite(alpha):
        raise FileFormatError(f"alpha is {alpha}, expected a finite number")
    if rank == 0:
        return 0.0
    return alpha / rank if alpha else 1.0


def uniform(rng: np.random.Generator, shape: tuple[int, ...], fan_in: int) -> np.ndarray:
    """f32, uniform within +-1 / sqrt(fan_in): Kaiming-uniform with a = sqrt(5), the reference's
    start.
    """
    bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
    return rng.uniform(-bound, bound, shape).astype(np.float32)


def normal(rng: np.random.Generator, shape: tuple[int, ...], deviation: float) -> np.ndarray:
    """f32, normal with mean 0."""
    return (rng.standard_normal(shape) * deviation).astype(np.float32)


def zeros(shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros(shape, np.float32)


def require_two_axes(tensors: Mapping[str, np.ndarray], *keys: str) -> None:
    """Raise unless these tensors are there and have the two axes that ranks are read from."""
    for key in keys:
        if key not in tensors:
            raise FileFormatError(f"{key} is missing beside {', '.join(sorted(tensors))}")
        if tensors[key].ndim < 2:
            raise ShapeError(
                f"{key} has shape {tuple(tensors[key].shape)}, expected at least two axes"
            )


def low_rank_cost(shape: LayerShape, rank: int) -> int:
    """Multiply-adds an output position of x -> down -> up: the down product in every group, then
    up's columns.
    """
    return rank * (shape.taps * shape.channels + shape.outputs)


def apply_low_rank(
    change: Array | None, layer: Layer, x: Array, down: Array, up: Array, scale: Array
) -> Array:
    """change + scale * ((x * down) @ up).  down: (taps, IN, R), walks like the layer. up: (1, R,
    OUT).

    All groups share `down`; each has its own columns of `up`.
    """
    window = layer.window
    inner = product(x, down, window.grouped(window.groups, shared=True))
    return product(inner, up, window.pointwise_like(window.groups), add=change, scale=scale)
