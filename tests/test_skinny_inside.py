"""Products of few positions that make the x2 of a LoKr or a LoRA themselves: every variant of the
kernel by itself on a GPU of its kind, and where the planner takes it, which needs none.
"""

import numpy as np
import pytest

from lycoris_cupy import Engine, Linear, bf16, kernels, plan, to_device
from lycoris_cupy.adapters.locon import LoCon
from lycoris_cupy.adapters.lokr import LoKr
from lycoris_cupy.attachment import Attachment
from lycoris_cupy.ops import skinny_gpu
from lycoris_cupy.ops.extended_gpu import Extra
from lycoris_cupy.ops.extended_plan import Second
from lycoris_cupy.ops.kron import _mix_blocks
from lycoris_cupy.ops.window import Window
from tests.arrays import host, on_gpu
from tests.bounds import assert_within, bound
from tests.dry_gpu import dry_gpu
from tests.test_skinny import FLAT, SCALE, added, draw, only, times, totals

# L, M, N, K of w1 (L, M) and w2 (N, K). Slices of less than 64 channels and several, strips that end
# with a block of 8, 136 or 200 columns, more blocks of x than of y and fewer.
SPLITS = {
    "factor 8 of 3072": (8, 8, 384, 384),
    "more blocks in": (2, 5, 72, 136),
    "more blocks out": (9, 3, 200, 200),
    "narrow": (4, 16, 8, 8),
    "two of one slice": (2, 2, 64, 128),
    "many columns of w1": (3, 64, 16, 264),
}


@pytest.fixture
def taken(monkeypatch, on_hopper):
    plans = skinny_gpu._plan, skinny_gpu._plan_mixed, skinny_gpu._plan_low_rank
    yield from only(monkeypatch, *plans)


def check(split, positions, terms, name):
    rows, blocks, n, k = split
    rng = np.random.default_rng([*name.encode(), positions])
    columns, other = rows * k, FLAT.grouped(rows, shared=True)
    x, w = draw(rng, (positions, blocks * n)), draw(rng, (1, blocks * n, columns))
    w1, w2 = draw(rng, (rows, blocks)), draw(rng, (1, n, k))
    beside = added(rng, terms, positions, columns)
    on = dict(zip(("x", "w", "w1", "w2"), on_gpu(x, w, w1, w2), strict=True))
    more, scale = on_gpu(*beside), to_device(SCALE, "cuda:0")
    planned = skinny_gpu.mixed_plan(on["x"], on["w"], FLAT, on["w1"], on["w2"], other, *more)
    assert planned is not None
    extra = Extra(on["x"], on["w2"], other, scale, more[2])
    ran = [
        skinny_gpu.skinny_mixed(
            on["x"], on["w"], on["w1"], planned, extra, add=more[0], bias=more[1], keep=keep
        )
        for keep in (True, False, True)
    ]
    x2 = host(_mix_blocks(on["x"], on["w1"], turned=False))
    assert ran[1][1] is None and all((host(ran[i][1]) == x2).all() for i in (0, 2))
    out = [host(y) for y, _ in ran]
    assert (out[0] == out[1]).all() and (out[0] == out[2]).all()
    own = times(x, w), times(abs(x), abs(w))
    second = times(x2, w2, other), times(abs(x2), abs(w2), other)
    y, size = totals(own, second, *beside)
    assert_within(out[0], y, bound(y, size, blocks * n + n + 4, bf16), name)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", skinny_gpu.MIXED, ids=str)
@pytest.mark.parametrize("name", SPLITS)
def test_every_variant(name, variant, taken):
    taken(variant)
    check(SPLITS[name], 37, ("add", "bias", "bias2"), name)


@pytest.mark.gpu
@pytest.mark.parametrize("positions", [1, 7, 16, 17, 63, 64, 65, 128])
@pytest.mark.parametrize("name", ["factor 8 of 3072", "more blocks out"])
def test_positions(name, positions, taken):
    taken(None)
    check(SPLITS[name], positions, ("bias",), name)


def check_low_rank(positions, inputs, rank, columns, terms):
    rng = np.random.default_rng([positions, inputs, rank, columns])
    x, w = draw(rng, (positions, inputs)), draw(rng, (1, inputs, columns))
    down, up = draw(rng, (1, inputs, rank)), draw(rng, (1, rank, columns))
    beside = added(rng, terms, positions, columns)
    on, more = on_gpu(x, w, down, up), on_gpu(*beside)
    planned = skinny_gpu.low_rank_plan(*on[:2], FLAT, *on[2:], FLAT, *more)
    assert planned is not None
    extra = Extra(on[0], on[3], FLAT, to_device(SCALE, "cuda:0"), more[2])
    ran = [
        skinny_gpu.skinny_low_rank(*on[:3], planned, extra, add=more[0], bias=more[1], keep=keep)
        for keep in (True, False, True)
    ]
    x2, x2_size = times(x, down), times(abs(x), abs(down))
    assert ran[1][1] is None and (host(ran[0][1]) == host(ran[2][1])).all()
    assert_within(host(ran[0][1]), x2, bound(x2, x2_size, inputs, bf16), "x2")
    out = [host(y) for y, _ in ran]
    assert (out[0] == out[1]).all() and (out[0] == out[2]).all()
    # x2 is not rounded on the way, but for 2^-16 of each part of it: less than a bf16's rounding.
    own = times(x, w), times(abs(x), abs(w))
    second = times(x2, up), times(x2_size, abs(up))
    y, size = totals(own, second, *beside)
    depth = inputs + rank + 4 + 2**8  # 2^-16 is 2^8 roundings of f32
    assert_within(out[0], y, bound(y, size, depth, bf16), "y")


# positions, inputs, rank, columns, terms
LOW_RANK = {
    "a layer": (64, 3072, 16, 3072, ("bias",)),
    "tails": (37, 328, 16, 648, ("add", "bias", "bias2")),
    "rank 8": (50, 136, 8, 136, ("add",)),
    "one step": (3, 64, 16, 40, ()),
    "two bands": (100, 264, 16, 200, ("bias2",)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("variant", skinny_gpu.LOW_RANK, ids=str)
@pytest.mark.parametrize("name", LOW_RANK)
def test_low_rank_by_every_variant(name, variant, taken):
    taken(variant)
    check_low_rank(*LOW_RANK[name])


@pytest.mark.gpu
@pytest.mark.parametrize("positions", [1, 7, 16, 17, 63, 64, 65, 128])
def test_low_rank_positions(positions, taken):
    taken(None)
    check_low_rank(positions, 1032, 16, 264, ("bias",))


def plan_of(rows, blocks, n, k, positions=64, window=FLAT, other=None):
    other = FLAT.grouped(rows, shared=True) if other is None else other
    w = (1, blocks * n, rows * k)
    shapes = (positions, blocks * n), w, window, (rows, blocks)
    return skinny_gpu.plan_mixed(*shapes, Second((1, n, k), other), 132)


def test_what_has_a_plan():
    planned = plan_of(8, 8, 384, 384)
    assert planned.numbers == (64, 3072, 3072, 384, 384, 8)
    assert planned.launch.defines["MIXED"] == "1" and planned.grid == (48 * planned.cluster, 1)
    assert plan_of(3, 64, 16, 264) is not None and plan_of(3, 65, 16, 264) is None
    assert plan_of(3, 1, 72, 8) is None  # nothing to mix
    assert plan_of(2, 5, 36, 136) is None and plan_of(2, 5, 72, 132) is None
    assert plan_of(8, 8, 384, 384, positions=129) is None
    assert plan_of(8, 8, 384, 384, window=Window.of((3, 3))) is None


@pytest.mark.parametrize("name", SPLITS)
def test_the_slices_are_shared_out_once(name):
    rows, blocks, n, k = SPLITS[name]
    planned = plan_of(*SPLITS[name])
    assert planned.cluster <= -(-n // 64)
    assert planned.grid == (rows * -(-k // planned.tile) * planned.cluster, 1)
    # As skinny.cu cuts them.
    steps = -(-n // 64)
    cuts = [rank * steps // planned.cluster for rank in range(planned.cluster + 1)]
    assert (
        cuts[0] == 0
        and cuts[-1] == steps
        and all(a < b for a, b in zip(cuts, cuts[1:], strict=False))
    )


def test_what_has_a_low_rank_plan():
    def planned(x=(64, 3072), w=(1, 3072, 3072), down=(1, 3072, 16), up=(1, 16, 3072), window=FLAT):
        return skinny_gpu.plan_low_rank(x, w, window, down, Second(up, FLAT), 132)

    made = planned()
    assert made.numbers == (64, 3072, 3072, 16, 3072, 1) and made.launch.defines["RANKS"] == "16"
    assert planned(down=(1, 3072, 24), up=(1, 24, 3072)) is None
    assert planned(down=(1, 3072, 4), up=(1, 4, 3072)) is None
    assert planned(x=(129, 3072)) is None and planned(window=Window.of((3, 3))) is None
    wide_layer = planned(w=(1, 3072, 128256), up=(1, 16, 128256))
    assert (wide_layer.cluster, wide_layer.each) == (1, 2)


ADAPTERS = {
    "LoKr": lambda shape: LoKr.create(shape, 10**6, factor=8),
    "LoKr, w2 factored": lambda shape: LoKr.create(shape, 16, factor=8),
    "LoRA": lambda shape: LoCon(shape, 16, 16.0),
}


@pytest.mark.parametrize("positions", [1, 64, 4608])
@pytest.mark.parametrize(("name", "step"), [("LoKr", 5), ("LoKr, w2 factored", 4), ("LoRA", 4)])
def test_launches_of_a_layer(name, step, positions, monkeypatch):
    """One forward for few positions. A step's: the library's are not counted."""
    called, call = [], kernels.Kernel.__call__

    def counted(kernel, *args, **of):
        called.append(kernel.name)
        return call(kernel, *args, **of)

    monkeypatch.setattr(kernels.Kernel, "__call__", counted)
    zeros = np.zeros((3072, 3072), bf16)
    with dry_gpu() as device:
        import cupy

        engine = Engine({"layer": Linear(zeros, None)}, device=device)
        adapter = ADAPTERS[name](engine.layers["layer"].shape)
        made = adapter.init(np.random.default_rng(0))
        engine.attachments["a"] = Attachment({"layer": (adapter, made)}, device, bf16, 1.0)
        x = cupy.empty((positions, 3072), bf16)
        with plan.recording() as choices:
            engine.forward(x)
        few = positions < 4608
        assert (called == ["skinny_bf16"]) == few and (choices[0].way == "inside") == few
        called.clear()
        y, pull = engine.vjp(x)
        pull(y)
        assert not few or (called[0] == "skinny_bf16" and len(called) <= step)
