"""What an algorithm amounts to with ranks dropped, written from the definitions in f64."""

import numpy as np

from lycoris_cupy import DiagOFT, Full, GLoRA, LoCon, LoHa, LoKr
from tests import masks
from tests.test_law import changed_weight, engine_with

P, SEED, STEP = 0.4, 2**40 + 3, 6


def kept(entries, kind, part=0, step=STEP):
    return masks.mask(entries, P, step=step, kind=kind + 256 * part, seed=SEED)


def ranks(scaled, step=STEP):
    """entries, which mask -> its entries, divided by their mean if scaled; zeros stay zeros."""

    def made(entries, part=0):
        m = kept(entries, 2, part, step)
        return m / m.mean() if scaled and m.any() else m

    return made


def largest(scaled, entries):
    """The most that a mask multiplies anything by."""
    return float(entries) if scaled else 1 / (1 - P)


def with_knobs(layer, adapter, factors, knobs, **options):
    engine = engine_with(layer, adapter, factors, **options)
    engine.set_dropout("a", seed=SEED, **knobs)
    return engine


def rotated(layer, adapter, factors, strength, made):
    """Diag-OFT's weight with entries of its rotations dropped."""
    a = factors["blocks"]
    q = a - a.swapaxes(1, 2)
    if adapter.constraint:
        q = q * min(1, adapter.constraint * adapter.shape.outputs / (np.sqrt((q**2).sum()) + 1e-8))
    one = np.eye(a.shape[1])
    r = (one + q) @ np.linalg.inv(one - q) * made(a.size).reshape(a.shape) / (1 - P)
    rescale = factors.get("rescale", np.ones(adapter.shape.outputs))
    reference = adapter.rule == "reference"
    turn = one + strength * (r - one) if reference else r
    blocks = layer.matrix.reshape(*layer.matrix.shape[:2], *a.shape[:2])
    turned = np.einsum("tikn,knm->tikm", blocks, turn).reshape(layer.matrix.shape) * rescale
    return turned if reference else layer.matrix + strength * (turned - layer.matrix)


def masked_factors(adapter, factors, made):
    """The factors of an algorithm whose mask lies on one of them."""
    out = dict(factors)
    if isinstance(adapter, GLoRA):
        for part, name in enumerate(("a1", "b1")):
            out[name] = out[name] * made(adapter.rank, part)[:, None]
    elif isinstance(adapter, LoCon):
        out["up"] = out["up"] * made(adapter.rank)[:, None]
    else:
        shape = out["blocks"].shape
        own = made(adapter.blocks if len(shape) > 2 else shape[0])
        out["blocks"] = out["blocks"] * own.reshape(-1, *(1,) * (2 if len(shape) > 2 else 1))
    return out


def masked_weight(layer, adapter, factors, strength, made):
    """Weight and bias with ranks dropped, as each algorithm counts them."""
    if isinstance(adapter, DiagOFT):
        return rotated(layer, adapter, factors, strength, made), layer.bias
    if isinstance(adapter, (LoHa, LoKr, Full)):
        weight, bias = changed_weight(layer, adapter, factors, strength)
        m = made(adapter.shape.outputs)
        return layer.matrix + (weight - layer.matrix) * m, layer.bias + (bias - layer.bias) * m
    return changed_weight(layer, adapter, masked_factors(adapter, factors, made), strength)
