"""T-LoRA: a LoRA whose ranks fall silent as the noise rises, started from the weight's own singular
vectors, which are taken out again.  Soboleva et al. 2025, arXiv 2507.05964.

    delta = scale * (q diag(lambda * m) p - q0 diag(lambda0 * m) p0)
    m[r] = r < least_rank + floor((1 - noise level)^exponent * (rank - least_rank))

q0, lambda0, p0 are the largest singular triplets of the weight. A file does not hold them: they
are computed again, so the file belongs to this very weight. Without a noise level every rank acts.
For linear layers and 1x1 convolutions without groups; for spatial kernels the reference raises or
changes one tap only. File keys: q_layer.weight (r, I, *1), p_layer.weight (O, r, *1), lambda_layer
(1, r), alpha. The factors are kept wide: what counts is how little they differ from the first ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..arrays import Array, module_of, to_device, wide_dtype
from ..errors import LycorisError, ShapeError
from ..layers import Layer, LayerShape
from ..ops.elementwise import add, cast
from ..ops.extended import pending
from ..ops.low_rank import low_rank_weight
from ..ops.product import product
from ..ops.ranks import interleave, mask_ranks
from ..ops.scale_columns import spread_columns
from .base import Adapter, Parameters
from .factor import Factor, extents, kernel_of, require_two_axes
from .thin import low_rank_cost

_NAMES = ("q", "lambda", "p")
_MISSING = 1e-6  # the reference's singular value where the rank is more than the weight has


@dataclass(frozen=True)
class TLoRA(Adapter):
    """least_rank: ranks that act at noise level 1. exponent: how fast they fall silent."""

    least_rank: int = 1
    exponent: float = 1.0

    algorithm = "tlora"
    keys = ("q_layer.weight", "p_layer.weight", "lambda_layer")
    marks = keys
    conditions = ("noise_level",)

    def __post_init__(self):
        if self.shape.taps > 1 or self.shape.window.groups > 1:
            raise ShapeError(
                f"tlora sits on linear layers and 1x1 convolutions without groups, not on "
                f"{self.shape}"
            )
        if not 0 <= self.least_rank <= max(self.rank, 1) or not self.exponent > 0:
            raise LycorisError(
                f"tlora: least_rank is {self.least_rank} and exponent {self.exponent}, expected 0 "
                f"to the rank {self.rank} and more than 0"
            )

    @classmethod
    def takes(cls, shape: LayerShape) -> bool:
        return super().takes(shape) and shape.taps == shape.window.groups == 1

    def factors(self) -> dict[str, Factor]:
        return {
            "q": Factor("q_layer.weight", self.shape.inputs, self.rank, wide=True),
            "lambda": Factor("lambda_layer", plain=(self.rank,), stored=(1, self.rank), wide=True),
            "p": Factor("p_layer.weight", self.rank, self.shape.outputs, wide=True),
        }

    def init(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        raise LycorisError("tlora starts from the layer's weight: use `start`")

    def _triplets(self, weight: Array) -> dict[str, Array]:
        """The largest `rank` singular triplets of the weight (1, IN, OUT), wide and where it lies;
        beyond those that it has, zero vectors with a singular value of 1e-6.
        """
        xp, matrix = module_of(weight), cast(weight, wide_dtype(weight.dtype))[0]
        left, values, right = xp.linalg.svd(matrix, full_matrices=False)
        found = min(self.rank, values.size)
        q = xp.zeros((self.shape.inputs, self.rank), matrix.dtype)
        p = xp.zeros((self.rank, self.shape.outputs), matrix.dtype)
        middle = xp.full(self.rank, _MISSING, matrix.dtype)
        q[:, :found], middle[:found], p[:found] = left[:, :found], values[:found], right[:found]
        return dict(zip(_NAMES, (q, middle, p), strict=True))

    def start(self, rng: np.random.Generator, weight: Array) -> dict[str, np.ndarray]:
        forms = {name: self.flame_shape(factor) for name, factor in self.factors().items()}
        first = self._triplets(weight)
        return {name: to_device(part, "cpu").reshape(forms[name]) for name, part in first.items()}

    def kept(self, weight: Array) -> dict[str, Array]:
        """The first triplets, lambda0 with a minus."""
        first = self._triplets(weight)
        first["lambda"] = -first["lambda"]
        return {f"first_{n}": v for n, v in self.canonical(first).items()}

    def _pairs(self, weight: Array, p: Parameters) -> list[tuple[Array, Array]]:
        """(down, up) of the trained triplets and of the first ones, whose down is negative."""
        p = p if "first_q" in p else {**p, **self.kept(weight)}
        out = []
        for start in ("", "first_"):
            q, middle, up = (p[start + name] for name in _NAMES)
            out.append((spread_columns(q, middle), up))
        return out

    def delta_weight(self, weight: Array, p: Parameters, scale: Array) -> Array:
        trained, first = (low_rank_weight(*pair, scale) for pair in self._pairs(weight, p))
        return add(trained, first)

    def costs(self) -> dict[str, int]:
        return {**super().costs(), "low rank": low_rank_cost(self.shape, 2 * self.rank)}

    def apply(
        self,
        change: Array | None,
        layer: Layer,
        x: Array,
        p: Parameters,
        scale: Array,
        columns: Array | None = None,
    ) -> Array:
        level = p.get("noise_level")
        if level is None and self.route == "delta":
            return super().apply(change, layer, x, p, scale)
        (down, up), (first_down, first_up) = self._pairs(layer.matrix, p)
        # A rank and its first state side by side: at the start each pair of terms cancels before
        # anything is added to it.
        inner = product(x, interleave(down, first_down, -1), layer.window)
        if level is not None:
            options = {"least": self.least_rank, "exponent": self.exponent, "width": 2}
            inner = mask_ranks(inner, level, **options)
        both = interleave(up, first_up, -2)
        return pending(inner, both, layer.window.pointwise_like(), add=change, scale=scale)

    @classmethod
    def guess_shape(cls, tensors: Mapping[str, np.ndarray]) -> LayerShape:
        inputs, outputs = (
            extents(tensors, "q_layer.weight")[1],
            extents(tensors, "p_layer.weight")[0],
        )
        return LayerShape(kernel_of(tensors, "q_layer.weight"), inputs, outputs)

    @classmethod
    def read(
        cls, shape: LayerShape, tensors: Mapping[str, np.ndarray], alpha: float | None
    ) -> TLoRA:
        require_two_axes(tensors, "q_layer.weight", "p_layer.weight")
        return cls(shape, tensors["q_layer.weight"].shape[0], alpha)
