"""Outer products with a thin side, one and two in a launch, against f64; by every variant on a GPU of
its kind, whatever the planner would take.
"""

import numpy as np
import pytest

from benchmarks.shapes import Shape
from lycoris_cupy import ops, plan, to_device
from lycoris_cupy.ops import thin_outer_gpu as module
from lycoris_cupy.ops.thin_outer_gpu import Outer, plan_thin_outers, thin_outers
from lycoris_cupy.tape import Tape
from tests.arrays import drawn, host, on_gpu
from tests.bounds import assert_within, bound
from tests.launches import launches

SCALE = np.array([0.703125], np.float32)
# rows, ranks, columns of the first wide side and of the second, if there is one: fewer steps than blocks of a cluster
# and more, with tails; columns of one cluster and of many, with tails.
SIZES = [
    (1, 8, 8), (64, 16, 64), (513, 16, 200), (1000, 8, 648, 264), (4608, 16, 3072, 72), (37, 8, 8, 1032), (20000, 8, 136, 136), (577, 16, 16), (300, 16, 16, 640), (700, 24, 200, 72), (1000, 64, 1096), (577, 40, 72),
]  # fmt: skip


@pytest.fixture(params=range(3))
def variant(request, monkeypatch):
    """The first of each list, the second, and the last."""
    of = {thin: [v[min(request.param, len(v) - 1)]] for thin, v in module._VARIANTS.items()}
    monkeypatch.setattr(module, "_VARIANTS", of)
    monkeypatch.setattr(module.plan, "choose", lambda what, seconds, *sizes: next(iter(seconds)))
    plan_thin_outers.cache_clear()
    yield request.param
    plan_thin_outers.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("turned", [0, 1, 2], ids=["x wide", "g wide", "both"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_f64(size, turned, scaled, variant, on_hopper):
    rows, ranks, *columns = size
    rng = np.random.default_rng([*size, turned])
    scale, factor = (to_device(SCALE, "cuda:0"), SCALE[0]) if scaled else (None, 1.0)
    pairs = []
    for k, width in enumerate(columns):
        wide, thin = drawn(rng, rows, width), drawn(rng, rows, ranks)
        pairs.append((thin, wide) if (k if turned == 2 else turned) else (wide, thin))
    on = [Outer(*on_gpu(*pair), scale) for pair in pairs]
    runs = [thin_outers(*on) for _ in range(3)]
    for made, again, third, (x, g) in zip(*runs, pairs, strict=True):
        assert (host(made) == host(again)).all() and (host(made) == host(third)).all()
        assert made.shape == (1, x.shape[1], g.shape[1]) and made.dtype == np.float32
        size_of = factor * abs(x).T @ abs(g)
        limit = bound(factor * x.T @ g, size_of, rows + 1, np.float32)
        assert_within(host(made)[0], factor * x.T @ g, limit)


@pytest.mark.gpu
def test_what_is_not_a_number_stays_in_its_column(variant, on_hopper):
    """Past the ends are zeros of both operands, not products with what is there."""
    x, h = np.ones((300, 200)), np.ones((300, 8))
    x[299, 199], h[17, 3] = np.nan, np.inf
    ones = np.ones((300, 8)), np.ones((300, 200))
    first, second = thin_outers(*(Outer(*on_gpu(*p)) for p in ((x, ones[0]), (h, ones[1]))))
    first, second = host(first)[0], host(second)[0]
    assert np.isnan(first[199]).all() and (first[:199] == 300).all()
    assert np.isinf(second[3]).all() and (np.delete(second, 3, axis=0) == 300).all()


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", [1, 8])
def test_a_thin_weight_gradient_takes_it(blocks, on_hopper):
    rng = np.random.default_rng(1)
    window = ops.Window().grouped(blocks, shared=True) if blocks > 1 else ops.Window()
    x, w, g = drawn(rng, 700, blocks * 640), drawn(rng, 1, 640, 16), drawn(rng, 700, blocks * 16)
    tape, on = Tape(), on_gpu(x, w, g)
    v = tape.watch(on[1])
    with plan.recording() as choices:
        (found,) = tape.gradients(ops.product(on[0], v, window), on[2], [v])
    assert choices[-1].way == "thin outer"
    x, g = x.reshape(-1, 640), g.reshape(-1, 16)
    expected, size = x.T @ g, abs(x).T @ abs(g)
    assert_within(host(found)[0], expected, bound(expected, size, len(x), np.float32))


def test_plan():
    """A cluster of four for each 128 columns; two of them in one launch where that is better."""
    one = plan_thin_outers(4608, ((3072, 16),), 132)
    both = plan_thin_outers(4608, ((3072, 16), (16, 3072)), 132)
    assert one.grid == (96,) and both.grid == (192,)
    assert set(one.ways[1]) == {"thin outer", "library"}
    assert set(both.ways[1]) == {"thin outer", "one by one"}
    assert both.ways[1]["thin outer"] < 2 * one.ways[1]["thin outer"]


@pytest.mark.parametrize(
    "name, size, expected",
    [
        ("LoRA r16", (4608, 3072, 3072), ["extended_low_rank"] * 2 + ["thin_outer"]),
        ("LoRA r64", (4608, 3072, 3072), ["library", "extended", "library", "thin_outer", "extended"]),
        ("LoRA r16", (4096, 1280, 1280), ["library", "extended", "library", "thin_outer", "extended"]),
        (
            "LoKr factor 8 r16", (4096, 1280, 1280),
            ["library", "mix_blocks", "extended", "library", "mix_gradients", "column_sum", "thin_outer", "library", "library"],
        ),
    ],
)  # fmt: skip
def test_both_factors_have_their_gradients_from_one_launch(name, size, expected):
    positions, inputs, outputs = size
    shape = Shape("linear", (inputs, outputs), (positions, inputs))
    assert launches(shape, name) == expected


@pytest.mark.parametrize(
    "rows, shapes", [(64, ((640, 72),)), (64, ((640, 12),)), (64, ((636, 8),)), (0, ((640, 8),)),
                     (64, ((640, 8), (16, 640))), (64, ((640, 0),))], ids=str,
)  # fmt: skip
def test_what_has_no_plan(rows, shapes):
    """More ranks, rows that are no multiple of 16 bytes, no rows, thin sides that differ, none."""
    assert plan_thin_outers(rows, shapes, 132) is None
