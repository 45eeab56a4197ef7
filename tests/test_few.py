"""Both gradients of a product of a few rows in one launch: by every variant on a GPU of its kind,
and its tiles followed in Python.
"""

import numpy as np
import pytest

from lycoris_cupy import bf16, to_device
from lycoris_cupy.ops import extended_gpu, few_gpu
from lycoris_cupy.ops.window import Window
from tests.bounds import assert_within, bound

FLAT = Window()
SCALE = np.array([0.703125], np.float32)
# positions, (inner, outer), blocks. Tails in all three; more steps of dx, or of dw, than a ring has
# stages; tiles of dw that are no whole clusters.
CASES = {
    "LoRA": (64, (16, 3072), 1),
    "LoKr": (64, (384, 384), 8),
    "LoHa": (40, (256, 1032), 1),
    "one row": (1, (8, 8), 1),
    "blocks": (13, (72, 136), 5),
    "many rows": (1000, (24, 200), 1),
}


def shapes(name):
    positions, (inner, outer), blocks = CASES[name]
    window = FLAT.grouped(blocks, shared=True) if blocks > 1 else FLAT
    return positions, inner, outer, blocks, window


def force(cluster, monkeypatch):
    monkeypatch.setattr(few_gpu, "_cluster_of", lambda *sizes: cluster)
    monkeypatch.setattr(few_gpu.plan, "choose", lambda *ways: "few")
    few_gpu.plan_few.cache_clear()


@pytest.fixture(params=[1, 8])
def cluster(request, monkeypatch):
    force(request.param, monkeypatch)
    yield request.param
    few_gpu.plan_few.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_gradients(name, scaled, cluster):
    if not extended_gpu.hopper():
        pytest.skip("not a Hopper GPU")
    positions, inner, outer, blocks, window = shapes(name)
    rng = np.random.default_rng([*name.encode()])
    g, x, w = (
        rng.standard_normal(s, np.float32).astype(bf16)
        for s in ((positions, blocks * outer), (positions, blocks * inner), (1, inner, outer))
    )
    rows = positions * blocks
    flow, of = g.reshape(rows, outer).astype(np.float64), x.reshape(rows, inner).astype(np.float64)
    weight, factor = w[0].astype(np.float64), SCALE if scaled else 1
    on = [to_device(a, "cuda:0") for a in (g, x, w)]
    scale = to_device(SCALE, "cuda:0") if scaled else None
    found = [few_gpu.few_gradients(*on, window, scale) for _ in range(2)]
    dx, dw = (to_device(a, "cpu").astype(np.float64) for a in found[0])
    again = [to_device(a, "cpu").astype(np.float64) for a in found[1]]
    assert (dx == again[0]).all() and (dw == again[1]).all()
    assert dx.shape == x.shape and dw.shape == w.shape
    expected, size = factor * (flow @ weight.T), abs(flow) @ abs(weight).T
    limit = bound(expected, size, outer, bf16)
    assert_within(dx.reshape(rows, inner), expected, limit, name)
    expected, size = factor * (of.T @ flow), abs(of).T @ abs(flow)
    assert_within(dw[0], expected, bound(expected, size, rows, np.dtype(np.float32)), name)


def followed(planned, cluster, g, x, w):
    """What few.cu computes by its own indices. Fails where a value is written twice."""
    rows, inner, outer = planned.numbers
    tiles_r, tiles_i, tiles_o = (-(-n // 64) for n in (rows, inner, outer))
    dx, dw = np.full((rows, inner), np.nan), np.full((inner, outer), np.nan)
    sums = {}
    for block in range(planned.grid[0]):
        at, rank = divmod(block, cluster)
        back = at < tiles_r * tiles_i
        tile = at if back else (at - tiles_r * tiles_i) * cluster + rank
        row, column = (n * 64 for n in divmod(tile, tiles_i if back else tiles_o))
        if back:
            first, last = rank * tiles_o // cluster, (rank + 1) * tiles_o // cluster
            k = slice(first * 64, last * 64)
            part = g[row : row + 64, k] @ w[column : column + 64, k].T
            sums.setdefault((row, column), []).append(part)
        elif row < inner:
            assert np.isnan(dw[row : row + 64, column : column + 64]).all()
            of = x[: tiles_r * 64, row : row + 64].T
            dw[row : row + 64, column : column + 64] = of @ g[:, column : column + 64]
    for (row, column), parts in sums.items():
        assert len(parts) == cluster
        for rank in range(cluster):
            for i in range(64 // cluster * 8):
                r, c = row + i // 8 * cluster + rank, column + i % 8 * 8
                if r < rows and c < inner:
                    assert np.isnan(dx[r, c : c + 8]).all()
                    dx[r, c : c + 8] = sum(p[r - row, c - column : c - column + 8] for p in parts)
    return dx, dw


@pytest.mark.parametrize("name", CASES)
def test_the_tiles_cover_both_gradients_once(name, cluster):
    positions, inner, outer, blocks, window = shapes(name)
    planned = few_gpu.plan_few(positions, (1, inner, outer), window, 132)
    rng = np.random.default_rng(0)
    rows = positions * blocks
    g, x, w = (
        rng.integers(-8, 8, s).astype(np.float64)
        for s in ((rows, outer), (rows, inner), (inner, outer))
    )
    dx, dw = followed(planned, cluster, g, x, w)
    assert (dx == g @ w.T).all() and (dw == x.T @ g).all()


def test_what_it_is_for():
    def plan(positions, inner, outer, window=FLAT):
        return few_gpu.plan_few(positions, (1, inner, outer), window, 132)

    assert plan(64, 16, 3072).launch.defines == {"CLUSTER": "8"}
    assert plan(64, 384, 384, FLAT.grouped(8, shared=True)).launch.defines == {"CLUSTER": "1"}
    assert plan(4608, 16, 3072) is None  # many rows
    assert plan(64, 3072, 16) is None  # a wide dx
    assert plan(64, 3072, 3072) is None  # no small product
    assert plan(64, 12, 64) is None  # rows of dx that are no whole chunks
    assert plan(64, 16, 32, FLAT.grouped(4)) is None  # columns of their own
    assert few_gpu.plan_few(64, (9, 16, 32), Window.of((3, 3), 1, 1), 132) is None
