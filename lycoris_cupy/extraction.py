"""The adapter that is nearest to a change of one layer: LoCon, LoCon Tucker, LoKr, or the change
itself.

A change is (taps, IN, OUT), f64, or f32 on a GPU, where all of it is computed then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from .adapters import Adapter, Full, LoCon, LoKr, SparseLoCon, factorization
from .adapters.sparse import RESIDUAL
from .arrays import Array, module_of, to_device
from .errors import LycorisError
from .layers import LayerShape
from .nearest_kron import nearest_kron
from .randomised import truncated_svd
from .ranks import RankRule
from .spectrum import locon_of
from .svd import flat_rows, matrix_svd
from .tucker import tucker2, tucker_rank

FORMS = ("locon", "tucker", "lokr", "full")
Params = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Form:
    """What to make of a change. kind: of FORMS; 'tucker' makes plain LoCons of linear layers. rule:
    the rank, of w2 for 'lokr' (None leaves it full). conv_rule: for kernels larger than one, None
    for the same. factor: of LoKr's split, as for a new adapter. sparsity: beside LoCons the entries
    of what they leave out from this quantile on are kept; None for none.
    """

    kind: str
    rule: RankRule | None = None
    conv_rule: RankRule | None = None
    factor: int = -1
    sparsity: float | None = None

    def __post_init__(self):
        if self.sparsity is not None and not 0 <= self.sparsity <= 1:
            raise LycorisError(f"sparsity is {self.sparsity:g}, expected a share between 0 and 1")
        if self.sparsity is not None and self.kind not in ("locon", "tucker"):
            raise LycorisError(f"sparsity goes with locon and tucker, not with {self.kind}")
        if self.kind not in FORMS:
            raise LycorisError(f"form {self.kind!r} is none of {', '.join(FORMS)}")
        if self.rule is None and self.kind in ("locon", "tucker"):
            raise LycorisError(f"form {self.kind!r} needs a rule for the rank")

    def rule_for(self, shape: LayerShape) -> RankRule | None:
        """The rule of a layer."""
        return self.conv_rule if self.conv_rule is not None and shape.taps > 1 else self.rule


def extract(shape: LayerShape, change: Array, form: Form) -> tuple[Adapter, Params]:
    """The adapter, with factors in Flame layout, f64, on the CPU.

    A low rank that would take no fewer numbers than the change itself becomes Full, which is exact.
    """
    adapter, params = _extract(shape, change, form)
    if form.sparsity is None or not isinstance(adapter, LoCon):
        return adapter, params
    rest = _rest(change, adapter, params)
    size = module_of(rest).abs(rest)
    rest = rest * (size >= module_of(rest).quantile(size, form.sparsity))
    sparse = SparseLoCon.over(adapter)
    return sparse, {**params, **_flame(sparse, {RESIDUAL: rest})}


def _extract(shape: LayerShape, change: Array, form: Form) -> tuple[Adapter, Params]:
    rule = form.rule_for(shape)
    if form.kind == "full":
        return _full(shape, change)
    if form.kind == "lokr":
        return _lokr(shape, change, rule, form.factor)
    assert rule is not None
    if form.kind == "tucker" and shape.taps > 1:
        return _tucker(shape, change, rule)
    found = truncated_svd(flat_rows(change), rule)
    rows, columns = found.svd.left.shape[0], shape.outputs  # pyright: ignore
    if found.rank * (rows + columns) >= rows * columns:
        return _full(shape, change)
    return locon_of(shape, found.svd, found.rank)


def relative_error(change: Array, adapter: Adapter, params: Params) -> float:
    """|change - what these factors give| / |change|, Frobenius, on the device of the change.

    params: as they are written, rounded; 0 of no change.
    """
    xp = module_of(change)
    whole = float(xp.linalg.norm(change))
    return float(xp.linalg.norm(_rest(change, adapter, params))) / whole if whole else 0.0


def _rest(change: Array, adapter: Adapter, params: Params) -> Array:
    """What the adapter leaves out of the change."""
    device = _device(change)
    wide = {n: to_device(v.astype(change.dtype), device) for n, v in params.items()}
    scale = to_device(np.array([adapter.scale], change.dtype), device)
    return change - adapter.delta_weight(None, adapter.canonical(wide), scale)  # pyright: ignore


def _full(shape: LayerShape, change: Array) -> tuple[Adapter, Params]:
    flame = shape.flame(shape.inputs, shape.outputs, True)
    return Full(shape), {"diff": _host(change).reshape(flame)}


def _tucker(shape: LayerShape, change: Array, rule: RankRule) -> tuple[Adapter, Params]:
    # The core of a file that other programs read is square.
    rank = min(tucker_rank(change, rule), shape.inputs, shape.outputs)
    down, mid, up, _ = tucker2(change, rank)
    if down.size + mid.size + up.size >= change.size:
        return _full(shape, change)
    adapter = LoCon(shape, rank, float(rank), tucker=True)
    return adapter, _flame(adapter, {"down": down, "mid": mid, "up": up})


def _lokr(
    shape: LayerShape, change: Array, rule: RankRule | None, factor: int
) -> tuple[Adapter, Params]:
    rows, columns = factorization(shape.outputs, factor)
    blocks, width = factorization(shape.inputs, factor)
    adapter = LoKr(shape, 1, 1.0, (rows, columns, blocks, width))
    w1, w2, _ = nearest_kron(change, adapter.split)
    if rule is not None:
        svd = matrix_svd(_host(flat_rows(w2)))
        rank = rule.choose(svd)
        down, up = svd.factors(rank)
        if down.size + up.size < w2.size:
            adapter = replace(adapter, rank=rank, alpha=float(rank), w2_rank=rank)
            return adapter, _flame(adapter, {"w1": w1, "w2_down": down, "w2_up": up})
    return adapter, _flame(adapter, {"w1": w1, "w2": w2})


def _flame(adapter: Adapter, factors: Mapping[str, Array]) -> Params:
    forms = adapter.factors()
    return {n: _host(v).reshape(adapter.flame_shape(forms[n])) for n, v in factors.items()}


def _host(array: Array) -> np.ndarray:
    return to_device(array, "cpu").astype(np.float64)


def _device(array: Array) -> str:
    return f"cuda:{array.device.id}" if module_of(array) is not np else "cpu"
