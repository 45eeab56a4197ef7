"""The arithmetic of a merge on every device, for every algorithm and dtype, against dense f64."""

import numpy as np
import pytest

from lycoris_cupy import bf16
from lycoris_cupy.io import merge_layer
from lycoris_cupy.io.header import NUMPY
from lycoris_cupy.io.merge import merge_files
from lycoris_cupy.io.merge_layer import Part, merge_into
from lycoris_cupy.io.safetensors import open_file, write
from tests.bounds import assert_within, bound
from tests.cases import KINDS, adapters_for

PAIRS = [
    (kind, name)
    for kind in KINDS
    if kind.name in ("linear odd", "conv3x2 dilation", "conv1d")
    for name in adapters_for(kind.shape)
]


def parts_of(kind, name, dtype, strengths=(0.7, -0.4)):
    rng = np.random.default_rng(2)
    adapter = adapters_for(kind.shape)[name]
    out = []
    for strength in strengths:
        params = {
            n: rng.standard_normal(adapter.flame_shape(f)).astype(dtype)
            for n, f in adapter.factors().items()
        }
        out.append(Part(adapter, params, strength))
    return rng.standard_normal(kind.weight).astype(dtype), out


def merged(weight, parts, device):
    """A changed copy, and what survived."""
    new = weight.copy()
    survival = merge_into("w", new, parts, device)
    return new, survival


def in_f64(weight, parts, absolute=False):
    total = np.abs(weight.astype(np.float64)) if absolute else weight.astype(np.float64)
    for adapter, params, strength in parts:
        wide = {n: v.astype(np.float64) for n, v in params.items()}
        scale = strength * adapter.scale
        if absolute:
            wide, scale = {n: np.abs(v) for n, v in wide.items()}, abs(scale)
        base = weight.astype(np.float64).reshape(*weight.shape[:2], -1).T
        change = adapter.delta_weight(base, adapter.canonical(wide), np.array([scale]))
        total = total + change.transpose(2, 1, 0).reshape(weight.shape)
    return total


def magnitude_of(weight, parts):
    """The formula over absolute values; for a change that depends on the weight, which may mix all
    of it, the sum over all of it.
    """
    if any(part.adapter.reads_weight for part in parts):
        sizes = [np.abs(weight).astype(np.float64).sum(), np.abs(in_f64(weight, parts)).sum()]
        return np.full(weight.shape, sum(sizes))
    return in_f64(weight, parts, absolute=True)


@pytest.mark.parametrize("dtype", [bf16, np.dtype(np.float32)], ids=str)
@pytest.mark.parametrize("kind, name", PAIRS, ids=lambda p: getattr(p, "name", p))
def test_two_adapters_and_one_rounding(device, kind, name, dtype, monkeypatch):
    monkeypatch.setattr(merge_layer, "_BLOCK", 200)  # several blocks, the last one short
    weight, parts = parts_of(kind, name, dtype)
    got, survival = merged(weight, parts, device)
    exact = in_f64(weight, parts)
    limit = bound(exact, magnitude_of(weight, parts), 40, dtype)
    assert got.dtype == dtype and got.shape == weight.shape
    assert_within(got.astype(np.float64), exact, limit, name)
    assert survival.share == pytest.approx(1, abs=0.05)


def test_f16_and_8_bit_bases(device):
    kind = KINDS[1]
    for name in ("F16", "F8_E4M3", "F8_E5M2"):
        weight, parts = parts_of(kind, "locon", np.dtype(np.float32), (0.1,))
        weight = (0.5 * weight).astype(NUMPY[name])
        got, _ = merged(weight, parts, device)
        exact = in_f64(weight, parts).astype(np.float32)
        # The f32 sums may differ in their last bits, so a value at a tie may go to either side.
        assert (got == exact.astype(NUMPY[name])).mean() > 0.98


class Doubled(type(adapters_for(KINDS[1].shape)["locon"])):
    """A change that depends on the weight: strength 1 doubles it."""

    reads_weight = True

    def delta_weight(self, weight, p, scale):
        return weight.astype(scale.dtype) * scale


@pytest.mark.parametrize("kind", [KINDS[1], KINDS[5]], ids=lambda k: k.name)
def test_a_change_may_read_the_weight(device, kind):
    weight, (part,) = parts_of(kind, "locon", bf16, (1.0,))
    doubled = Doubled(kind.shape, 3)
    for strengths, factor in ([[1.0], 2], [[1.0, 2.0], 4]):
        parts = [Part(doubled, part.params, strength) for strength in strengths]
        got, _ = merged(weight, parts, device)
        assert (got == (weight.astype(np.float32) * factor).astype(bf16)).all()


def test_files_on_a_device(device, tmp_path):
    base, style, out = (tmp_path / f"{n}.safetensors" for n in ("base", "style", "out"))
    write(base, {"a.weight": np.ones((4, 6), bf16)})
    write(style, {"lycoris_a.diff": np.full((4, 6), 0.5, bf16)})
    merge_files(base, [(style, 1.0), (style, 2.0)], out, device=device)
    with open_file(out) as file:
        assert (file["a.weight"] == 2.5).all()
