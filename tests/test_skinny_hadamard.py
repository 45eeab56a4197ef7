"""Products of few positions with a LoHa: every variant of the kernel by itself on a GPU of its kind;
and which places of the result its threads write, followed in Python by the indices of
skinny_hadamard.cu, and what has a plan, which need none.
"""

from math import prod

import numpy as np
import pytest

from lycoris_cupy import bf16, to_device
from lycoris_cupy.ops import skinny_hadamard_gpu as hadamard
from lycoris_cupy.ops.extended_gpu import hopper
from tests.arrays import host, on_gpu
from tests.bounds import ROUNDING, assert_within, bound
from tests.dry_gpu import dry_gpu
from tests.test_skinny import SCALE, draw

# x, columns, rank, terms. Tails in rows, columns and channels; more steps than a ring has stages,
# fewer than a cluster has blocks.
CASES = {
    "few steps": ((64, 64), 64, 16, "bias"),
    "rank 8": ((3, 264), 40, 8, "scale"),
    "full": ((64, 3072), 1024, 16, "scale add bias"),
    "an image": ((2, 3, 5, 72), 24, 8, "add"),
    "two tiles of rows": ((2, 50, 136), 200, 16, "scale bias"),
    "a vector": ((72,), 136, 16, ""),
    **{f"{p} positions": ((p, 456), 264, 16, "scale add") for p in (1, 3, 37, 63, 64, 65, 128)},
}


@pytest.fixture
def planning(monkeypatch):
    """planning(variant): only this one is taken, if it is not None."""

    def clear(variant=None):
        if variant is not None:
            monkeypatch.setattr(hadamard, "_choose", lambda *sizes: variant)
        hadamard._plan.cache_clear()

    yield clear
    clear()


@pytest.fixture(params=[None, *hadamard.VARIANTS], ids=str)
def variant(request, planning):
    if not hopper():
        pytest.skip("not a Hopper GPU")
    planning(request.param)


def drawn(rng, inputs, columns, rank):
    """w, (d1, u1, d2, u2)."""
    sides = (1, inputs, rank), (1, rank, columns)
    return draw(rng, (1, inputs, columns)), [draw(rng, shape) for shape in sides * 2]


def check(name, shape, turned, case, run):
    """run(x, w, factors, scale, add, bias) thrice, against f64."""
    _, columns, rank, terms = case
    rng = np.random.default_rng([*name.encode(), turned])
    inputs = case[0][-1]
    x, (w, factors) = draw(rng, shape), drawn(rng, inputs, columns, rank)
    d1, u1, d2, u2 = (a[0] for a in factors)
    s = SCALE[0] if "scale" in terms else 1
    change, most = s * (d1 @ u1) * (d2 @ u2), s * (abs(d1) @ abs(u1)) * (abs(d2) @ abs(u2))
    side = (lambda a: a.T) if turned else (lambda a: a)
    y = x @ side(w[0]) + x @ side(change)
    size = abs(x) @ side(abs(w[0]) + most)
    rounded = ROUNDING["bf16"] * (abs(x) @ side(abs(change)))  # of the change by itself
    add = draw(rng, y.shape) if "add" in terms else None
    bias = draw(rng, y.shape[-1:]) if "bias" in terms and not turned else None
    for more in (add, bias):
        if more is not None:
            y, size = y + more, size + abs(more)
    scale = to_device(SCALE, "cuda:0") if "scale" in terms else None
    on = on_gpu(x, w, *factors, add, bias)
    out = [host(run(*on[:2], on[2:6], scale, *on[6:])) for _ in range(3)]
    assert (out[0] == out[1]).all() and (out[0] == out[2]).all()
    limit = bound(y, size, 2 * shape[-1] + 2 * rank + 6, bf16) + rounded
    assert_within(out[0], y, limit, name)


def forward(x, w, factors, scale, add, bias):
    planned, _ = hadamard.hadamard_plans(x, w, *factors, add, bias)
    return hadamard.hadamard_forward(x, w, factors, planned, scale=scale, add=add, bias=bias)


def backward(g, w, factors, scale, add, _):
    planned = hadamard.plan_hadamard_dx(tuple(g.shape), tuple(w.shape), factors[0].shape[2], 132)
    return hadamard.hadamard_dx(g, w, factors, planned, scale=scale, add=add)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_forward(name, variant):
    check(name, CASES[name][0], False, CASES[name], forward)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_backward(name, variant):
    shape, columns, *_ = CASES[name]
    check(name, (*shape[:-1], columns), True, CASES[name], backward)


@pytest.mark.gpu
def test_the_change_is_rounded_by_itself(variant):
    """What w + change would lose: the products with w cancel, the change is 2^-10 of it."""
    x, w = np.ones((40, 256)), np.full((1, 256, 144), 64.0)
    x[:, 128:] = -1
    d1, d2, u = np.zeros((1, 256, 8)), np.ones((1, 256, 8)), np.full((1, 8, 144), 0.0625)
    d1[:, :128, 0] = 2
    on = on_gpu(x, w, d1, u, d2, u)
    assert (host(forward(*on[:2], on[2:], None, None, None)) == 128 * 0.0625).all()


@pytest.mark.gpu
def test_what_is_added_may_be_where_the_result_goes(variant):
    rng = np.random.default_rng(0)
    w, factors = drawn(rng, 200, 136, 16)
    x, w, *factors, add = on_gpu(draw(rng, (70, 200)), w, *factors, draw(rng, (70, 136)))
    planned, _ = hadamard.hadamard_plans(x, w, *factors, add)
    expected = host(forward(x, w, factors, None, add, None))
    more = {"scale": None, "add": add, "bias": None}
    assert hadamard.hadamard_forward(x, w, factors, planned, **more, out=add) is add
    assert (host(add) == expected).all()


@pytest.mark.gpu
def test_what_is_not_a_number_stays_in_its_row(variant):
    x = np.ones((50, 136))
    x[49, 71], x[3, 0] = np.nan, np.inf
    on = on_gpu(x, *(np.ones(s) for s in ((1, 136, 200), *((1, 136, 8), (1, 8, 200)) * 2)))
    y = host(forward(*on[:2], on[2:], None, None, None))
    assert np.isnan(y[49]).all() and not np.isfinite(y[3]).any()
    rest = np.delete(y, [3, 49], axis=0)
    assert (rest == np.float64(np.float32(136 * 65).astype(bf16))).all()


@pytest.mark.parametrize("tile", [None, *hadamard.VARIANTS], ids=str)
@pytest.mark.parametrize("positions", [1, 37, 64, 65, 128])
@pytest.mark.parametrize("columns", [8, 264, 640])
def test_each_value_is_written_once(columns, positions, tile, planning):
    planning(tile)
    planned = hadamard.plan_hadamard_forward((positions, 72), (1, 72, columns), 16, 132)
    tile, cluster, (grid, bands) = planned.tile, planned.cluster, planned.grid
    pieces, tiles = tile // 8, tile // 64
    threads = np.arange(128)
    lane, warp = threads % 32, threads // 32
    written = np.zeros((positions, columns), int)
    for band, block in np.ndindex(bands, grid):
        column, rank, start = block // cluster * tile, block % cluster, band * 64
        rows = min(positions - start, 64)
        added = -(-rows // 8) * tiles
        for piece in range(rank * pieces // cluster, (rank + 1) * pieces // cluster):
            assert ((piece + 1) * cluster - 1) // pieces == rank
            for half in (0, 1) if piece < added else ():
                p = piece // tiles * 8 + lane // 4
                n = column + piece % tiles * 64 + warp * 16 + half * 8
                inside = (n < columns) & (p < rows)
                for pair in (0, 1):
                    at = start + p[inside], (n + lane % 4 * 2 + pair)[inside]
                    np.add.at(written, at, 1)
    assert (written == 1).all()


@pytest.mark.parametrize("turned", [False, True])
def test_a_plan_suits_the_device(turned):
    make = hadamard.plan_hadamard_dx if turned else hadamard.plan_hadamard_forward
    width, columns = (12288, 3072) if turned else (3072, 12288)
    planned = make((64, width), (1, 3072, 12288), 16, 132)
    assert planned.numbers == (64, columns, width, 16, columns, 1)
    assert planned.w_box == (1, planned.tile if turned else 64, 64)
    assert planned.launch.defines["B_ROWS"] == str(int(not turned))
    # Reading w, and little else.
    assert 28e-6 < planned.seconds(2 * 3072 * 12288) < 36e-6
    planned = make((64, 3072), (1, 3072, 3072), 16, 132)
    assert (planned.tile, planned.cluster, planned.grid) == (64, 4, (192, 1))
    planned = make((1, 3072), (1, 3072, 3072), 16, 132)
    assert planned.tile == 128 and planned.grid[0] <= 132 * planned.each


def test_what_has_a_plan():
    def make(positions, inputs, columns, rank):
        return hadamard.plan_hadamard_forward((positions, inputs), (1, inputs, columns), rank, 132)

    assert make(128, 72, 40, 8) is not None
    for refused in ((129, 72, 40, 8), (0, 72, 40, 8), (1, 72, 40, 24), (1, 72, 40, 4)):
        assert make(*refused) is None
    assert make(1, 36, 40, 8) is None and make(1, 72, 36, 8) is None


def test_arrays_that_are_taken():
    def zeros(shape, dtype=bf16):
        return to_device(np.zeros(shape, dtype), device)

    with dry_gpu() as device:
        x, w, g = zeros((4, 5, 72)), zeros((1, 72, 40)), zeros((4, 5, 40))
        factors = [zeros(s) for s in ((1, 72, 8), (1, 8, 40)) * 2]
        scale, bias = zeros(1, np.float32), zeros(40)
        plans = hadamard.hadamard_plans(x, w, *factors, g, bias)
        y = hadamard.hadamard_forward(x, w, factors, plans[0], scale=scale, add=g, bias=bias)
        assert y.shape == (4, 5, 40) and prod(y.shape[:-1]) == plans[0].numbers[0]
        out = zeros(x.shape)
        assert hadamard.hadamard_dx(g, w, factors, plans[1], scale=None, add=x, out=out) is out
        d1, u1, d2, u2 = factors
        assert hadamard.hadamard_plans(x, w, d1, u1, d2, zeros((1, 16, 40))) is None
        assert hadamard.hadamard_plans(x, w, zeros((1, 72, 16)), u1, d2, u2) is None
        assert hadamard.hadamard_plans(zeros((4, 72), np.float32), w, *factors) is None
        assert hadamard.hadamard_plans(g, w, *factors) is None
    with dry_gpu(capability=80) as device:
        arrays = [zeros(a.shape) for a in (x, w, *factors)]
        assert hadamard.hadamard_plans(*arrays) is None
