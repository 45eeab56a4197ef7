"""Changes of layers rewritten: as plain LoRA, with the scale in a factor, in another dtype; and how
much of the change that loses.

A loss is |D' - D| / |D|, Frobenius, over one layer's change with its scale, from the values as they
are written. Up to EXACT it is the rounding of f32, which counts as none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ..adapters import Adapter, Biased, DoRA, Full, LoCon, LoHa, LoKr
from ..adapters.biased import BIAS, without_bias
from ..adapters.dora import KEY
from ..spectrum import locon_of, spectrum_of
from ..svd import product_svd

EXACT = 1e-6
_NOISE = 1e-13  # of the f64 sums above
_F32 = np.dtype(np.float32)
_SCALED = {LoCon: ("up",), LoHa: ("w1_up",), LoKr: ("w1", "w1_a")}  # one factor takes the scale

Params = Mapping[str, np.ndarray]


def as_lora(adapter: Adapter, params: Params, rank: int | None) -> tuple[Adapter, Params, int]:
    """(LoCon, factors, the rank that is exact): the change as plain LoRA of at most this rank.

    Its factors are f32 (f64 from f64). A plain LoRA within the rank stays as it is. Raises
    LycorisError for an algorithm whose change depends on the layer's weight.
    """
    if isinstance(adapter, Biased):
        on, own, needed = as_lora(adapter.on, without_bias(params), rank)
        return Biased.over(on, adapter.scaled), {**own, BIAS: params[BIAS]}, needed
    if isinstance(adapter, Full) and adapter.bias:
        diff = {"diff": params["diff"]}
        on, own, needed = as_lora(replace(adapter, bias=False), diff, rank)
        return Biased.over(on), {**own, BIAS: params["diff_b"]}, needed
    if isinstance(adapter, DoRA):  # the change inside the norm is rewritten, the magnitudes stay
        on, own, needed = as_lora(adapter.on, _without_magnitude(params), rank)
        return DoRA.over(on, adapter.axis, adapter.rule), {**own, KEY: params[KEY]}, needed
    plain = type(adapter) is LoCon and not adapter.tucker and not adapter.per_tap  # type: ignore
    if plain and (rank is None or adapter.rank <= rank):
        return adapter, params, adapter.rank
    svd = spectrum_of(adapter, params)
    needed = max(svd.rank, 1)  # a LoRA of rank 0 has no factors to write
    found, wide = locon_of(adapter.shape, svd, needed if rank is None else min(needed, rank))
    f64 = any(value.dtype == np.float64 for value in params.values())
    return found, wide if f64 else _cast(wide, _F32), needed


def fold_scale(adapter: Adapter, params: Params) -> tuple[Adapter, Params]:
    """The same change at scale 1, for readers that know no alpha: a factor is multiplied by it.

    The factor keeps its dtype where that is exact, as for powers of 2, and becomes f32 elsewhere.
    """
    if isinstance(adapter, DoRA):
        on, params = fold_scale(adapter.on, params)
        return DoRA.over(on, adapter.axis, adapter.rule), params
    if adapter.scale == 1 or type(adapter) not in _SCALED:
        return adapter, params
    (name,) = set(_SCALED[type(adapter)]) & set(params)
    old = params[name]
    wide = old.astype(np.float64) * adapter.scale
    with np.errstate(over="ignore"):
        narrow = wide.astype(old.dtype)
    if not (narrow.astype(np.float64) == wide).all():
        narrow = wide.astype(_F32) if old.dtype != np.float64 else wide
    return replace(adapter, alpha=float(adapter.rank)), {**params, name: narrow}


def loss(before: tuple[Adapter, Params], after: tuple[Adapter, Params]) -> float:
    """|D' - D| / |D| of a layer's change; 0 of nothing. Of factors, where the change depends on the
    layer's weight.
    """
    before, after = _inside(before), _inside(after)
    if before[0] == after[0] and all(_equal(before[1][n], after[1][n]) for n in before[1]):
        return 0.0
    if _same_product(before, after):
        return 0.0
    if type(before[0]) is type(after[0]) and not _decomposes(before[0]):
        old, new = (_flat(side[1]) for side in (before, after))
        whole = float(np.linalg.norm(old))
        return float(np.linalg.norm(new - old)) / whole if whole else 0.0
    old, new = (spectrum_of(*side) for side in (before, after))
    assert old.left is not None and new.left is not None and old.right is not None
    assert new.right is not None
    if not old.norm:
        return 0.0 if not new.norm else float("inf")
    left = np.concatenate([old.left * old.values, new.left * -new.values], axis=1)
    lost = product_svd(left, np.concatenate([old.right, new.right]), False).norm / old.norm
    return lost if lost > _NOISE else 0.0


def beside(side: tuple[Adapter, Params]) -> dict[str, np.ndarray]:
    """What `loss` leaves out, f64: DoRA's magnitudes, and the change of the bias beside factors."""
    adapter, params = side
    out = {}
    if isinstance(adapter, Biased) or (isinstance(adapter, Full) and adapter.bias):
        change = adapter.delta_bias(params)
        assert change is not None
        out["the bias"] = change.astype(np.float64).ravel() * adapter.scale
    if isinstance(adapter, Biased):
        adapter, params = adapter.on, without_bias(params)
    if isinstance(adapter, DoRA):
        out[f"magnitudes per {adapter.axis}"] = params[KEY].astype(np.float64).ravel()
    return out


def _same_product(before: tuple[Adapter, Params], after: tuple[Adapter, Params]) -> bool:
    """Whether only the scale moved into a factor, exactly: no need to decompose anything."""
    (old, p), (new, q) = before, after
    if type(old) is not type(new) or old.factors() != new.factors() or type(old) not in _SCALED:
        return False
    (name,) = set(_SCALED[type(old)]) & set(p)
    sides = [side[name].astype(np.float64) * a.scale for a, side in (before, after)]
    return bool((sides[0] == sides[1]).all()) and all(_equal(p[n], q[n]) for n in p if n != name)


def cast_params(adapter: Adapter, params: Params, dtype: np.dtype | None) -> Params:
    """The factors in another dtype; None keeps theirs, and wide ones keep it always."""
    if dtype is None:
        return params
    forms = adapter.factors()
    return {**params, **_cast({n: v for n, v in params.items() if not forms[n].wide}, dtype)}


def _without_magnitude(params: Params) -> Params:
    return {name: value for name, value in params.items() if name != KEY}


def _inside(side: tuple[Adapter, Params]) -> tuple[Adapter, Params]:
    """Of DoRA the change whose norm it takes: its magnitudes pass as they are, as do biases."""
    adapter, params = side
    if isinstance(adapter, Biased):
        return _inside((adapter.on, without_bias(params)))
    if isinstance(adapter, Full) and adapter.bias:
        return replace(adapter, bias=False), {"diff": params["diff"]}
    return (adapter.on, _without_magnitude(params)) if isinstance(adapter, DoRA) else side


def _cast(params: Params, dtype: np.dtype) -> Params:
    with np.errstate(over="ignore"):  # what becomes infinite is said by the writer
        return {name: value.astype(dtype, copy=False) for name, value in params.items()}


def _decomposes(adapter: Adapter) -> bool:
    """Whether its change is a product of factors; that of Full is its own and only factor."""
    return type(adapter).svd is not Adapter.svd and not isinstance(adapter, Full)


def _flat(params: Params) -> np.ndarray:
    return np.concatenate([params[name].astype(np.float64).ravel() for name in sorted(params)])


def _equal(old: np.ndarray, new: np.ndarray) -> bool:
    return bool((old.astype(np.float64) == new.astype(np.float64)).all())
