"""DyLoRA: a LoRA trained at random ranks, so that it can be cut to any of them.  Valipour et al.
2022, arXiv 2210.07558.

    delta[t] = alpha / R * down[t, :, :R] @ up[:R]        for any R up to the rank

A step trains one block of ranks: those before it act but are not trained, those after it do not
act. alpha stays as it is when a file is cut, so that alpha / R is what a reader of that file
computes, and it is what is trained here. The files are LoRA's, but for an `up` without the axes of
a kernel. File keys: lora_down.weight (r, I, *kernel), lora_up.weight (O, r), alpha.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from ..arrays import Array
from ..errors import LycorisError
from ..layers import Layer, LayerShape
from ..ops.join import take_columns
from ..ops.ranks import take_rows
from ..tape import value_of
from .base import Adapter, Parameters
from .factor import Factor, require_two_axes
from .locon import LoCon
from .option import Option
from .thin import apply_low_rank


def draw_block(rng: np.random.Generator, rank: int, block_size: int = 1) -> tuple[int, int]:
    """(first, last): the block of ranks that a step trains, of `block_size`, each equally likely.

    The last block is shorter where block_size does not divide the rank. Raises LycorisError.
    """
    if not 1 <= block_size <= rank:
        raise LycorisError(f"block_size is {block_size}, expected 1 to the rank, {rank}")
    first = int(rng.integers(-(-rank // block_size))) * block_size
    return first, min(first + block_size, rank)


@dataclass(frozen=True)
class DyLoRA(LoCon):
    """A LoCon whose forward takes `ranks`: (first, last), ranks below last act, those from first on
    are trained. Without it all act and all are trained.
    """

    algorithm = "dylora"
    keys = ("lora_down.weight", "lora_up.weight")
    marks = ()  # told from a LoCon by the shape of its up, or by metadata
    conditions = ("ranks",)
    decomposable = False
    drops = ""  # its ranks are drawn already

    @classmethod
    def create(cls, shape: LayerShape, rank: int, alpha: float | None = None, **options) -> Adapter:
        for option in options:
            raise LycorisError(f"dylora has no option {option!r}: blocks are drawn by draw_block")
        return cls(shape, rank, alpha)

    @classmethod
    def options(cls) -> dict[str, Option]:
        return {}

    def factors(self) -> dict[str, Factor]:
        up = Factor("lora_up.weight", self.rank, self.shape.outputs, flat=True)
        return {**super().factors(), "up": up}

    def apply(
        self,
        change: Array | None,
        layer: Layer,
        x: Array,
        p: Parameters,
        scale: Array,
        columns: Array | None = None,
    ) -> Array:
        if "ranks" not in p:
            return super().apply(change, layer, x, p, scale)
        first, last = p["ranks"]
        if not 0 <= first < last <= self.rank:
            raise LycorisError(f"ranks {first} to {last} do not lie in the rank {self.rank}")
        scale = scale * (self.rank / last)  # scale is strength * alpha / rank
        for start, end, seen in ((0, first, value_of), (first, last, lambda factor: factor)):
            if start < end:
                down = take_columns(seen(p["down"]), ((start, end),))
                up = take_rows(seen(p["up"]), start, end)
                change = apply_low_rank(change, layer, x, down, up, scale)
        assert change is not None
        return change

    @classmethod
    def read(
        cls, shape: LayerShape, tensors: Mapping[str, np.ndarray], alpha: float | None
    ) -> DyLoRA:
        require_two_axes(tensors, "lora_down.weight", "lora_up.weight")
        return cls(shape, tensors["lora_up.weight"].shape[1], alpha)


def is_dylora(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether a LoCon's tensors are a DyLoRA's: `up` has no axes of a kernel, but `down` has."""
    up, down = tensors.get("lora_up.weight"), tensors.get("lora_down.weight")
    return up is not None and down is not None and up.ndim == 2 and down.ndim > 2


def truncated(
    adapter: Adapter, p: Mapping[str, np.ndarray], rank: int
) -> tuple[Adapter, dict[str, np.ndarray]]:
    """The adapter and its factors in Flame layout cut to the first `rank` ranks; alpha stays.

    Raises LycorisError for one that is not a plain LoRA, LoCon or DyLoRA, or has fewer ranks.
    """
    if not isinstance(adapter, LoCon) or adapter.tucker or adapter.per_tap:
        raise LycorisError(
            f"{adapter.algorithm} cannot be cut to a rank: only plain locon and dylora can"
        )
    if not 1 <= rank <= adapter.rank:
        raise LycorisError(f"rank is {rank}, expected 1 to the adapter's, {adapter.rank}")
    cut = replace(adapter, rank=rank, alpha=adapter.saved_alpha)
    down, up = np.asarray(p["down"]), np.asarray(p["up"])
    return cut, {
        "down": np.ascontiguousarray(down[..., :rank]),
        "up": np.ascontiguousarray(up[..., :rank, :]),
    }
