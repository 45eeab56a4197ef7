"""An adapter of a lower rank: the nearest of its own kind, from its factors.

LoCon       QR of both factors, SVD of the core between them
Tucker      the same, and Tucker-2 of the core
LoKr        the side w2, factored; the error of the product is the error of that side
DyLoRA      `cut`: the first ranks, as they are ordered by importance

The scale alpha / rank stays what it is, so alpha becomes scale * rank. A change is never built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from .adapters import Adapter, LoCon, LoKr, truncated
from .errors import LycorisError
from .ranks import RankRule
from .spectrum import locon_of
from .svd import Svd, flat_rows, matrix_svd, product_svd
from .tucker import tucker2, tucker_rank

Params = Mapping[str, np.ndarray]


class Resized(NamedTuple):
    """params: f64 where they were computed, as they were where nothing changed. error: relative,
    Frobenius, of the layer's change.
    """

    adapter: Adapter
    params: Params
    error: float


def resized(adapter: Adapter, params: Params, rule: RankRule) -> Resized:
    """The adapter at the rank that the rule chooses; itself where that is no less than its own.

    params: Flame layout, on the CPU. Raises LycorisError for an algorithm without such a form.
    """
    wide = adapter.canonical({n: np.asarray(v).astype(np.float64) for n, v in params.items()})
    if isinstance(adapter, LoCon):
        return (_tucker if adapter.tucker else _plain)(adapter, params, wide, rule)
    if isinstance(adapter, LoKr) and adapter.w1_rank is None:
        return _lokr(adapter, params, wide, rule)
    what = "LoKr with w1 factored" if isinstance(adapter, LoKr) else adapter.title
    raise LycorisError(
        f"{what} has no rank that can be lowered: make it plain LoRA first (lycoris-cupy convert "
        "--algorithm lora)"
    )


def cut(adapter: Adapter, params: Params, rank: int) -> Resized:
    """The first ranks of a plain LoCon or DyLoRA, alpha unchanged, so that the scale grows to alpha
    / rank, as a DyLoRA is trained. The error is that of the unscaled change.
    """
    if isinstance(adapter, LoCon) and adapter.rank <= rank:
        return Resized(adapter, params, 0.0)
    smaller, out = truncated(adapter, params, rank)
    rest = {"down": params["down"][..., rank:], "up": params["up"][..., rank:, :]}

    def norm(p: Params) -> float:
        down, up = (flat_rows(p[n].reshape(-1, *p[n].shape[-2:])) for n in ("down", "up"))
        return product_svd(down, up, vectors=False).norm

    whole = norm(params)
    return Resized(smaller, out, norm(rest) / whole if whole else 0.0)


def _plain(adapter: LoCon, params: Params, wide: Params, rule: RankRule) -> Resized:
    svd = adapter.svd(wide)
    assert svd is not None
    rank = rule.choose(svd)
    if rank >= adapter.rank:
        return Resized(adapter, params, 0.0)
    smaller, factors = locon_of(adapter.shape, svd, rank)
    return Resized(replace(smaller, alpha=adapter.scale * rank), factors, svd.error(rank))


def _tucker(adapter: LoCon, params: Params, wide: Params, rule: RankRule) -> Resized:
    left, first = np.linalg.qr(wide["down"][0])
    right, second = np.linalg.qr(wide["up"][0].T)
    core = first @ wide["mid"] @ second.T
    rank = tucker_rank(core, rule)
    if rank >= max(adapter.rank, adapter.down_rank):
        return Resized(adapter, params, 0.0)
    down, mid, up, error = tucker2(core, rank)
    # A side that had less than the rank of the other keeps what it has.
    smaller = replace(
        adapter, rank=up.shape[0], mid_rank=down.shape[1], alpha=adapter.scale * up.shape[0]
    )
    factors = {"down": left @ down, "mid": mid, "up": up @ right.T}
    return Resized(smaller, _flame(smaller, factors), error)


def _lokr(adapter: LoKr, params: Params, wide: Params, rule: RankRule) -> Resized:
    w1 = {"w1": params["w1"]}
    if adapter.tucker:
        left, first = np.linalg.qr(wide["w2_down"][0])
        right, second = np.linalg.qr(wide["w2_up"][0].T)
        core = first @ wide["t2"] @ second.T
        rank = tucker_rank(core, rule)
        if rank >= adapter.rank:
            return Resized(adapter, params, 0.0)
        down, mid, up, error = tucker2(core, rank)
        factors = {"w2_down": left @ down, "t2": mid, "w2_up": up @ right.T}
        ranks = {"w2_rank": up.shape[0], "core_rank": down.shape[1]}
    else:
        if adapter.w2_rank is None:
            svd, now = matrix_svd(flat_rows(wide["w2"])), _worth(adapter)
        else:
            svd = product_svd(flat_rows(wide["w2_down"]), flat_rows(wide["w2_up"]))
            now = adapter.w2_rank
        rank, error = rule.choose(svd), 0.0
        if rank >= now:
            return Resized(adapter, params, 0.0)
        factors, error = _two(svd, rank), svd.error(rank)
        ranks = {"w2_rank": rank}
    rank = ranks.get("core_rank", ranks["w2_rank"])  # what readers divide alpha by: rows of w2_b
    smaller = replace(adapter, rank=rank, alpha=adapter.scale * rank, **ranks)
    return Resized(smaller, {**w1, **_flame(smaller, factors)}, error)


def _two(svd: Svd, rank: int) -> Params:
    down, up = svd.factors(rank)
    return {"w2_down": down, "w2_up": up}


def _worth(adapter: LoKr) -> int:
    """The rank from which two factors of w2 are no smaller than w2 itself."""
    _, columns, _, width = adapter.split
    rows = adapter.shape.taps * width
    return -(-rows * columns // (rows + columns))


def _flame(adapter: Adapter, factors: Params) -> Params:
    forms = adapter.factors()
    return {n: v.reshape(adapter.flame_shape(forms[n])) for n, v in factors.items()}
