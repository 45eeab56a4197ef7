"""Both gradients of a product of a few rows in one launch, and with those of the mix before it: by
every variant on a GPU of its kind, and the tiles followed in Python.
"""

from itertools import product

import numpy as np
import pytest

from lycoris_cupy import bf16, to_device
from lycoris_cupy.ops import counters, few_gpu, few_mixed_gpu, kron
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


@pytest.fixture(params=[1, 8])
def cluster(request, monkeypatch):
    """Of all plans, whose first way is taken."""
    monkeypatch.setattr(few_gpu, "_cluster_of", lambda *sizes: request.param)
    monkeypatch.setattr(few_gpu.plan, "choose", lambda what, seconds, *sizes: next(iter(seconds)))
    plans = few_gpu.plan_few, few_mixed_gpu.plan_few_mixed
    for made in plans:
        made.cache_clear()
    yield request.param
    for made in plans:
        made.cache_clear()


def draw(rng, *shape):
    return rng.standard_normal(shape, np.float32).astype(bf16)


def wide(array):
    return to_device(array, "cpu").astype(np.float64)


@pytest.mark.gpu
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_gradients(name, scaled, cluster, on_hopper):
    positions, inner, outer, blocks, window = shapes(name)
    rng = np.random.default_rng([*name.encode()])
    g, x, w = (
        draw(rng, *s)
        for s in ((positions, blocks * outer), (positions, blocks * inner), (1, inner, outer))
    )
    rows = positions * blocks
    flow, of = g.reshape(rows, outer).astype(np.float64), x.reshape(rows, inner).astype(np.float64)
    weight, factor = w[0].astype(np.float64), SCALE if scaled else 1
    on = [to_device(a, "cuda:0") for a in (g, x, w)]
    scale = to_device(SCALE, "cuda:0") if scaled else None
    found = [few_gpu.few_gradients(*on, window, scale) for _ in range(2)]
    (dx, dw), again = (list(map(wide, a)) for a in found)
    assert (dx == again[0]).all() and (dw == again[1]).all()
    assert dx.shape == x.shape and dw.shape == w.shape
    expected, size = factor * (flow @ weight.T), abs(flow) @ abs(weight).T
    limit = bound(expected, size, outer, bf16)
    assert_within(dx.reshape(rows, inner), expected, limit, name)
    expected, size = factor * (of.T @ flow), abs(of).T @ abs(flow)
    assert_within(dw[0], expected, bound(expected, size, rows, np.dtype(np.float32)), name)


@pytest.mark.gpu
def test_a_dx_wider_than_g_waits_for_others(cluster, on_hopper):
    rng = np.random.default_rng(0)
    shapes = (64, 16), (64, 72), (1, 72, 16)
    on = [to_device(draw(rng, *s), "cuda:0") for s in shapes]
    assert few_gpu.few_gradients(*on, FLAT, None) is None


def check_mixed(positions, w1_shape, n, k, scaled):
    (rows, columns), case = w1_shape, (positions, *w1_shape, n, k)
    rng, window = np.random.default_rng(case), FLAT.grouped(w1_shape[0], shared=True)
    g, x2 = draw(rng, positions, rows * k), draw(rng, positions, rows * n)
    w2, x, w1 = draw(rng, 1, n, k), draw(rng, positions, columns * n), draw(rng, rows, columns)
    on, scale = [to_device(a, "cuda:0") for a in (g, x2, w2, x, w1)], None
    factor = 1.0
    if scaled:
        scale, factor = to_device(SCALE, "cuda:0"), np.float64(SCALE[0])
    found = [few_mixed_gpu.few_mixed_gradients(*on, window, scale) for _ in range(2)]
    if positions * rows > 1024:
        assert found == [None, None]
        return
    results, again = (list(map(wide, a)) for a in found)
    assert all((a == b).all() for a, b in zip(results, again, strict=True))
    assert not wide(counters.counters().view(np.int32)).any()
    dx, dw1, dw2 = results
    assert (dx.shape, dw1.shape, dw2.shape) == (x.shape, w1.shape, w2.shape)

    apart = few_gpu.few_gradients(*on[:3], window, scale)
    assert (apart is None) == (n > k)
    if apart is not None:
        assert (wide(apart[1]) == dw2).all()
        assert (wide(kron.mix_gradients(apart[0], *on[3:])[0]) == dx).all()

    g, x2, x = (
        a.astype(np.float64).reshape(positions, blocks, -1)
        for a, blocks in ((g, rows), (x2, rows), (x, columns))
    )
    w2, w1 = w2[0].astype(np.float64), w1.astype(np.float64)
    expected, size = factor * g @ w2.T, factor * abs(g) @ abs(w2).T
    rounded = bound(expected, size, k + 1, bf16)  # flow's, which both results carry on
    flow, of_flow = expected, size + rounded

    def mixed(a, b):
        return np.einsum("lm,pln->pmn", a, b)

    def products(a, b):
        return np.einsum("pln,pmn->lm", a, b)

    limit = bound(mixed(w1, flow), mixed(abs(w1), of_flow), rows, bf16)
    limit += mixed(abs(w1), rounded)
    assert_within(dx.reshape(x.shape), mixed(w1, flow), limit, f"dx {case}")
    limit = bound(products(flow, x), products(of_flow, abs(x)), positions * n, np.dtype(np.float32))
    limit += products(rounded, abs(x))
    assert_within(dw1, products(flow, x), limit, f"dw1 {case}")
    expected, size = (
        factor * np.einsum("pln,plk->nk", *pair) for pair in ((x2, g), (abs(x2), abs(g)))
    )
    limit = bound(expected, size, positions * rows + 1, np.dtype(np.float32))
    assert_within(dw2[0], expected, limit, f"dw2 {case}")


@pytest.mark.gpu
@pytest.mark.parametrize("w1", [(8, 8), (2, 5), (16, 3), (4, 16)], ids=str)
@pytest.mark.parametrize("positions", [1, 7, 8, 9, 33, 64, 128])
def test_gradients_of_a_mix_too(positions, w1, cluster, on_hopper):
    for n, k, scaled in product((8, 16, 72, 384), (64, 200, 384), (False, True)):
        check_mixed(positions, w1, n, k, scaled)


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


def followed_mix(planned, L, M, flow, x, w1):
    """(dx, dw1) as few_mixed.cu shares the items of its tiles. Fails where one is done twice."""
    few = planned.few
    (rows, inner, _), tiles_i = few.numbers, -(-few.numbers[1] // 64)
    dx, dw1 = np.full((rows // L, M, inner), np.nan), np.zeros((L, M))
    for block, warp in product(range(few.back), range(4)):
        tile, rank = divmod(block, few.cluster)
        row, column = (n * 64 for n in divmod(tile, tiles_i))
        halves = 2 if inner - column > 32 else 1
        for item in range(rank + warp * few.cluster, 64 // L * halves, 4 * few.cluster):
            p, n = row // L + item // halves, column + item % halves * 32
            if p * L >= rows:
                continue
            to = slice(n, min(n + 32, inner))
            assert np.isnan(dx[p, :, to]).all()
            dx[p, :, to] = w1.T @ flow[p, :, to]
            dw1 += flow[p, :, to] @ x[p, :, to].T
    return dx, dw1


@pytest.mark.parametrize("w1", [(8, 8), (2, 5), (16, 3), (4, 16), (1, 2)], ids=str)
@pytest.mark.parametrize("n", [8, 40, 72, 384])
def test_the_items_cover_a_mix_once(n, w1, cluster):
    window, rng = FLAT.grouped(w1[0], shared=True), np.random.default_rng(0)
    for positions in (1, 9, 64):
        planned = few_mixed_gpu.plan_few_mixed(positions, (1, n, 200), w1, window, 132)
        flow, x, of = (
            rng.integers(-8, 8, s).astype(np.float64)
            for s in ((positions, w1[0], n), (positions, w1[1], n), w1)
        )
        dx, dw1 = followed_mix(planned, *w1, flow, x, of)
        assert (dx == np.einsum("lm,pln->pmn", of, flow)).all()
        assert (dw1 == np.einsum("pln,pmn->lm", flow, x)).all()


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


def test_what_mixed_is_for():
    def plan(positions, inner, outer, w1, groups=None):
        window = FLAT.grouped(groups or w1[0], shared=True)
        return few_mixed_gpu.plan_few_mixed(positions, (1, inner, outer), w1, window, 132)

    for sizes, side in (((64, 384, 384, (8, 8)), "8"), ((64, 16, 384, (8, 9)), "16")):
        planned = plan(*sizes)
        assert planned.launch.defines == {"CLUSTER": "1", "SIDE": side}
        assert few_gpu.plan.choose(*planned.ways) == "few, mixed"
    assert plan(64, 384, 64, (8, 8)) is not None  # its dx waits for nobody
    assert plan(4608, 384, 384, (8, 8)) is None  # many rows
    assert plan(64, 384, 384, (6, 8)) is None  # positions across tiles
    assert plan(16, 384, 384, (32, 8)) is None  # too many rows of w1
    assert plan(64, 384, 384, (8, 17)) is None  # or columns
    assert plan(64, 384, 384, (8, 8), groups=4) is None  # another w1
