"""Sums of products of small arrays in one launch, against numpy.einsum in f64."""

import numpy as np
import pytest

from lycoris_cupy import bf16, to_device
from lycoris_cupy.ops.small_sums import Sum, _job, small, small_sums
from tests.arrays import drawn, host
from tests.bounds import assert_within, bound

SIZES = {"t": 3, "i": 4, "o": 5, "p": 2, "q": 6}
SPECS = [
    "tio,po->tip", "tio,tip->po", "tio,iq->tqo", "tip,tqp->iq", "tip,iq->tqp", "tqo,tqp->po", "ip,po->io",
]  # fmt: skip
LARGER = {"t": 9, "i": 40, "o": 33, "p": 16, "q": 7}


def arrays(spec, sizes, seed=0):
    rng = np.random.default_rng(seed)
    left, right = spec.split("->")[0].split(",")
    return [drawn(rng, *(sizes[axis] for axis in axes)) for axes in (left, right)]


@pytest.mark.parametrize("spec", SPECS)
def test_strides(spec):
    """The kernel's walk over a sum, by hand."""
    a, b = arrays(spec, SIZES)
    job, shape = _job(Sum(spec, a, b))
    (k0, k1), size = job["inner"], job["size"]
    out = np.zeros(int(size.prod()))
    for i, place in enumerate(np.ndindex(*size)):
        from_a, from_b = place @ job["a"], place @ job["b"]
        for k in np.ndindex(k0, k1):
            out[i] += a.flat[from_a + k @ job["a_inner"]] * b.flat[from_b + k @ job["b_inner"]]
    np.testing.assert_allclose(out.reshape(shape), np.einsum(spec, a, b), rtol=1e-12, atol=1e-12)
    assert job["blocks"] * 256 >= out.size * job["lanes"] > (job["blocks"] - 1) * 256
    assert job["lanes"] == (1 if k0 * k1 <= 16 else 8)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [bf16, np.dtype(np.float32), np.dtype(np.float64)], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("narrow", [False, True])
def test_sums(count, dtype, scaled, narrow):
    """narrow: both factors are of the storage dtype. The last specs have fewer axes."""
    wide = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    given = [(spec, *arrays(spec, LARGER, i)) for i, spec in enumerate(SPECS[-count:])]
    left = dtype if narrow else wide
    sums = [
        Sum(spec, to_device(a.astype(left), "cuda:0"), to_device(b.astype(dtype), "cuda:0"))
        for spec, a, b in given
    ]
    factor = 0.703125 if scaled else 1.0
    scale = to_device(np.array([factor], wide), "cuda:0") if scaled else None
    assert small(*sums)
    first, second = small_sums(sums, scale), small_sums(sums, scale)
    for (spec, a, b), found, again in zip(given, first, second, strict=True):
        exact = factor * np.einsum(spec, a, b)
        size = factor * np.einsum(spec, abs(a), abs(b))
        terms = a.size * b.size // exact.size  # more than are summed
        assert found.dtype == wide and (found == again).all()
        assert_within(host(found), exact, bound(exact, size, terms, wide), spec)


@pytest.mark.gpu
def test_many_short_sums():
    """What the two factors of a LoKr's sides are: a lane an element."""
    a, b = arrays("tnr,rk->tnk", {"t": 2, "n": 150, "r": 3, "k": 170})
    first, second = arrays("lr,rm->lm", {"l": 7, "r": 3, "m": 5}, 1)
    given = [("tnr,rk->tnk", a, b), ("lr,rm->lm", first, second)]
    sums = [Sum(s, *(to_device(v.astype(bf16), "cuda:0") for v in of)) for s, *of in given]
    for (spec, a, b), found in zip(given, small_sums(sums), strict=True):
        exact, size = np.einsum(spec, a, b), np.einsum(spec, abs(a), abs(b))
        assert_within(host(found), exact, bound(exact, size, 3, np.float32), spec)


@pytest.mark.gpu
def test_what_is_not_small():
    wide = to_device(np.ones((9, 700, 700), np.float32), "cuda:0")
    narrow = to_device(np.ones((16, 700), np.float32), "cuda:0")
    assert not small(Sum("tio,po->tip", wide, narrow))
    assert small(Sum("tio,po->tip", wide[:, :64, :64].copy(), narrow[:, :64].copy()))
    assert not small(Sum("tio,po->tip", wide[:, :64, :64], narrow[:, :64]))  # not contiguous
    assert not small(Sum("tio,po->tip", wide[:, :64, :64].copy(), narrow[:0, :64].copy()))
