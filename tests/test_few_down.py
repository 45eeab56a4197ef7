"""The gradient of a LoKr's down in the launch of those behind it (see `test_few`): by every variant
on a GPU of its kind, its blocks followed in Python, and which launches a step takes.
"""

from itertools import product

import numpy as np
import pytest

from benchmarks.shapes import Shape
from lycoris_cupy import to_device
from lycoris_cupy.ops import counters, few_mixed_gpu
from tests.bounds import assert_within, bound
from tests.dry_gpu import Array, dry_gpu
from tests.launches import launches
from tests.test_few import FLAT, SCALE, cluster, draw, wide  # noqa: F401

SIDES = [(8, 8), (2, 5), (4, 16)]
PAIRS = 9  # tiles that few_down.cuh has room for


def check(positions, w1_shape, ranks, k, channels):
    (rows, columns), case = w1_shape, (positions, *w1_shape, ranks, k, channels)
    rng, window = np.random.default_rng(case), FLAT.grouped(w1_shape[0], shared=True)
    sizes = (
        (positions, rows * k),
        (positions, rows * ranks),
        (1, ranks, k),
        (positions, columns * ranks),
        (rows, columns),
        (positions, columns * channels),
    )
    *on, source = (to_device(draw(rng, *s), "cuda:0") for s in sizes)
    args = *on, window, to_device(SCALE, "cuda:0")
    apart = few_mixed_gpu.few_mixed_gradients(*args)
    found = [few_mixed_gpu.few_mixed_gradients(*args, source) for _ in range(3)]
    assert not wide(counters.counters().view(np.int32)).any()
    for again in found:
        for a, b in zip(again[:3], apart, strict=True):
            assert (wide(a) == wide(b)).all(), case
    if positions * columns > 1024:
        assert all(made[3] is None for made in found)
        return
    ddown, *others = (wide(made[3]) for made in found)
    assert ddown.shape == (1, channels, ranks) and all((ddown == a).all() for a in others)
    flow, of = wide(apart[0]).reshape(-1, ranks), wide(source).reshape(-1, channels)
    expected, size = of.T @ flow, abs(of).T @ abs(flow)
    limit = bound(expected, size, positions * columns, np.dtype(np.float32))
    assert_within(ddown[0], expected, limit, str(case))


@pytest.mark.gpu
@pytest.mark.parametrize("w1", SIDES, ids=str)
@pytest.mark.parametrize("positions", [1, 9, 64, 73, 128])
def test_gradients(positions, w1, cluster, on_hopper):  # noqa: F811
    for ranks, k, channels in product((8, 16), (64, 384), (8, 72, 384)):
        check(positions, w1, ranks, k, channels)


def followed(planned, positions, M, channels, source, dx):
    """ddown as the blocks of few_down.cuh make it, by pairs of tiles in a ring. Fails where a value
    is written twice, or a pair before it has been read."""
    few, rows = planned.few, positions * M
    (before,), (grid,), ranks = few.grid, planned.grid, few.numbers[1]
    ddown = np.full((channels, ranks), np.nan)
    assert before % few.cluster == grid % few.cluster == 0
    for block in range(before, grid):
        column = (block - before) * 64
        if column >= channels:
            continue
        steps, ring, total = -(-rows // 64), {}, 0
        ahead = min(steps, PAIRS)
        for copied in range(ahead):
            ring[copied % PAIRS] = copied
        for at in range(steps):
            if at >= ahead:  # by then all before the last one but PAIRS are read
                assert ring.pop(at % PAIRS) == at - PAIRS
                ring[at % PAIRS] = at
            assert ring[at % PAIRS] == at
            tile = slice(at * 64, at * 64 + 64)
            total = total + source[tile, column : column + 64].T @ dx[tile]
        assert np.isnan(ddown[column : column + 64]).all()
        ddown[column : column + 64] = total
    return ddown


@pytest.mark.parametrize("w1", SIDES, ids=str)
@pytest.mark.parametrize("channels", [8, 72, 384, 520])
def test_the_blocks_cover_it_once(channels, w1, cluster):  # noqa: F811
    window, rng = FLAT.grouped(w1[0], shared=True), np.random.default_rng(0)
    for positions, ranks in product((1, 9, 64), (8, 16)):
        sizes = positions, (1, ranks, 200), w1, window, 132
        alone = few_mixed_gpu.plan_few_mixed(*sizes)
        planned = few_mixed_gpu.plan_few_mixed(*sizes, channels)
        assert alone.grid == alone.few.grid == planned.few.grid
        source, dx = (rng.integers(-8, 8, (positions * w1[1], n)) for n in (channels, ranks))
        found = followed(planned, positions, w1[1], channels, source, dx)
        assert (found == source.T @ dx).all()


def test_which_sources_it_takes():
    def channels(source, positions=64, ranks=16, w1=(8, 8)):
        return few_mixed_gpu._channels(source, positions, (1, ranks, 384), w1)

    with dry_gpu(90):
        source = Array((64, 3072), "bfloat16")
        assert channels(source) == 384 and channels(source, ranks=8) == 384
        assert channels(source, ranks=24) == 0  # two tiles of ranks
        assert channels(Array((129, 3072), "bfloat16"), 129) == 0  # many rows
        assert channels(Array((64, 8 * 36), "bfloat16")) == 0  # rows that are no whole chunks
        assert channels(source[:, :1536]) == 0  # not contiguous
    with dry_gpu(80):
        assert channels(Array((64, 3072), "bfloat16")) == 0


def test_a_step_takes_three_launches():
    shape = Shape("linear", (3072, 3072), (64, 3072))
    assert launches(shape, "LoKr factor 8 r16") == ["skinny", "few_mixed", "skinny"]
