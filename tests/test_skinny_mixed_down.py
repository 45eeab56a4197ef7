"""Products of few positions that make the x2 of a LoKr with a factored w2 themselves: every variant
of the kernel by itself on a GPU of its kind; which blocks it is cut into, followed in Python by the
indices of skinny.cu, and where the planner takes it, which need none.
"""

import itertools
from math import prod

import numpy as np
import pytest

from lycoris_cupy import bf16, ops, plan, to_device
from lycoris_cupy.ops import before, skinny_gpu
from lycoris_cupy.ops import skinny_mixed_down_gpu as inside
from lycoris_cupy.ops.before import by_down_and_mix
from lycoris_cupy.ops.extended_gpu import Extra
from lycoris_cupy.ops.extended_plan import Second
from lycoris_cupy.ops.window import Window
from lycoris_cupy.tape import Tape
from tests.arrays import host, on_gpu
from tests.bounds import assert_within, bound
from tests.test_skinny import FLAT, SCALE, added, draw, only, times, totals

# L, M, N, K, ranks: blocks of x of less than 64 channels, whole steps of them and a tail; strips that
# end with a block of 40 or 200 columns; fewer blocks of x than a cluster has, and more than it divides.
CASES = {
    f"{rows} x {blocks}, {n} to {k}, rank {ranks}": (rows, blocks, n, k, ranks)
    for (rows, blocks), n, k, ranks in itertools.product(
        ((8, 8), (2, 5), (16, 3)), (64, 192, 384), (40, 200, 384), (8, 16)
    )
}
TAILS = {
    "a tail of 8": (3, 4, 72, 136, 16),
    "blocks of 8": (4, 16, 8, 8, 8),
    "one block out": (1, 6, 64, 264, 16),
    "many columns of w1": (2, 64, 64, 72, 16),
}
SOME = {name: CASES[name] for name in list(CASES)[::7]} | TAILS


@pytest.fixture
def planning(monkeypatch):
    yield from only(monkeypatch, skinny_gpu._plan, inside._plan_mixed_down)


@pytest.fixture
def taken(planning, on_hopper):
    return planning


def mixed(x, w1):
    """The mix in f64, of (positions, M * N)."""
    rows, blocks = w1.shape
    return np.einsum("lm,pmn->pln", w1, x.reshape(len(x), blocks, -1)).reshape(len(x), -1)


def check(case, positions, terms, name):
    rows, blocks, n, k, ranks = case
    rng = np.random.default_rng([*name.encode(), positions])
    columns, walk, other = rows * k, FLAT.grouped(blocks, True), FLAT.grouped(rows, True)
    x, w = draw(rng, (positions, blocks * n)), draw(rng, (1, blocks * n, columns))
    down, w1, up = draw(rng, (1, n, ranks)), draw(rng, (rows, blocks)), draw(rng, (1, ranks, k))
    beside = added(rng, terms, positions, columns)
    on, more = on_gpu(x, w, down, w1, up), on_gpu(*beside)
    planned = inside.mixed_down_plan(on[0], on[1], FLAT, *on[2:], other, *more)
    assert planned is not None
    extra = Extra(on[0], on[4], other, to_device(SCALE, "cuda:0"), more[2])
    ran = [
        inside.skinny_mixed_down(*on[:4], planned, extra, add=more[0], bias=more[1], keep=keep)
        for keep in (True, False, True)
    ]
    out = [host(y) for y, _ in ran]
    assert (out[0] == out[1]).all() and (out[0] == out[2]).all() and ran[1][1] is None
    x2, inner = map(host, ran[0][1])
    assert all((a == host(b)).all() for a, b in zip((x2, inner), ran[2][1], strict=True))
    exact, size = times(x, down, walk), times(abs(x), abs(down), walk)
    assert_within(inner, exact, bound(exact, size, n, bf16), f"inner, {name}")
    # The rest is made of the rounded inner. x2 is not rounded on the way, but for 2^-16 of each part
    # of it, which are 2^8 roundings of f32.
    exact, size = mixed(inner, w1), mixed(abs(inner), abs(w1))
    assert_within(x2, exact, bound(exact, size, blocks, bf16), f"x2, {name}")
    own = times(x, w), times(abs(x), abs(w))
    second = times(exact, up, other), times(size, abs(up), other)
    y, size = totals(own, second, *beside)
    depth = blocks * n + blocks + ranks + 4 + 2**8
    assert_within(out[0], y, bound(y, size, depth, bf16), name)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", inside.VARIANTS, ids=str)
@pytest.mark.parametrize("name", SOME)
def test_every_variant(name, variant, taken):
    taken(variant)
    check(SOME[name], 37, ("add", "bias", "bias2"), name)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_shapes(name, taken):
    taken()
    check(CASES[name], 64, ("bias",), name)


@pytest.mark.gpu
@pytest.mark.parametrize("positions", [1, 7, 16, 17, 63, 64, 65, 128])
@pytest.mark.parametrize("terms", [(), ("add", "bias2"), ("add", "bias", "bias2")], ids=str)
def test_positions(terms, positions, taken):
    taken()
    check(CASES["8 x 8, 384 to 384, rank 16"], positions, terms, "positions")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 30, 512), (2, 4, 8, 512)], ids=str)
def test_gradients_are_those_of_two_launches(shape, taken, monkeypatch):
    taken()
    rng = np.random.default_rng(0)
    x, w, down, w1, up = on_gpu(
        *(draw(rng, s) for s in (shape, (1, 512, 768), (1, 64, 16), (8, 8), (1, 16, 96)))
    )
    window = Window.of((1, 1)) if len(shape) == 4 else FLAT
    walk, other = window.grouped(8, shared=True), window.grouped(8, shared=True)
    scale = to_device(SCALE, "cuda:0")

    def step():
        tape = Tape()
        watched = [tape.watch(a) for a in (x, down, w1, up)]
        with plan.recording() as choices:
            change = ops.pending(
                watched[0],
                watched[3],
                other,
                scale=scale,
                before=by_down_and_mix(*watched[1:3], walk),
            )
            y = ops.extended(watched[0], w, window, change)
        g = to_device(np.ones(y.shape, bf16), "cuda:0")
        return choices[0].way, [host(a) for a in (y.value, *tape.gradients(y, g, watched))]

    way, found = step()
    monkeypatch.setattr(before, "mixed_down_plan", lambda *arrays: None)
    _, expected = step()
    assert way == "inside"
    for a, b in zip(found, expected, strict=True):
        assert np.linalg.norm(a - b) < 2.0**-8 * np.linalg.norm(b)


@pytest.mark.gpu
def test_what_is_not_a_number_stays_in_its_row(taken):
    taken()
    x = np.ones((50, 4 * 72))
    x[49, 71], x[3, 0] = np.nan, np.inf
    on = on_gpu(x, *(np.ones(s) for s in ((1, 288, 400), (1, 72, 8), (2, 4), (1, 8, 200))))
    other = FLAT.grouped(2, shared=True)
    planned = inside.mixed_down_plan(on[0], on[1], FLAT, *on[2:], other)
    extra = Extra(on[0], on[4], other, None)
    y, _ = inside.skinny_mixed_down(*on[:4], planned, extra, add=None, bias=None, keep=True)
    y = host(y)
    assert np.isnan(y[49]).all() and not np.isfinite(y[3]).any()
    rest = np.delete(y, [3, 49], axis=0)
    assert (rest == np.float64(np.float32(288 + 8 * 288).astype(bf16))).all()


def plan_of(rows, blocks, n, k, ranks, positions=64, window=FLAT, other=None, down=None):
    other = FLAT.grouped(rows, shared=True) if other is None else other
    down = (1, n, ranks) if down is None else down
    shapes = (positions, blocks * n), (1, blocks * n, rows * k), window, down, (rows, blocks)
    return inside.plan_mixed_down(*shapes, Second((1, ranks, k), other), 132)


def test_what_has_a_plan():
    planned = plan_of(8, 8, 384, 384, 16)
    assert planned.numbers == (64, 3072, 3072, 16, 384, 8)
    assert (planned.launch.defines["MIXED"], planned.launch.defines["RANKS"]) == ("1", "16")
    # As many steps of 64 channels for each block as without the mix: 8 blocks of x for 4.
    assert (planned.tile, planned.cluster, planned.grid) == (64, 4, (192, 1))
    assert plan_of(8, 8, 384, 384, 16, positions=129) is None
    assert plan_of(8, 8, 384, 384, 24) is None and plan_of(8, 8, 384, 384, 4) is None
    assert plan_of(8, 8, 384, 384, 16, window=Window.of((3, 3))) is None
    assert plan_of(8, 8, 384, 384, 16, other=FLAT) is None
    assert plan_of(8, 8, 384, 384, 16, down=(1, 384, 8)) is None
    assert plan_of(8, 8, 384, 384, 16, down=(1, 192, 16)) is None
    assert plan_of(2, 5, 36, 40, 16) is None and plan_of(2, 5, 64, 36, 16) is None
    assert plan_of(2, 64, 64, 40, 16) is not None and plan_of(2, 65, 64, 40, 16) is None
    assert plan_of(2, 1, 64, 40, 16) is None  # nothing to mix


def test_no_block_of_a_cluster_is_without_a_block_of_x():
    for case in (CASES | TAILS).values():
        assert plan_of(*case).cluster <= case[1]


def followed(planned, x, w, down, w1, up):
    """(y, x2, inner) as skinny.cu computes them by its own indices. Fails where a value is written
    twice."""
    positions, columns, width, ranks, block, blocks = planned.numbers
    tile, cluster, (grid, bands) = planned.tile, planned.cluster, planned.grid
    n, strips = width // blocks, -(-block // tile)
    y = np.full((positions, columns), np.nan)
    x2 = np.full((positions, columns // block, ranks), np.nan)
    inner = np.full((positions, blocks, ranks), np.nan)
    for band, strip in np.ndindex(bands, grid // cluster):
        at = slice(band * 64, min(band * 64 + 64, positions))
        b = strip // strips
        column = b * block + strip % strips * tile
        past = min(column + tile, (b + 1) * block)
        sums, parts = np.zeros((at.stop - at.start, past - column)), 0
        for rank in range(cluster):
            part = np.zeros((at.stop - at.start, ranks))
            for m in range(rank * blocks // cluster, (rank + 1) * blocks // cluster):
                own = np.zeros_like(part)
                for k in range(0, n, 64):
                    step = slice(m * n + k, m * n + min(k + 64, n))
                    sums += x[at, step] @ w[step, column:past]
                    own += x[at, step] @ down[k : k + 64]
                if strip == 0:
                    assert np.isnan(inner[at, m]).all()
                    inner[at, m] = own
                part += w1[b, m] * own
            sums += part @ up[:, column - b * block : past - b * block]
            parts += part
        assert np.isnan(y[at, column:past]).all()
        y[at, column:past] = sums
        if strip % strips == 0:
            assert np.isnan(x2[at, b]).all()
            x2[at, b] = parts
    return y, x2.reshape(positions, -1), inner.reshape(positions, -1)


@pytest.mark.parametrize("variant", [None, *inside.VARIANTS], ids=str)
@pytest.mark.parametrize("name", SOME)
def test_the_blocks_cover_the_sums_once(name, variant, planning):
    planning(variant)
    rows, blocks, n, k, ranks = SOME[name]
    planned = plan_of(*SOME[name], positions=70)
    rng = np.random.default_rng(0)
    # Whole numbers, so that the order of a sum makes no difference.
    shapes = (70, blocks * n), (blocks * n, rows * k), (n, ranks), (rows, blocks), (ranks, k)
    x, w, down, w1, up = (rng.integers(-8, 8, s).astype(np.float64) for s in shapes)
    y, x2, inner = followed(planned, x, w, down, w1, up)
    walk, other = FLAT.grouped(blocks, shared=True), FLAT.grouped(rows, shared=True)
    assert (inner == times(x, down[None], walk)).all()
    assert (x2 == mixed(inner, w1)).all()
    assert (y == x @ w + times(x2, up[None], other)).all()
    assert planned.grid[0] == rows * -(-k // planned.tile) * planned.cluster
    assert prod(planned.grid) == planned.grid[0] * 2
