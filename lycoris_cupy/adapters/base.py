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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import numpy as np

from ..arrays import Array
from ..errors import FileFormatError, LycorisError
from ..layers import Layer, LayerShape
from ..norms import NormShape
from ..ops.extended import Change, ready
from ..ops.product import product
from ..svd import Svd
from .factor import Factor, require
from .option import Option, options_of_class
from .thin import by_columns

Parameters = Mapping[str, Array]
RULES = ("base", "reference")  # what a strength between 0 and 1 means, for algorithms with a `rule`


class Share(NamedTuple):
    """What an adapter adds to a weight that it scales: (factor - strength) * W, along one axis.

    axis: 'output' or 'input', which factor, (OUT,) or (IN,) wide, runs along. strength: (1,).
    """

    axis: str
    factor: Array
    strength: Array


# drop(array, add, which mask) and drop(factor, axis, which mask), see dropout.py.
DropElements = Callable[..., Array]
DropRanks = Callable[[Array, int | None, int], Array]

# What an adapter makes of the layer's own output: turn(y, total) -> total plus its part. y has the
# layer's bias in it, which is not turned.
Turn = Callable[[Array, Array], Array]


@dataclass(frozen=True)
class Adapter(ABC):
    """One algorithm's trainable change of one layer."""

    shape: LayerShape
    rank: int
    alpha: float | None = None

    algorithm: ClassVar[str]
    keys: ClassVar[tuple[str, ...]]  # every file key of the algorithm but `alpha`
    marks: ClassVar[tuple[str, ...]]  # a module with any of these keys is of this algorithm
    reads_weight: ClassVar[bool] = True  # False: `delta_weight` takes None for the weight
    rule: ClassVar[str] = "base"  # of RULES; strength 0 is the layer itself only under 'base'
    flags: ClassVar[
        tuple[str, ...]
    ] = ()  # those of the keys that hold a whole number, not a factor
    told: ClassVar[tuple[str, ...]] = ()  # keyword arguments of `read`: what the file does not say
    conditions: ClassVar[tuple[str, ...]] = ()  # arguments of forward that are put into p
    decomposable: ClassVar[bool] = False  # DoRA may stand on it: it has `square`, and `columns`
    drops: ClassVar[str] = ""  # what rank_dropout takes away, in words; '' where it is refused
    rank_axes: ClassVar[Mapping[str, tuple[int, int]]] = {}  # factor -> (axis, which mask) of that
    has_output: ClassVar[bool] = True  # False: its change is none of an output, see Norm

    @abstractmethod
    def factors(self) -> dict[str, Factor]:
        """Name and form of each trainable factor."""

    @abstractmethod
    def init(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Factors, f32 and in Flame layout, with which the layer is unchanged."""

    def start(self, rng: np.random.Generator, weight: Array) -> dict[str, np.ndarray]:
        """`init`, for algorithms that start from the frozen weight, (taps, IN, OUT)."""
        return self.init(rng)

    @abstractmethod
    def delta_weight(self, weight: Array, p: Parameters, scale: Array) -> Array:
        """The change of the weight, (taps, IN, OUT), wide. scale: (1,), strength times alpha /
        rank.
        """

    def changed(self, weight: Array, p: Parameters, scale: Array) -> Array | None:
        """weight + delta_weight(weight, p, scale) in the dtype of weight, rounded once, in one pass
        over the weight; None where there is no such pass.
        """
        return None

    def square(self, weight: Array, p: Parameters, square: Array, scale: Array, axis: str) -> Array:
        """|weight + delta_weight(weight, p, scale)|^2 of each 'output' or 'input', wide, without
        building either. square: the same of the weight alone. Only where `decomposable`.
        """
        raise NotImplementedError

    def kept(self, weight: Array) -> dict[str, Array]:
        """Constants of the frozen weight that `contribute` finds beside the factors in p: made
        once, when the adapter is attached.
        """
        return {}

    @classmethod
    def takes(cls, shape: LayerShape) -> bool:
        """Whether it can sit on such a layer: by default on linear ones and convolutions."""
        return not isinstance(shape, NormShape)

    @classmethod
    def create(cls, shape: LayerShape, rank: int, alpha: float | None = None, **options) -> Adapter:
        """A new adapter with the options that users know; an unknown one is an error. alpha: by
        default the rank.
        """
        for option in options:
            if option not in (known := cls.options()):
                raise LycorisError(
                    f"{cls.algorithm} has no option {option!r} (it has: "
                    f"{', '.join(known) or 'none'})"
                )
        return cls(shape, rank, alpha, **options)

    @classmethod
    def options(cls) -> dict[str, Option]:
        """The options of `create`, by name."""
        return options_of_class(cls)

    @classmethod
    @abstractmethod
    def read(
        cls, shape: LayerShape, tensors: Mapping[str, np.ndarray], alpha: float | None
    ) -> Adapter:
        """The adapter that these tensors of a file (by key, in torch's order) describe; ranks come
        from their shapes.
        """

    @classmethod
    @abstractmethod
    def guess_shape(cls, tensors: Mapping[str, np.ndarray]) -> LayerShape:
        """The layer that a file's tensors belong to, as far as they tell: to inspect it alone.

        Flat columns stay flat, groups are unknown, and what is missing or misshapen counts as 1,
        for `read` to refuse by name. A side that no factor tells is 0.
        """

    def with_alpha(self, alpha: float | None) -> Adapter:
        """The same adapter with another alpha."""
        return replace(self, alpha=alpha)

    @property
    def scale(self) -> float:
        """alpha / rank: 0 for rank 0; 1 if alpha is missing or 0, as LyCORIS and kohya read such
        files.
        """
        return scale_of(self.alpha, self.rank)

    @property
    def title(self) -> str:
        """The algorithm as people read it, with what stands on it."""
        return self.algorithm

    @property
    def reported_scale(self) -> float:
        """The scale that people know the adapter by: alpha / rank, wherever it is multiplied in."""
        return self.scale

    @property
    def scale_reason(self) -> str:
        """Where the scale comes from, in words."""
        if self.rank == 0:
            return "rank 0: scale 0"
        if self.alpha is None:
            return "no alpha in the file: scale 1"
        if self.alpha == 0:
            return "alpha 0 is read as rank: scale 1"
        return f"alpha / rank = {self.alpha:g} / {self.rank}"

    @property
    def has_rank(self) -> bool:
        """False where nothing is factored."""
        return True

    @property
    def ignores_alpha(self) -> bool:
        """True where the scale is 1 whatever a file's alpha says, be it infinite."""
        return False

    @property
    def saved_alpha(self) -> float | None:
        """The alpha that a file must carry for readers to find this scale; None for an algorithm
        without one.
        """
        return float(self.alpha) if self.alpha else float(self.rank)

    @property
    def prefix(self) -> str | None:
        """The prefix that its modules must have in a file; None for the file's."""
        return None

    @property
    def network_args(self) -> dict[str, object]:
        """What readers are told of the adapter in a file's `ss_network_args`, beside `algo`."""
        return {}

    def delta_bias(self, p: Parameters, bias: Array | None = None) -> Array | None:
        """The change of the bias (OUT,) before scaling, or None. bias: the layer's, if there is
        one.
        """
        return None

    def svd(self, p: Mapping[str, np.ndarray], vectors: bool = True) -> Svd | None:
        """The decomposition of the change before scaling as a matrix (taps * IN, OUT), from the
        factors; None where the change depends on the weight it is put on.

        p: canonical, f64, on the CPU. vectors: False for the values alone.
        """
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
        self,
        change: Array | None,
        layer: Layer,
        x: Array,
        p: Parameters,
        scale: Array,
        columns: Array | None = None,
    ) -> Change:
        """change (of earlier adapters, or None) plus this adapter's part of the layer's output.

        The law: layer.forward(x, apply(None, layer, x, p, s)) is what the layer gives with the
        weight W + delta_weight(W, p, s) and its changed bias, for every algorithm and layer. The
        change is rounded by itself and added in the accumulators of the layer's own product, whose
        result is rounded once: W + delta is never rounded. columns: (OUT,) wide, what each output
        of this adapter's part is multiplied by; only where `decomposable`. A last product may be
        returned as a Pending, for the layer's own to take in.
        """
        delta = by_columns(self.delta_weight(layer.matrix, p, scale), columns)
        return product(x, delta, layer.window, add=change)

    def contribute(
        self, change: Array | None, layer: Layer, x: Array, p: Parameters, scale: Array
    ) -> tuple[Array | None, Share | Turn | None]:
        """`apply`, and the Share or the Turn of the layer's own product if the algorithm scales or
        mixes that too.
        """
        return self.apply(change, layer, x, p, scale), None

    def apply_dropped(
        self,
        change: Array | None,
        layer: Layer,
        x: Array,
        p: Parameters,
        scale: Array,
        drop: DropElements,
    ) -> Array:
        """`apply`, with elements dropped from this adapter's part."""
        return drop(ready(self.apply(None, layer, x, p, scale)), change)

    def drop_ranks(self, p: Parameters, drop: DropRanks) -> dict[str, Array]:
        """The factors without what `drops` names, wherever drop takes it away."""
        axes = {name: where for name, where in self.rank_axes.items() if name in p}
        return {**p, **{name: drop(p[name], *where) for name, where in axes.items()}}

    def canonical(self, p: Mapping[str, Array]) -> dict[str, Array]:
        """Flame arrays as (taps, rows, columns): views."""
        forms = self.factors()
        return {name: array.reshape(forms[name].canonical(self.shape)) for name, array in p.items()}

    def flame_shape(self, factor: Factor) -> tuple[int, ...]:
        """The shape in which people see a factor."""
        return factor.flame(self.shape)

    def load(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Factors in Flame layout from a file's tensors, dtype unchanged.

        Raises FileFormatError for one that is missing, ShapeError for one that does not fit.
        """
        forms = self.factors()
        require(tensors, *(factor.key for factor in forms.values()))
        return {n: factor.read(tensors[factor.key], self.shape) for n, factor in forms.items()}

    def save(self, p: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A file's tensors from factors in Flame layout: the inverse of `load`, dtype unchanged."""
        return {f.key: f.write(p[name], self.shape) for name, f in self.factors().items()}


def scale_of(alpha: float | None, rank: int) -> float:
    """alpha / rank, with the cases of a missing, zero or non-finite alpha and of rank 0."""
    if alpha is not None and not math.isfinite(alpha):
        raise FileFormatError(f"alpha is {alpha}, expected a finite number")
    if rank == 0:
        return 0.0
    return alpha / rank if alpha else 1.0
