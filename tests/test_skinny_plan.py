"""Which strips and steps a product of few positions is cut into, followed in Python by the indices of
skinny.cu, and when the planner takes it.
"""

from math import prod

import numpy as np
import pytest

from lycoris_cupy import bf16, plan
from lycoris_cupy.ops import product_ways, skinny_gpu
from lycoris_cupy.ops.extended_plan import Second
from lycoris_cupy.ops.window import Window
from tests.test_skinny import FORWARD

FLAT = Window()
PLAIN = {name: case for name, case in FORWARD.items() if "scale" not in case[-1]}


def second_of(width2, blocks, columns):
    if not width2:
        return None
    return Second((1, width2, columns // blocks), FLAT.grouped(blocks, shared=True))


def followed(planned, x, w, x2, w2):
    """What skinny.cu computes by its own indices: x (P, K) @ w (K, N) + the blocks of x2 @ w2. Fails
    where a value is written twice."""
    positions, columns, width, width2, block, _ = planned.numbers
    tile, cluster, (grid, bands) = planned.tile, planned.cluster, planned.grid
    pieces = tile // 8
    y = np.full((positions, columns), np.nan)
    for band, strip in np.ndindex(bands, grid // cluster):
        start = band * 64
        rows = min(positions - start, 64)
        strips = -(-block // tile)
        b = strip // strips
        column = b * block + strip % strips * tile
        past = min(column + tile, (b + 1) * block)
        steps2 = -(-width2 // 64)
        steps = steps2 + -(-width // 64)
        sums, taken = np.zeros((cluster, rows, past - column)), 0
        for rank in range(cluster):
            first, last = rank * steps // cluster, (rank + 1) * steps // cluster
            for s in range(first, min(last, steps2)):
                k = slice(s * 64, min(s * 64 + 64, width2))
                part = x2[start : start + 64, b * width2 : (b + 1) * width2][:, k]
                sums[rank] += part @ w2[k, column - b * block : past - b * block]
                taken += 1
            for s in range(max(first, steps2) - steps2, last - steps2):
                k = slice(s * 64, s * 64 + 64)
                sums[rank] += x[start : start + 64, k] @ w[k, column:past]
                taken += 1
        assert taken == steps
        for rank in range(cluster):
            own = range(rank * pieces // cluster, (rank + 1) * pieces // cluster)
            assert all(((j + 1) * cluster - 1) // pieces == rank for j in own)
            for n in (column + 8 * j for j in own if column + 8 * j < past):
                assert np.isnan(y[start : start + rows, n : n + 8]).all() and n + 8 <= past
                y[start : start + rows, n : n + 8] = sums[..., n - column : n - column + 8].sum(
                    axis=0
                )
    return y


@pytest.mark.parametrize("tile", [None, *skinny_gpu.VARIANTS], ids=str)
@pytest.mark.parametrize("name", PLAIN)
def test_the_blocks_cover_the_sum_once(name, tile, monkeypatch):
    if tile is not None:
        monkeypatch.setattr(skinny_gpu, "_choose", lambda *sizes: tile)
    skinny_gpu._plan.cache_clear()
    shape, columns, width2, blocks, _ = PLAIN[name]
    second = second_of(width2, blocks, columns)
    planned = skinny_gpu.plan_forward(shape, (1, shape[-1], columns), FLAT, second, 132)
    skinny_gpu._plan.cache_clear()
    rng = np.random.default_rng(0)
    # Whole numbers, so that the order of a sum makes no difference.
    x, w, x2, w2 = (
        rng.integers(-8, 8, s).astype(np.float64)
        for s in (
            (prod(shape[:-1]), shape[-1]),
            (shape[-1], columns),
            (prod(shape[:-1]), blocks * width2),
            (width2, columns // blocks),
        )
    )
    expected = x @ w
    for b in range(blocks):
        at = slice(b * columns // blocks, (b + 1) * columns // blocks)
        expected[:, at] += x2[:, b * width2 : (b + 1) * width2] @ w2
    assert (followed(planned, x, w, x2, w2) == expected).all()


@pytest.mark.parametrize("columns", [3072, 4096, 12288, 14336, 640, 2048, 128256, 8])
def test_a_plan_suits_the_device(columns):
    planned = skinny_gpu.plan_forward((64, 3072), (1, 3072, columns), FLAT, None, 132)
    grid, _ = planned.grid
    assert grid == -(-columns // planned.tile) * planned.cluster
    assert planned.launch.defines == {
        "TILE_N": str(planned.tile), "B_ROWS": "1", "CLUSTER": str(planned.cluster),
        "EACH": str(planned.each), "MIXED": "0",
    }  # fmt: skip
    if planned.each == 1:
        assert grid <= 132
    if 2048 <= columns <= 14336:
        assert 64 <= grid <= 264
    if columns == 3072:  # all of it under way at once, and few sums to send
        assert (planned.tile, planned.cluster, planned.each) in ((64, 3, 2), (64, 4, 2))
    if columns == 128256:  # several turns each: no more parts of a sum than must be
        assert planned.cluster == 1
    if columns < 2048:  # as many blocks as there are
        assert planned.cluster == 8


def test_few_positions_have_wide_strips():
    for positions in (1, 8, 9, 64):
        planned = skinny_gpu.plan_forward((positions, 3072), (1, 3072, 3072), FLAT, None, 132)
        assert (planned.tile == 128) == (positions < 9)


def test_a_turned_plan():
    planned = skinny_gpu.plan_dx(
        (64, 12288), (1, 3072, 12288), FLAT, Second((1, 3072, 16), FLAT), 132
    )
    assert planned.numbers == (64, 3072, 12288, 16, 3072, 1)
    assert planned.w_box == (1, planned.tile, 64) and planned.launch.defines["B_ROWS"] == "0"


def test_rows_of_blocks_that_share_w():
    shared = FLAT.grouped(8, shared=True)
    planned = skinny_gpu.plan_forward((64, 3072), (1, 384, 16), shared, None, 132)
    assert planned.numbers == (512, 16, 384, 0, 16, 1) and planned.grid[1] == 8
    planned = skinny_gpu.plan_dx((64, 128), (1, 384, 16), shared, None, 132)
    assert planned.numbers == (512, 384, 16, 0, 384, 1) and planned.grid[1] == 8
    assert skinny_gpu.plan_forward((129, 3072), (1, 384, 16), shared, None, 132) is None
    second = Second((1, 16, 16), FLAT)
    assert skinny_gpu.plan_forward((64, 3072), (1, 384, 16), shared, second, 132) is None


def test_what_has_no_plan():
    x, w = (64, 72), (1, 72, 40)
    forward, dx = skinny_gpu.plan_forward, skinny_gpu.plan_dx
    assert forward(x, w, FLAT, None, 132) is not None
    assert forward((129, 72), w, FLAT, None, 132) is None
    assert forward((0, 72), w, FLAT, None, 132) is None
    assert forward(x, (1, 36, 40), FLAT.grouped(2), None, 132) is None
    assert forward((1, 3, 3, 72), (9, 72, 40), Window.of((3, 3)), None, 132) is None
    assert (
        forward(x, (1, 72, 24), FLAT, Second((1, 8, 12), FLAT.grouped(2, shared=True)), 132) is None
    )
    assert forward(x, w, FLAT, Second((1, 4, 8), FLAT.grouped(5, shared=True)), 132) is None
    assert (
        forward(x, w, FLAT, Second((1, 4, 40), FLAT.grouped(2)), 132) is None
    )  # columns of their own
    assert dx((64, 40), (1, 72, 40), FLAT, Second((1, 72, 16), FLAT), 132) is not None
    assert dx((64, 40), (1, 12, 40), FLAT, None, 132) is None
    nine = FLAT.grouped(9, shared=True)
    assert dx((64, 40), (1, 72, 40), FLAT, Second((1, 8, 16), nine), 132) is not None
    assert dx((64, 40), (1, 72, 40), FLAT, Second((1, 8, 12), nine), 132) is None


def test_few_positions_and_a_term_are_one_launch():
    x, w = (16, 3072), (1, 3072, 3072)
    blocks = Second((1, 384, 384), FLAT.grouped(8, shared=True))
    for second in (Second((1, 16, 3072), FLAT), blocks):
        ways = product_ways.forward_ways(x, w, FLAT, second, True, True, bf16, 132)
        assert plan.choose(*ways) == "skinny"
        for other in (False, True):  # elsewhere, and with more positions
            rows = (4608 if other else 16, 3072)
            ways = product_ways.forward_ways(rows, w, FLAT, second, other, True, bf16, 132)
            assert "skinny" not in ways[1]
    ways = product_ways.dx_ways(
        x, w, FLAT, (16,), Second((1, 3072, 16), FLAT), True, True, bf16, 132
    )
    assert plan.choose(*ways) == "skinny"


def test_a_scale_goes_without_the_extended_product():
    ways = product_ways.forward_ways(
        (64, 3072), (1, 3072, 3072), FLAT, None, True, False, bf16, 132
    )
    assert set(ways[1]) == {"library", "skinny"}
