"""LoKr: a Kronecker product, each side full or a product of factors.  Yeh et al. 2023, arXiv
2309.14859.

    delta[t][m * N + n, l * K + k] = scale * w1[l, m] * w2[t][n, k]
    w1 = lokr_w1                or w1_a @ w1_b
    w2 = lokr_w2                or w2_down[t] @ w2_up       or, Tucker, w2_down @ t2[t] @ w2_up

w1 stands as in files, output side first, (L, M); all else input side first. With both sides full
the scale is 1, whatever alpha says. File keys: lokr_w1, or lokr_w1_a and lokr_w1_b; lokr_w2, or
lokr_w2_a, lokr_w2_b (and lokr_t2); alpha.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite

import numpy as np

from ..arrays import Array, module_of, wide_dtype
from ..errors import ShapeError
from ..layers import Layer, LayerShape
from ..ops.before import by_down_and_mix, by_mix
from ..ops.changed import kron_changed
from ..ops.elementwise import cast, multiply
from ..ops.extended import pending, ready
from ..ops.kron import kron_weight
from ..ops.kron_product import in_one_piece, kron_product
from ..ops.kron_square import kron_square
from ..ops.low_rank import low_rank_weight, tucker_weight
from ..ops.product import product
from ..ops.shapes import reshape
from ..ops.small_sums import Sum, small, small_sums
from ..ops.squares import changed_square
from ..svd import Svd, flat_rows, kron_svd, matrix_svd, product_svd
from ..tape import value_of
from .base import Adapter, DropRanks, Parameters
from .factor import Factor, extents, kernel_of, require_two_axes
from .factorization import factorization
from .start import uniform, zeros
from .thin import by_columns


@dataclass(frozen=True)
class LoKr(Adapter):
    """split: (L, K, M, N) with OUT = L * K and IN = M * N. w1_rank, w2_rank: None where that side
    is full.
    """

    split: tuple[int, int, int, int] = (1, 1, 1, 1)
    w1_rank: int | None = None
    w2_rank: int | None = None
    tucker: bool = False
    core_rank: int | None = None  # of the core's input side; by default w2_rank

    algorithm = "lokr"
    reads_weight = False
    keys = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    marks = keys
    decomposable = True
    drops = "outputs"

    def __post_init__(self):
        rows, columns, blocks, width = self.split
        if rows * columns != self.shape.outputs or blocks * width != self.shape.inputs:
            raise ShapeError(
                f"w1 ({rows}, {blocks}) kron w2 ({columns}, {width}) gives ({rows * columns}, "
                f"{blocks * width}), "
                f"expected ({self.shape.outputs}, {self.shape.inputs}) on {self.shape}"
            )

    @classmethod
    def create(
        cls,
        shape: LayerShape,
        rank: int,
        alpha: float | None = None,
        *,
        factor: int = -1,
        tucker: bool = False,
        decompose_both: bool = False,
        full_matrix: bool = False,
        unbalanced_factorization: bool = False,
    ) -> LoKr:
        """A new adapter by the reference's rules: a side is factored only where that is smaller."""
        blocks, width = factorization(shape.inputs, factor)
        rows, columns = factorization(shape.outputs, factor)
        if unbalanced_factorization:
            rows, columns = columns, rows
        w1_rank = (
            rank if decompose_both and not full_matrix and rank < max(rows, blocks) / 2 else None
        )
        w2_rank = None if full_matrix or rank >= max(columns, width) / 2 else rank
        tucker = tucker and w2_rank is not None and shape.taps > 1
        return cls(shape, rank, alpha, (rows, columns, blocks, width), w1_rank, w2_rank, tucker)

    @property
    def has_rank(self) -> bool:
        return self.w1_rank is not None or self.w2_rank is not None

    @property
    def ignores_alpha(self) -> bool:
        return not self.has_rank

    @property
    def scale(self) -> float:
        return super().scale if self.has_rank else 1.0

    @property
    def scale_reason(self) -> str:
        full = "both sides full: scale 1 whatever alpha says"
        return super().scale_reason if self.has_rank else full

    @property
    def saved_alpha(self) -> float | None:
        if not self.has_rank:  # readers ignore it; it only has to be a number
            return float(self.alpha) if self.alpha and isfinite(self.alpha) else 1.0
        return super().saved_alpha

    @property
    def _core_rank(self) -> int:
        """Columns of w2_down; 0 where w2 is full."""
        return (self.w2_rank or 0) if self.core_rank is None else self.core_rank

    def factors(self) -> dict[str, Factor]:
        rows, columns, blocks, width = self.split
        if self.w1_rank is None:
            out = {"w1": Factor("lokr_w1", plain=(rows, blocks))}
        else:
            out = {
                "w1_a": Factor("lokr_w1_a", plain=(rows, self.w1_rank)),
                "w1_b": Factor("lokr_w1_b", plain=(self.w1_rank, blocks)),
            }
        if self.w2_rank is None:
            return {**out, "w2": Factor("lokr_w2", width, columns, spatial=True)}
        down = Factor("lokr_w2_b", width, self._core_rank, spatial=not self.tucker, flat=True)
        up = Factor("lokr_w2_a", self.w2_rank, columns, flat=True, turned=self.tucker)
        core = (
            {"t2": Factor("lokr_t2", self._core_rank, self.w2_rank, spatial=True)}
            if self.tucker
            else {}
        )
        return {**out, "w2_down": down, **core, "w2_up": up}

    def init(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        rows, columns, blocks, width = self.split
        # The fan-in is that of the tensor as files store it; the side that starts at zero is w2's
        # last factor.
        fan_in = {
            "w1": blocks,
            "w1_a": self.w1_rank,
            "w1_b": blocks,
            "t2": self._core_rank * self.shape.taps,
        }
        fan_in["w2_up"] = columns if self.tucker else self.w2_rank
        forms = {name: self.flame_shape(factor) for name, factor in self.factors().items()}
        return {
            n: uniform(rng, form, fan_in[n]) if n in fan_in else zeros(form)
            for n, form in forms.items()
        }

    def _w1(self, p: Parameters) -> Array:
        if self.w1_rank is None:
            return p["w1"]
        a, b = p["w1_a"], p["w1_b"]
        return reshape(
            low_rank_weight(reshape(a, (1, *a.shape)), reshape(b, (1, *b.shape))),
            (a.shape[0], b.shape[1]),
        )

    def _w2(self, p: Parameters) -> Array:
        if self.w2_rank is None:
            return p["w2"]
        if self.tucker:
            return tucker_weight(_matrix(p["w2_down"]), p["t2"], _matrix(p["w2_up"]))
        return low_rank_weight(p["w2_down"], p["w2_up"])

    def delta_weight(self, weight: Array, p: Parameters, scale: Array) -> Array:
        w1, w2 = self._w1(p), self._w2(p)
        if w1.dtype != w2.dtype:  # the side that is a product is wide
            w1, w2 = (cast(w, max(w1.dtype, w2.dtype, key=lambda d: d.itemsize)) for w in (w1, w2))
        return by_columns(kron_weight(w1, w2, scale), p.get("mask"))

    def drop_ranks(self, p: Parameters, drop: DropRanks) -> dict[str, Array]:
        """With the mask of the outputs, (OUT,) wide, which no factor can take in."""
        some = value_of(next(p[name] for name in self.factors()))
        ones = module_of(some).ones(self.shape.outputs, wide_dtype(some.dtype))
        return {**p, "mask": drop(ones, 0, 0)}

    def changed(self, weight: Array, p: Parameters, scale: Array) -> Array | None:
        if self.w1_rank is not None and self.w2_rank is not None and not self.tucker:
            first = Sum("lr,rm->lm", p["w1_a"], p["w1_b"])
            second = Sum("tnr,rk->tnk", p["w2_down"], p["w2_up"][0])
            if small(first, second):
                return kron_changed(weight, *small_sums((first, second)), scale)
        return kron_changed(weight, self._w1(p), self._w2(p), scale)

    def square(self, weight: Array, p: Parameters, square: Array, scale: Array, axis: str) -> Array:
        if "mask" in p:
            return changed_square(weight, self.delta_weight(weight, p, scale), axis=axis)
        return kron_square(self._w1(p), self._w2(p), weight, square, scale, axis=axis)

    def svd(self, p: Mapping[str, np.ndarray], vectors: bool = True) -> Svd | None:
        if self.w2_rank is None:
            second = matrix_svd(flat_rows(p["w2"]), vectors)
        else:
            down = p["w2_down"] @ p["t2"] if self.tucker else p["w2_down"]
            second = product_svd(flat_rows(down), flat_rows(p["w2_up"]), vectors)
        whole = kron_svd(matrix_svd(self._w1(p).T, vectors), second)
        if whole.left is None:
            return whole
        # Rows are (block, tap, row of the block): the tap goes first.
        _, _, blocks, width = self.split
        rows = whole.left.reshape(blocks, self.shape.taps, width, -1).swapaxes(0, 1)
        return whole._replace(left=rows.reshape(whole.left.shape))

    def costs(self) -> dict[str, int]:
        costs, shape = super().costs(), self.shape
        if shape.window.groups > 1:  # an output's group depends on both of its halves: it is built
            return costs
        (rows, columns, blocks, width), taps = self.split, shape.taps
        if self.w2_rank is None:
            return {**costs, "blocks": rows * blocks * width + taps * shape.outputs * width}
        inner = taps * shape.inputs * self.w2_rank
        if self.tucker:
            inner = shape.inputs * self._core_rank + taps * blocks * self._core_rank * self.w2_rank
        return {**costs, "blocks": inner + self.w2_rank * rows * (blocks + columns)}

    def apply(
        self,
        change: Array | None,
        layer: Layer,
        x: Array,
        p: Parameters,
        scale: Array,
        columns: Array | None = None,
    ) -> Array:
        if self.route == "delta":
            return super().apply(change, layer, x, p, scale, columns)
        rows, outputs, blocks, width = self.split
        window, w1 = layer.window, cast(self._w1(p), x.dtype)
        if "mask" in p:
            columns = p["mask"] if columns is None else multiply(columns, p["mask"])
        # Scaled columns are no longer those of every block: each block gets its own.
        shared = columns is None
        if shared and in_one_piece(x, w1, (window.taps, width, outputs), window):
            w2 = cast(self._w2(p), x.dtype)  # small: a product of its factors costs next to nothing
            return kron_product(x, w1, w2, window, add=ready(change), scale=scale)
        if self.w2_rank is None:
            # Blocks of channels are mixed, then every block goes through w2.
            w2, blocked = by_columns(p["w2"], columns), window.grouped(rows, shared=shared)
            return pending(x, w2, blocked, add=change, scale=scale, before=by_mix(w1))
        inner, last, walk = x, p["w2_down"], window.grouped(blocks, shared=True)
        if self.tucker:
            inner, last = product(x, last, window.pointwise_like(blocks, shared=True)), p["t2"]
        # The mix runs between the factors, where the blocks are only rank wide.
        before = by_down_and_mix(last, w1, walk)
        up, outer = by_columns(p["w2_up"], columns), window.pointwise_like(rows, shared=shared)
        return pending(inner, up, outer, add=change, scale=scale, before=before)

    @classmethod
    def guess_shape(cls, tensors: Mapping[str, np.ndarray]) -> LayerShape:
        factored = "lokr_w1" not in tensors
        rows = extents(tensors, "lokr_w1_a" if factored else "lokr_w1")[0]
        blocks = extents(tensors, "lokr_w1_b" if factored else "lokr_w1")[1]
        if "lokr_w2" in tensors:
            columns, width = extents(tensors, "lokr_w2")
        else:
            columns = extents(tensors, "lokr_w2_a")["lokr_t2" in tensors]  # Tucker turns it
            width = extents(tensors, "lokr_w2_b")[1]
        window = kernel_of(tensors, "lokr_w2", "lokr_t2", "lokr_w2_b")
        return LayerShape(window, blocks * width, rows * columns)

    @classmethod
    def read(
        cls, shape: LayerShape, tensors: Mapping[str, np.ndarray], alpha: float | None
    ) -> LoKr:
        w1_rank = w2_rank = core_rank = None
        if "lokr_w1" in tensors:
            require_two_axes(tensors, "lokr_w1")
            rows, blocks = tensors["lokr_w1"].shape[:2]
        else:
            require_two_axes(tensors, "lokr_w1_a", "lokr_w1_b")
            rows, blocks = tensors["lokr_w1_a"].shape[0], tensors["lokr_w1_b"].shape[1]
            w1_rank = tensors["lokr_w1_b"].shape[0]
        tucker = "lokr_t2" in tensors
        if "lokr_w2" in tensors:
            require_two_axes(tensors, "lokr_w2")
            columns, width = tensors["lokr_w2"].shape[:2]
        else:
            require_two_axes(tensors, "lokr_w2_a", "lokr_w2_b", *(["lokr_t2"] if tucker else []))
            a, b = tensors["lokr_w2_a"], tensors["lokr_w2_b"]
            # Tucker turns w2_a: its rank stands first. w2_b has its rank first in both forms.
            w2_rank, columns = (a.shape if tucker else a.shape[::-1])[:2]
            core_rank = b.shape[0] if tucker else None
            flat = not tucker and b.ndim == 2
            if flat and b.shape[1] % shape.taps:
                raise ShapeError(
                    f"lokr_w2_b has shape {tuple(b.shape)}, expected a multiple of the "
                    f"{shape.taps} taps of {shape}"
                )
            width = b.shape[1] // shape.taps if flat else b.shape[1]
        rank = tensors["lokr_w2_b"].shape[0] if w2_rank is not None else (w1_rank or 0)
        split = (rows, columns, blocks, width)
        return cls(
            shape, rank, alpha, split, w1_rank, w2_rank, tucker and w2_rank is not None, core_rank
        )


def _matrix(factor: Array) -> Array:
    return reshape(factor, factor.shape[1:])
