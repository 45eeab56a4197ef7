"""Singular values from factors against the dense change, for every algorithm on every layer."""

import numpy as np
import pytest

from lycoris_cupy import LayerShape, LoCon, LoHa, LoKr, LycorisError, ShapeError
from lycoris_cupy.adapters import Adapter
from lycoris_cupy.ops.window import Window
from lycoris_cupy.spectrum import locon_of, spectrum_of
from lycoris_cupy.svd import Svd, kron_svd, matrix_svd, product_svd
from tests.cases import KINDS, PAIRS, adapters_for


def _is_a_sum(adapter):
    """Whether its change stands in its factors alone, whatever the weight."""
    return type(adapter).svd is not Adapter.svd


SUMS = [(kind, name) for kind, name in PAIRS if _is_a_sum(adapters_for(kind.shape)[name])]


def random_params(adapter, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(adapter.flame_shape(factor))
        for name, factor in adapter.factors().items()
    }


def dense(adapter, params):
    """The change as a matrix (taps * IN, OUT)."""
    scale = np.array([adapter.scale])
    change = adapter.delta_weight(None, adapter.canonical(params), scale)
    return change.reshape(-1, change.shape[-1])


@pytest.mark.parametrize("name", sorted(set(adapters_for(KINDS[0].shape))))
def test_a_change_that_depends_on_the_weight_has_no_spectrum_of_its_own(name):
    adapter = adapters_for(KINDS[0].shape)[name]
    if not _is_a_sum(adapter):
        with pytest.raises(LycorisError, match="depends on the weight it is put on"):
            spectrum_of(adapter, random_params(adapter))


@pytest.mark.parametrize("kind, name", SUMS, ids=lambda p: getattr(p, "name", p))
def test_the_spectrum_is_that_of_the_dense_change(kind, name):
    adapter = adapters_for(kind.shape)[name]
    params = random_params(adapter)
    change = dense(adapter, params)
    expected = np.linalg.svd(change, compute_uv=False)
    whole, values = spectrum_of(adapter, params), spectrum_of(adapter, params, vectors=False)
    for found in (whole.values, values.values):
        padded = np.zeros(max(expected.size, found.size))
        padded[: found.size] = found
        assert np.abs(padded[: expected.size] - expected).max() < 1e-12 * expected[0]
        assert (padded[expected.size :] < 1e-12 * expected[0]).all()
        assert (np.diff(found) <= 0).all()
    assert values.left is None and values.right is None
    assert np.abs((whole.left * whole.values) @ whole.right - change).max() < 1e-12 * expected[0]
    assert whole.rank == np.linalg.matrix_rank(change)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_a_locon_of_the_whole_rank_is_exact_and_of_less_is_the_best(kind):
    adapter = LoHa(kind.shape, 2, 3.0)
    params = random_params(adapter)
    change, svd = dense(adapter, params), spectrum_of(adapter, params)
    for rank in (svd.rank, svd.rank + 2, 1):
        locon, factors = locon_of(kind.shape, svd, rank)
        assert locon.scale == 1 and locon.rank == rank and not locon.tucker
        left_out = np.linalg.norm(dense(locon, factors) - change) / np.linalg.norm(change)
        assert left_out == pytest.approx(svd.error(rank), abs=1e-12)
    expected = np.linalg.svd(change, compute_uv=False)
    assert svd.error(1) == pytest.approx(np.linalg.norm(expected[1:]) / np.linalg.norm(expected))


def test_ranks_of_kronecker_products_multiply():
    """w1 of rank 2 (of 3), w2 factored with rank 2: exactly rank 4."""
    shape = LayerShape(Window(), 15, 14)
    lokr = LoKr(shape, 2, 2.0, (2, 7, 3, 5), None, 2)
    assert spectrum_of(lokr, random_params(lokr)).rank == 4


def test_a_negative_scale_turns_no_value():
    locon = LoCon(LayerShape(Window(), 5, 4), 2, -3.0)
    params = random_params(locon)
    svd = spectrum_of(locon, params)
    assert (svd.values >= 0).all()
    assert np.allclose((svd.left * svd.values) @ svd.right, dense(locon, params))


def test_numbers_of_a_spectrum():
    svd = Svd(np.array([3.0, 3.0, 0.0]))
    assert svd.rank == 2 and svd.effective_rank == pytest.approx(2)
    assert svd.norm == pytest.approx(18**0.5) and svd.error(1) == pytest.approx(0.5**0.5)
    assert svd.error(2) == 0 and svd.error(9) == 0
    nothing = Svd(np.zeros(2))
    assert (nothing.rank, nothing.effective_rank, nothing.norm, nothing.error(0)) == (0, 0, 0, 0)
    assert Svd(np.zeros(0)).rank == 0
    with pytest.raises(ShapeError, match="has its values only: ask for the vectors too"):
        svd.factors(1)


def test_large_matrices_go_by_the_gram_matrix():
    rng = np.random.default_rng(0)
    down, up = rng.standard_normal((600, 5)), rng.standard_normal((5, 520))
    found = matrix_svd(down @ up, vectors=False).values
    expected = product_svd(down, up).values
    assert found.shape == (520,) and np.allclose(found[:5], expected, rtol=1e-9)
    assert found[5:].max() < 1e-7 * expected[0]
    assert np.allclose(matrix_svd((down @ up).T, vectors=False).values[:5], expected, rtol=1e-9)


def test_kronecker_rows_and_columns():
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 3)), rng.standard_normal((5, 4))
    svd = kron_svd(matrix_svd(a), matrix_svd(b))
    assert np.allclose((svd.left * svd.values) @ svd.right, np.kron(a, b))


def test_empty_ranks():
    svd = product_svd(np.zeros((4, 0)), np.zeros((0, 3)))
    down, up = svd.factors(2)
    assert svd.values.size == 0 and not down.any() and up.shape == (2, 3)
