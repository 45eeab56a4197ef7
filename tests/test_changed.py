"""W + dW in one pass over W: against the sum in f64, rounded once."""

import numpy as np
import pytest

from lycoris_cupy import bf16, to_device
from lycoris_cupy.arrays import wide_dtype
from lycoris_cupy.errors import DtypeError, ShapeError
from lycoris_cupy.ops.changed import (
    changed,
    hadamard_changed,
    kron_changed,
    low_rank_changed,
    scaled_changed,
)
from lycoris_cupy.ops.factored_gpu import strips, variant
from tests.bounds import assert_within, bound

SCALE = 0.703125
DTYPES = (bf16, np.dtype(np.float32), np.dtype(np.float64))


def draw(rng, *shape):
    return rng.standard_normal(shape).astype(bf16).astype(np.float64)


def host(array):
    return np.asarray(to_device(array, "cpu"), np.float64)


def scale_on(device, dtype):
    return to_device(np.array([SCALE], wide_dtype(dtype)), device)


def put(device, dtype, *arrays):
    return [to_device(a.astype(dtype), device) for a in arrays]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 5, 7), (9, 24, 40), (1, 0, 3)])
def test_a_change_is_added(shape, dtype, device):
    rng = np.random.default_rng(0)
    w, d = draw(rng, *shape), draw(rng, *shape) / 8
    (weight,), (delta,) = put(device, dtype, w), put(device, wide_dtype(dtype), d)
    out = changed(weight, delta)
    assert out.dtype == dtype and (host(weight) == w).all()
    assert_within(host(out), w + d, bound(w + d, abs(w) + abs(d), 2, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 5, 7), (9, 24, 40), (1, 0, 3)])
def test_a_scaled_change_is_added(shape, dtype, device):
    rng = np.random.default_rng(5)
    w, d = draw(rng, *shape), draw(rng, *shape) / 8
    out = scaled_changed(*put(device, dtype, w, d), scale_on(device, dtype))
    expected, size = w + SCALE * d, abs(w) + SCALE * abs(d)
    assert out.dtype == dtype
    assert_within(host(out), expected, bound(expected, size, 3, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "taps, inputs, rank, outputs",
    [
        (1, 24, 8, 40),
        (9, 7, 3, 11),
        (4, 8, 1, 1),
        (2, 301, 24, 520),  # tails in rows, columns and ranks
        (1, 600, 64, 136),
        (1, 130, 5, 264),  # a down that is given more columns
        (1, 9, 70, 16),  # more ranks than the kernel takes
        (1, 9, 0, 16),
        (3, 70001, 16, 8),  # strips of several tiles
    ],
)
def test_low_rank(taps, inputs, rank, outputs, dtype, device):
    rng = np.random.default_rng(1)
    w, down, up = (
        draw(rng, *s) for s in ((taps, inputs, outputs), (taps, inputs, rank), (1, rank, outputs))
    )
    out = low_rank_changed(*put(device, dtype, w, down, up), scale_on(device, dtype))
    expected = w + SCALE * down @ up
    size = abs(w) + SCALE * abs(down) @ abs(up)
    assert out.dtype == dtype
    assert_within(host(out), expected, bound(expected, size, rank + 2, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "taps, inputs, rank, outputs",
    [
        (1, 24, 8, 40),
        (9, 7, 3, 11),
        (2, 301, 16, 520),
        (1, 35, 1, 8),
        (1, 130, 33, 264),
        (3, 50, 64, 256),
        (1, 40001, 64, 200),  # strips of several tiles
        (1, 9, 70, 16),
    ],
)
def test_hadamard(taps, inputs, rank, outputs, dtype, device):
    """Tails in rows, columns and ranks; more ranks than the kernel takes."""
    rng = np.random.default_rng(3)
    w, down1, down2 = (draw(rng, taps, inputs, n) for n in (outputs, rank, rank))
    up1, up2 = draw(rng, 1, rank, outputs), draw(rng, 1, rank, outputs)
    out = hadamard_changed(*put(device, dtype, w, down1, up1, down2, up2), scale_on(device, dtype))
    expected = w + SCALE * (down1 @ up1) * (down2 @ up2)
    size = abs(w) + SCALE * (abs(down1) @ abs(up1)) * (abs(down2) @ abs(up2))
    # Two sums of `rank` terms are multiplied.
    assert_within(host(out), expected, bound(expected, size, 2 * rank + 4, dtype))


# taps, inputs, ranks of the core's two sides, outputs; rows whose tiles end with their tap, strips that
# begin and end inside one, of several taps or of one tile, and what the kernel does not take.
CORES = [
    (1, 16, 16, 16, 8),
    (4, 24, 8, 8, 40),
    (9, 33, 5, 5, 16),
    (9, 301, 16, 16, 264),
    (27, 17, 1, 1, 24),
    (4, 1, 17, 17, 136),
    (9, 50, 32, 32, 256),
    (3, 40, 33, 33, 16),
    (9, 47, 64, 64, 72),
    (9, 5003, 16, 16, 8),  # strips of several tiles
    (9, 5003, 32, 32, 8),
    (9, 5003, 64, 64, 8),
    (4, 9, 70, 70, 16),
    (3, 9, 4, 4, 11),
    (2, 9, 0, 0, 16),
]
UNEQUAL = [(9, 33, 24, 8, 40), (4, 50, 3, 30, 72), (3, 20, 64, 5, 16), (2, 9, 4, 0, 16)]


def with_core(rng, taps, inputs, rows, rank):
    """A down, and a core that makes values of about its size of it."""
    down, core = draw(rng, 1, inputs, rows), draw(rng, taps, rows, rank)
    return down, (core / max(rows, 1) ** 0.5).astype(bf16).astype(np.float64)


@pytest.mark.parametrize("factor", [SCALE, 0.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("taps, inputs, rows, rank, outputs", CORES + UNEQUAL)
def test_low_rank_with_a_core(taps, inputs, rows, rank, outputs, dtype, factor, device):
    rng = np.random.default_rng(4)
    w, up = draw(rng, taps, inputs, outputs), draw(rng, 1, rank, outputs)
    down, core = with_core(rng, taps, inputs, rows, rank)
    weight, down_on, up_on, core_on = put(device, dtype, w, down, up, core)
    scale = to_device(np.array([factor], wide_dtype(dtype)), device)
    out = low_rank_changed(weight, down_on, up_on, scale, core_on)
    assert out.dtype == dtype
    if not factor:
        assert (host(out) == w).all()
        return
    expected = w + SCALE * down @ core @ up
    size = abs(w) + SCALE * abs(down) @ abs(core) @ abs(up)
    # What down and core make counts with 16 bits, in two halves.
    limit = bound(expected, size, rows + rank + 4, dtype) + 2.0**-16 * size
    assert_within(host(out), expected, limit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("taps, inputs, rows, rank, outputs", CORES)
def test_hadamard_with_cores(taps, inputs, rows, rank, outputs, dtype, device):
    rng = np.random.default_rng(7)
    w, up1, up2 = draw(rng, taps, inputs, outputs), *(draw(rng, 1, rank, outputs) for _ in "12")
    (down1, core1), (down2, core2) = (with_core(rng, taps, inputs, rows, rank) for _ in "12")
    out = hadamard_changed(
        *put(device, dtype, w, down1, up1, down2, up2),
        scale_on(device, dtype),
        *put(device, dtype, core1, core2),
    )
    expected = w + SCALE * (down1 @ core1 @ up1) * (down2 @ core2 @ up2)
    size = SCALE * (abs(down1) @ abs(core1) @ abs(up1)) * (abs(down2) @ abs(core2) @ abs(up2))
    size += abs(w)
    limit = bound(expected, size, 2 * (rows + rank) + 4, dtype) + 2.0**-15 * size
    assert out.dtype == dtype
    assert_within(host(out), expected, limit)


def test_factors_that_are_views(device):
    """At addresses and with strides that the kernel cannot read 16 bytes at a time."""
    rng = np.random.default_rng(8)
    w, up = draw(rng, 2, 20, 24), draw(rng, 1, 17, 24)
    down, core = with_core(rng, 2, 20, 16, 16)
    weight, down_on, up_on, core_on = put(
        device, bf16, w, down.swapaxes(1, 2), up, core.swapaxes(1, 2)
    )
    out = low_rank_changed(
        weight, down_on.swapaxes(1, 2), up_on[:, 1:], scale_on(device, bf16), core_on.swapaxes(1, 2)
    )
    expected = w + SCALE * down @ core @ up[:, 1:]
    size = abs(w) + SCALE * abs(down) @ abs(core) @ abs(up[:, 1:])
    assert_within(host(out), expected, bound(expected, size, 36, bf16) + 2.0**-16 * size)


@pytest.mark.parametrize("wide", [(), (0,), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [(3, 2, 1, 5, 16), (2, 4, 9, 3, 7), (1, 1, 1, 1, 1), (5, 9, 2, 70, 640), (2, 3, 1, 7, 1032)],
)
def test_kron(sizes, dtype, wide, device):
    """wide: which of the factors are. More rows of blocks than a thread does, and a tail of them."""
    rows, columns, taps, n, k = sizes
    rng = np.random.default_rng(2)
    w1, w2 = draw(rng, rows, columns), draw(rng, taps, n, k)
    w = draw(rng, taps, columns * n, rows * k)
    delta = SCALE * np.stack([np.kron(w1.T, w2[t]) for t in range(taps)])
    (weight,) = put(device, dtype, w)
    dtypes = (wide_dtype(dtype) if i in wide else dtype for i in range(2))
    factors = [put(device, d, a)[0] for d, a in zip(dtypes, (w1, w2), strict=True)]
    out = kron_changed(weight, *factors, scale_on(device, dtype))
    assert out.dtype == dtype
    assert_within(host(out), w + delta, bound(w + delta, abs(w) + abs(delta), 3, dtype))


@pytest.mark.parametrize("tiles", [1, 2, 192, 1440])
@pytest.mark.parametrize("across", [1, 10, 96, 7813])
def test_strips_run_at_once(tiles, across):
    """Every tile has a strip, none is empty, and all of them fit unless the columns alone do not."""
    for held in (1, 2, 4, 6):
        grid, span = strips(tiles, across, held * 132)
        assert grid[0] == across and grid[1] * span >= tiles > (grid[1] - 1) * span
        assert across * grid[1] <= held * 132 or grid[1] == 1


def test_the_variant_with_enough_ranks_is_taken():
    for hadamard, core in ((0, 0), (1, 0), (0, 1), (1, 1)):
        for ranks, taken in ((1, 16), (16, 16), (17, 32), (32, 32), (33, 64), (64, 64)):
            found = variant(ranks, hadamard, core)
            assert int(found["RANKS"]) == taken
            assert int(found["WARPS"]) * int(found["AHEAD"]) <= 48  # 48 KB unasked
        assert variant(0, hadamard, core) is variant(65, hadamard, core) is None


def test_what_does_not_fit_is_refused():
    w, scale = np.zeros((1, 4, 6)), np.ones(1)
    with pytest.raises(ShapeError, match="weight has shape"):
        changed(w, np.zeros((1, 4, 5)))
    with pytest.raises(ShapeError, match="weight has shape"):
        low_rank_changed(w, np.zeros((1, 4, 2)), np.zeros((1, 2, 5)), scale)
    with pytest.raises(ShapeError, match="weight has shape"):
        kron_changed(w, np.zeros((2, 2)), np.zeros((1, 2, 2)), scale)
    with pytest.raises(ShapeError, match="weight has shape"):
        scaled_changed(w, np.zeros((1, 4, 5)), scale)
    with pytest.raises(DtypeError, match="cast one of them"):
        low_rank_changed(w, np.zeros((1, 4, 2), np.float32), np.zeros((1, 2, 6)), scale)
    with pytest.raises(ShapeError, match=r"up has shape \(1, 3, 6\), expected \(1, 2, 6\)"):
        low_rank_changed(w, np.zeros((1, 4, 2)), np.zeros((1, 3, 6)), scale)
    with pytest.raises(ShapeError, match=r"down has shape \(1, 4, 2\), expected \(1, 4, 3\)"):
        low_rank_changed(w, np.zeros((1, 4, 2)), np.zeros((1, 5, 6)), scale, np.zeros((1, 3, 5)))
    with pytest.raises(ShapeError, match="up2 has shape"):
        down, up = np.zeros((1, 4, 2)), np.zeros((1, 2, 6))
        hadamard_changed(w, down, up, down, up[:, 1:], scale)
