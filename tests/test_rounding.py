"""8-bit floats by tables against ml_dtypes, bit for bit; and how much of a change survives."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lycoris_cupy import bf16
from lycoris_cupy.io.header import NUMPY
from lycoris_cupy.io.merge import merge_files
from lycoris_cupy.io.rounding import Survival, rounded, widened
from lycoris_cupy.io.safetensors import open_file, write

SMALL = [NUMPY["F8_E4M3"], NUMPY["F8_E5M2"]]


@pytest.mark.parametrize("dtype", SMALL, ids=str)
def test_8_bit_floats_round_as_ml_dtypes_does(dtype):
    every = np.arange(256, dtype=np.uint8).view(dtype)
    wide = widened(every)
    assert wide.tobytes() == every.astype(np.float32).tobytes()
    finite = np.sort(wide[np.isfinite(wide)])
    ties = (finite[1:] + finite[:-1]) / 2
    near = [np.nextafter(ties, np.float32(to)) for to in (-np.inf, np.inf)]
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, np.uint32).view(np.float32)
    with np.errstate(invalid="ignore"):  # some are signalling NaN
        for values in (wide, ties, *near, bits, bits % 500):
            values = values.astype(np.float32)
            expected = values.astype(dtype).view(np.uint8)
            assert (rounded(values, dtype).view(np.uint8) == expected).all()


@given(st.floats(width=32), st.sampled_from(SMALL))
def test_8_bit_floats_round_once(value, dtype):
    value = np.array([value], np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        expected = value.astype(np.float64).astype(dtype)
        assert rounded(value, dtype).tobytes() == expected.tobytes() or np.isnan(value)


def survival_of(tmp_path, weight, change):
    base, style, out = (tmp_path / f"{n}.safetensors" for n in ("base", "style", "out"))
    write(base, {"a.weight": weight})
    write(style, {"lycoris_a.diff": change.astype(np.float32)})
    report = merge_files(base, [(style, 1.0)], out)
    with open_file(out) as file:
        got = file["a.weight"].astype(np.float64) - weight.astype(np.float64)
    return report, got


@pytest.mark.parametrize(
    "dtype", [*SMALL, bf16, np.dtype(np.float16), np.dtype(np.float32)], ids=str
)
@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0])
def test_what_survives_is_measured(tmp_path, dtype, size):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((40, 50)).astype(dtype)
    change = (size * rng.standard_normal((40, 50))).astype(np.float32)
    report, got = survival_of(tmp_path, weight, change)
    wide = change.astype(np.float64)
    (found,) = report.survival.values()
    assert found.share == pytest.approx((got * wide).sum() / (wide**2).sum(), rel=1e-4, abs=1e-5)
    lost = np.linalg.norm(got - wide) / np.linalg.norm(wide)
    assert found.error == pytest.approx(lost, rel=1e-3, abs=1e-6)
    lines = "\n".join(report.survival_lines())
    if dtype in SMALL and size == 1e-4:
        assert "rounded to F8" in lines and "a.weight: " in lines and found.share < 0.5
    if dtype == np.float32 and size == 1.0:
        assert not lines


def test_survival_adds_up():
    total = Survival(4, 2, 1).plus(Survival(4, 4, 0))
    assert total == (8, 6, 1) and total.share == 0.75 and total.error == pytest.approx(8**-0.5)
    assert str(total) == "75.0% of the change survives, with a relative error of 0.354"
    assert Survival().share == 1 and Survival().error == 0
