"""A linear layer and a LoKr with a full w2 in one launch, against f64; the kernel is called itself,
whatever the planner would take, on a GPU of its kind.
"""

import numpy as np
import pytest

from lycoris_cupy import bf16, ops, plan, to_device
from lycoris_cupy.ops import before, counters
from lycoris_cupy.ops.before import by_mix
from lycoris_cupy.ops.extended_mixed_gpu import mixed, mixed_plan, plan_mixed
from lycoris_cupy.ops.kron import _mix_blocks
from lycoris_cupy.ops.window import Window
from lycoris_cupy.tape import Tape
from tests.arrays import drawn, host, on_gpu
from tests.bounds import assert_within, bound

FLAT = Window()
SCALE = np.array([0.703125], np.float32)
# positions; L, M of w1; N, K of w2: one tile and many, rounds of them, tails of rows and of channels, fewer positions
# than blocks, more rows of tiles than a block's share touches.
SIZES = [
    (1, (2, 2), (8, 192)), (192, (3, 2), (64, 192)), (200, (8, 8), (72, 192)), (577, (2, 5), (136, 384)),
    (4608, (8, 8), (384, 384)), (1000, (16, 8), (40, 192)), (9000, (2, 3), (64, 576)), (30000, (2, 2), (32, 192)),
    (5, (2, 8), (200, 960)),
]  # fmt: skip


def blocks_of(array, count):
    return array.reshape(len(array), count, -1)


@pytest.mark.gpu
@pytest.mark.parametrize("terms", ["", "scale", "scale bias"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_f64(size, terms, on_hopper):
    positions, (rows, blocks), (n, k) = size
    rng = np.random.default_rng([positions, rows, blocks, n, k])
    x, w = drawn(rng, positions, blocks * n), drawn(rng, blocks * n, rows * k)
    w1, w2 = drawn(rng, rows, blocks), drawn(rng, n, k)
    bias = drawn(rng, rows * k) if "bias" in terms else None
    scale, factor = (to_device(SCALE, "cuda:0"), SCALE[0]) if terms else (None, 1.0)
    on = on_gpu(x, w[None], w1, w2[None], bias)
    other = FLAT.grouped(rows, shared=True)
    planned = mixed_plan(*on[:2], FLAT, *on[2:4], other, None, on[4], None)
    assert planned is not None
    runs = [
        mixed(*on[:4], planned, scale=scale, bias=on[4], keep=keep, out=None)
        for keep in (True, False, True)
    ]
    assert runs[1][1] is None
    y, x2 = map(host, runs[0])
    assert (host(runs[2][1]) == x2).all() and all((host(run[0]) == y).all() for run in runs)
    first = np.einsum("lm,pmn->pln", w1, blocks_of(x, blocks)).reshape(positions, -1)
    size_of_x2 = np.einsum("lm,pmn->pln", abs(w1), blocks_of(abs(x), blocks)).reshape(positions, -1)
    assert_within(x2, first, bound(first, size_of_x2, blocks, bf16), "x2")

    def by_blocks(a, b):
        return (blocks_of(a, rows) @ b).reshape(positions, -1)

    # What is multiplied with w2 is factor * x2, rounded.
    size_of_y = factor * by_blocks(size_of_x2, abs(w2)) + abs(x) @ abs(w)
    rounded = by_blocks(bound(factor * first, factor * size_of_x2, blocks + 1, bf16), abs(w2))
    expected = x @ w + factor * by_blocks(first, w2) + (0 if bias is None else bias)
    size_of_y += 0 if bias is None else abs(bias)
    limit = bound(expected, size_of_y, blocks * n + n + 3, bf16) + rounded
    assert_within(y, expected, limit, "y")
    assert not host(counters.counters().view(np.int32)).any()


@pytest.mark.gpu
def test_x2_is_what_a_mix_by_itself_gives(on_hopper):
    rng = np.random.default_rng(3)
    x, w, w1, w2 = on_gpu(
        *(drawn(rng, *s) for s in ((700, 384), (1, 384, 1536), (8, 8), (1, 48, 192)))
    )
    planned = mixed_plan(x, w, FLAT, w1, w2, FLAT.grouped(8, shared=True), None, None, None)
    _, x2 = mixed(x, w, w1, w2, planned, scale=None, bias=None, keep=True, out=None)
    assert (host(x2) == host(_mix_blocks(x, w1, turned=False))).all()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 700, 1536), (2, 24, 64, 1536)], ids=str)
def test_a_layer_takes_it_and_its_gradients_are_the_same(shape, on_hopper, monkeypatch):
    rng = np.random.default_rng(0)
    x, w, w1, w2 = on_gpu(
        drawn(rng, *shape), drawn(rng, 1, 1536, 3072), drawn(rng, 8, 8), drawn(rng, 1, 192, 384)
    )
    window = Window.of((1, 1)) if len(shape) == 4 else FLAT
    other, scale = window.grouped(8, shared=True), to_device(SCALE, "cuda:0")

    def step():
        tape = Tape()
        watched = [tape.watch(a) for a in (x, w1, w2)]
        with plan.recording() as choices:
            change = ops.pending(
                watched[0], watched[2], other, scale=scale, before=by_mix(watched[1])
            )
            y = ops.extended(watched[0], w, window, change)
        g = to_device(np.ones(y.shape, bf16), "cuda:0")
        return choices[0].way, [host(a) for a in (y.value, *tape.gradients(y, g, watched))]

    way, found = step()
    monkeypatch.setattr(before, "mixed_plan", lambda *arrays: None)
    _, expected = step()
    assert way == "mixed"
    for a, b in zip(found, expected, strict=True):
        assert np.linalg.norm(a - b) < 2.0**-8 * np.linalg.norm(b)


@pytest.mark.gpu
def test_what_is_not_a_number_stays_in_its_row(on_hopper):
    x = np.ones((400, 144))
    x[399, 71], x[3, 0] = np.nan, np.inf
    on = on_gpu(x, np.ones((1, 144, 384)), np.ones((2, 2)), np.ones((1, 72, 192)))
    planned = mixed_plan(*on[:2], FLAT, *on[2:], FLAT.grouped(2, shared=True), None, None, None)
    y, x2 = mixed(*on, planned, scale=None, bias=None, keep=True, out=None)
    y, x2 = host(y), host(x2)
    # Infinity times a zero behind the last channel of a block of 72, where the next block follows.
    assert np.isnan(y[399]).all() and not np.isfinite(y[3]).any() and np.isnan(x2[399]).sum() == 2
    rest = np.delete(y, [3, 399], axis=0)
    assert (rest == np.float64(np.float32(144 + 2 * 72).astype(bf16))).all()


def test_plan():
    planned = plan_mixed(4608, 3072, 8, 8, 384, 132)
    assert planned.grid == (132,) and planned.numbers[:-1] == (4608, 3072, 8, 8, 384)
    assert planned.own["width"] == 3072 and planned.other["width"] == 384
    assert planned.other["block"] == 384


@pytest.mark.parametrize(
    "sizes", [(4608, 3072, 8, 9, 384), (4608, 3072, 17, 8, 384), (64, 3072, 8, 8, 60), (0, 3072, 8, 8, 64),
              (64, 14336, 8, 8, 512), (64, 3072, 8, 1, 384)], ids=str,
)  # fmt: skip
def test_what_has_no_plan(sizes):
    """A w1 with more columns or rows, rows that are no multiple of 16 bytes, no positions, tiles across blocks of
    w2, nothing to mix."""
    assert plan_mixed(*sizes, 132) is None
