"""A linear layer and a low-rank adapter from one read of x, against f64; the kernel is called
itself, whatever the planner would take, on a GPU of its kind.
"""

import numpy as np
import pytest

from lycoris_cupy import bf16, ops, plan, to_device
from lycoris_cupy.ops import before, counters, low_rank_back, thin_outer_gpu
from lycoris_cupy.ops import extended_low_rank_gpu as module
from lycoris_cupy.ops.before import by_down
from lycoris_cupy.ops.extended_low_rank_gpu import plan_low_rank
from lycoris_cupy.tape import Tape
from tests.arrays import drawn, host, on_gpu
from tests.bounds import assert_within, bound

SCALE = np.array([0.703125], np.float32)
# positions, inputs, ranks, outputs: one row of tiles and many, rounds of them, tails of each; few columns and many;
# fewer steps than are done before the assistants begin.
SIZES = [
    (1, 8, 8, 400), (192, 64, 16, 576), (200, 136, 16, 584), (63, 3072, 8, 800), (577, 72, 16, 1000),
    (4608, 320, 16, 3072), (4608, 3072, 16, 3072), (300, 136, 8, 200), (25000, 64, 16, 392), (9000, 1032, 8, 640), (8000, 640, 8, 392), (8448, 64, 16, 584), (6400, 4104, 16, 600),
    (400, 200, 16, 30000),
]  # fmt: skip


@pytest.fixture(params=module._TILES, ids=lambda tile: f"{tile.columns} columns")
def tile(request, monkeypatch):
    """Of all plans."""
    monkeypatch.setattr(module, "_TILES", [request.param])
    plan_low_rank.cache_clear()
    yield request.param
    plan_low_rank.cache_clear()


def low_rank(x, w, down, up, *, scale, bias):
    flat = ops.Window()
    planned = module.low_rank_plan(x, w, flat, down, flat, up, flat, None, bias, None)
    return module.low_rank(x, w, down, up, planned, scale=scale, bias=bias)


@pytest.mark.gpu
@pytest.mark.parametrize("terms", ["", "scale", "scale bias"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_f64(size, terms, tile, on_hopper):
    positions, inputs, ranks, outputs = size
    rng = np.random.default_rng(size)
    x, w = drawn(rng, positions, inputs), drawn(rng, inputs, outputs)
    down, up = drawn(rng, inputs, ranks), drawn(rng, ranks, outputs)
    bias = drawn(rng, outputs) if "bias" in terms else None
    scale, factor = (to_device(SCALE, "cuda:0"), SCALE[0]) if terms else (None, 1.0)
    arrays = on_gpu(x, w[None], down[None], up[None], bias)
    runs = [low_rank(*arrays[:4], scale=scale, bias=arrays[4]) for _ in range(3)]
    y, h = map(host, runs[0])
    for more in runs[1:]:
        assert all((host(a) == b).all() for a, b in zip(more, (y, h), strict=True))
    first, size_of_h = x @ down, abs(x) @ abs(down)
    limit = bound(first, size_of_h, inputs, bf16)
    assert_within(h, first, limit, "h")
    # What is multiplied with up is factor * h, rounded.
    more, size_of_y = factor * first @ up, factor * size_of_h @ abs(up) + abs(x) @ abs(w)
    rounded = bound(factor * first, factor * size_of_h, inputs + 1, bf16) @ abs(up)
    expected = x @ w + more + (0 if bias is None else bias)
    size_of_y += 0 if bias is None else abs(bias)
    limit = bound(expected, size_of_y, inputs + ranks + 3, bf16) + rounded
    assert_within(y, expected, limit, "y")
    assert not host(counters.counters().view(np.int32)).any()


@pytest.mark.gpu
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_input_gradient_against_f64(size, scaled, tile, on_hopper):
    """positions, outputs, ranks, inputs: the columns are the inputs here."""
    positions, outputs, ranks, inputs = size
    rng = np.random.default_rng([*size, 1])
    g, w = drawn(rng, positions, outputs), drawn(rng, inputs, outputs)
    down, up = drawn(rng, inputs, ranks), drawn(rng, ranks, outputs)
    scale, factor = (to_device(SCALE, "cuda:0"), SCALE[0]) if scaled else (None, 1.0)
    flat = ops.Window()
    on = on_gpu(g, w[None], down[None], up[None])
    planned = module.low_rank_dx_plan(*on[:2], flat, on[2], flat, on[3], flat)
    runs = [module.low_rank_dx(*on, planned, scale=scale) for _ in range(3)]
    dx, dh = map(host, runs[0])
    for more in runs[1:]:
        assert all((host(a) == b).all() for a, b in zip(more, (dx, dh), strict=True))
    first, size_of_dh = factor * g @ up.T, factor * abs(g) @ abs(up).T
    limit = bound(first, size_of_dh, outputs + 1, bf16)
    assert_within(dh, first, limit, "dh")
    expected, size_of_dx = g @ w.T + first @ down.T, abs(g) @ abs(w).T + size_of_dh @ abs(down).T
    rounded = limit @ abs(down).T
    assert_within(dx, expected, bound(expected, size_of_dx, outputs + ranks + 2, bf16) + rounded)
    assert not host(counters.counters().view(np.int32)).any()


@pytest.mark.gpu
@pytest.mark.parametrize("last", ["x", "down"])
@pytest.mark.parametrize("ranks", [16, 64])
@pytest.mark.parametrize("shape", [(2, 700, 3072), (2, 48, 64, 640)], ids=str)
def test_a_layer_takes_it_and_its_gradients_are_the_same(
    shape, ranks, last, on_hopper, monkeypatch
):
    """With the kernels and without: products of the same numbers, h and what follows from it alike.
    last: of the gradients, what is asked for. More than 16 ranks have their factors' gradients from
    one launch alone."""
    rng = np.random.default_rng(0)
    x, w, down, up = on_gpu(
        drawn(rng, *shape), drawn(rng, 1, shape[-1], 3072), drawn(rng, 1, shape[-1], ranks),
        drawn(rng, 1, ranks, 3072),
    )  # fmt: skip
    window = ops.Window.of((1, 1)) if len(shape) == 4 else ops.Window()
    scale = to_device(SCALE, "cuda:0")

    def step():
        tape = Tape()
        watched = [tape.watch(a) for a in (x, down, up)]
        with plan.recording() as choices:
            change = ops.pending(
                watched[0], watched[2], window, scale=scale, before=by_down(watched[1], window)
            )
            y = ops.extended(watched[0], w, window, change)
        g = to_device(np.ones(y.shape, bf16), "cuda:0")
        order = watched if last == "down" else watched[::-1]
        with plan.recording() as back:
            found = dict(zip(order, tape.gradients(y, g, order), strict=True))
        ways = {choice.way for choice in (choices[0], *back)}
        return ways, [host(a) for a in (y.value, *(found[v] for v in watched))]

    ways, found = step()
    monkeypatch.setattr(before, "low_rank_plan", lambda *arrays: None)
    monkeypatch.setattr(low_rank_back, "plan_thin_outers", lambda *sizes: None)
    monkeypatch.setattr(thin_outer_gpu, "plan_thin_outers", lambda *sizes: None)
    _, expected = step()
    assert ways >= {"low rank" if ranks == 16 else "factors together", "thin outer"}
    for a, b in zip(found, expected, strict=True):
        assert np.linalg.norm(a - b) < 2.0**-8 * np.linalg.norm(b)


@pytest.mark.gpu
def test_what_is_not_a_number_stays_in_its_row(tile, on_hopper):
    """Past the ends are zeros of both operands, not products with what is there."""
    x = np.ones((400, 72))
    x[399, 71], x[3, 0] = np.nan, np.inf
    ones = (np.ones((1, *shape)) for shape in ((72, 400), (72, 8), (8, 400)))
    y, h = map(host, low_rank(*on_gpu(x, *ones), scale=None, bias=None))
    for a, value in ((h, 72), (y, 72 + 8 * 72)):
        assert np.isnan(a[399]).all() and np.isinf(a[3]).all()
        assert (np.delete(a, [3, 399], axis=0) == np.float64(np.float32(value).astype(bf16))).all()


@pytest.mark.gpu
def test_graphs_and_streams_have_flags_of_their_own(on_hopper):
    """Two streams at once, each with its flags; a graph captured behind a warm-up, and one without."""
    import cupy

    rng = np.random.default_rng(5)
    arrays = on_gpu(
        drawn(rng, 1536, 512), *(drawn(rng, 1, *s) for s in ((512, 768), (512, 16), (16, 768)))
    )
    expected = host(low_rank(*arrays, scale=None, bias=None)[0])
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]
    cupy.cuda.Device().synchronize()
    found = []
    for _ in range(20):
        for stream in streams:
            with stream:
                found.append(low_rank(*arrays, scale=None, bias=None)[0])
    cold = cupy.cuda.Stream(non_blocking=True)
    graphs = []
    for stream in (streams[0], cold):
        with stream:
            stream.begin_capture(cupy.cuda.runtime.streamCaptureModeRelaxed)
            found.append(low_rank(*arrays, scale=None, bias=None)[0])
            graphs.append(stream.end_capture())
    for _ in range(3):
        for graph, stream in zip(graphs, (streams[0], cold), strict=True):
            graph.launch(stream)
    cupy.cuda.Device().synchronize()
    assert all((host(y) == expected).all() for y in found)


def test_plan():
    """The tile with the fewest rounds of blocks, where 192 columns are mostly outside."""
    assert plan_low_rank(16384, 640, 16, 640, 132).tile.columns == 160
    planned = plan_low_rank(4608, 3072, 16, 3072, 132)
    assert planned.grid == (132,) and planned.numbers[:-1] == (4608, 3072, 3072, 16)
    assert planned.tile.columns == 192
    assert plan_low_rank(5, 64, 8, 400, 132).grid == (3,)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_what_makes_h_comes_first(size, tile):
    """Three tiles of each row, or one; all of them the first tiles of their blocks."""
    planned = plan_low_rank(*size, 132)
    makers = int(planned.launch.defines["MAKERS"])
    assert makers * -(-size[0] // 192) <= planned.grid[0] <= 132
    assert makers == (3 if size[3] > 2 * tile.columns and size[0] <= 44 * 192 else 1)


@pytest.mark.parametrize(
    "sizes", [(4608, 3072, 24, 3072), (4608, 3072, 4, 3072), (0, 64, 8, 600), (25345, 64, 8, 600),
              (64, 60, 8, 600), (64, 64, 8, 604), (64, 72, 12, 384)], ids=str,
)  # fmt: skip
def test_what_has_no_plan(sizes):
    """More ranks, rows that are no multiple of 16 bytes, no positions, too many."""
    assert plan_low_rank(*sizes, 132) is None
