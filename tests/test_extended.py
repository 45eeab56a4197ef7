"""The kernel of the extended product, tile by tile and term by term, and what the planner chooses.

The kernel is called itself, whatever the planner would take, on a GPU of its kind.
"""

import numpy as np
import pytest

from lycoris_cupy import Conv1d, Full, bf16, ops, plan, to_device
from lycoris_cupy.arrays import gpu_missing
from lycoris_cupy.errors import DtypeError, ShapeError
from lycoris_cupy.ops import (
    conv_cpu,
    extended_gpu,
    extended_plan,
    extended_tile,
    halo_gpu,
    narrow_gpu,
    outer_gpu,
    product_ways,
)
from lycoris_cupy.ops.extended_gpu import Extra
from lycoris_cupy.ops.extended_plan import Second
from lycoris_cupy.ops.window import Window
from lycoris_cupy.tape import Tape
from tests.bounds import assert_within, bound

FLAT = Window()
SCALE = np.array([0.703125], np.float32)


def square(**options):
    return Window.of((3, 3), **options)


def blocks(window, count):
    return window.grouped(count, shared=True)


# x, w, window; x2, w2, its window; extra terms. Tails in rows, columns and channels; several tiles a
# block; one, several and a part of a block of x2 in a tile.
FORWARD = {
    "one tile": ((200, 64), (1, 64, 128), FLAT, None, ""),
    "tails": ((300, 200), (1, 200, 184), FLAT, None, "add bias"),
    "rank 16": ((300, 200), (1, 200, 184), FLAT, ((300, 16), (1, 16, 184), FLAT), "bias"),
    "rank 72": ((520, 328), (1, 328, 648), FLAT, ((520, 72), (1, 72, 648), FLAT), ""),
    "many tiles": ((5120, 72), (1, 72, 1600), FLAT, ((5120, 24), (1, 24, 1600), FLAT), "add bias"),
    "blocks": ((600, 256), (1, 256, 512), FLAT, ((600, 224), (1, 56, 128), blocks(FLAT, 4)), ""),
    "image": ((2, 20, 24, 64), (9, 64, 160), square(padding=1), None, ""),
    "image, tails": ((3, 13, 17, 40), (9, 40, 72), square(padding=1), None, "add bias"),
    "stride": ((3, 13, 17, 40), (9, 40, 72), square(padding=1, stride=2), None, ""),
    "dilation": ((3, 13, 17, 72), (9, 72, 72), square(padding=2, dilation=2), None, ""),
    "no padding": ((3, 13, 17, 72), (9, 72, 72), square(), None, ""),
    "a line": ((3, 57, 40), (4, 40, 72), Window.of((4,), 2, 3), None, "bias"),
    "a volume": (
        (2, 5, 6, 7, 24), (12, 24, 40), Window.of((2, 3, 2), 1, (1, 1, 0)), None, "bias",
    ),
    "image, rank 16": (
        (2, 13, 17, 72), (9, 72, 72), square(padding=1),
        ((2, 13, 17, 16), (1, 16, 72), Window.of((1, 1))), "",
    ),
    "image, blocks of 40": (
        (2, 13, 17, 160), (9, 160, 320), square(padding=1),
        ((2, 13, 17, 320), (9, 40, 40), blocks(square(padding=1), 8)), "",
    ),
    "image, blocks of 80": (
        (2, 13, 17, 80), (9, 80, 320), square(padding=1),
        ((2, 13, 17, 96), (9, 24, 80), blocks(square(padding=1), 4)), "bias",
    ),
    "image, blocks of 160": (
        (2, 13, 17, 80), (9, 80, 320), square(padding=1),
        ((2, 13, 17, 160), (9, 80, 160), blocks(square(padding=1), 2)), "",
    ),
}  # fmt: skip

# x, w, window, (width of the second term, whether it takes the same walk over space).
BACKWARD = {
    "linear": ((300, 200), (1, 200, 184), FLAT, (0, False)),
    "linear, rank 16": ((300, 200), (1, 200, 184), FLAT, (16, False)),
    "linear, many tiles": ((5120, 1600), (1, 1600, 72), FLAT, (24, False)),
    "image": ((2, 20, 24, 160), (9, 160, 64), square(padding=1), (0, False)),
    "image, taps aside": ((3, 13, 17, 40), (9, 40, 72), square(padding=1), (144, False)),
    "dilation": ((3, 13, 17, 40), (9, 40, 72), square(dilation=2), (8, False)),
    "a line": ((3, 57, 40), (4, 40, 72), Window.of((4,), 1, 3), (16, False)),
    "a volume": ((2, 5, 6, 7, 24), (12, 24, 40), Window.of((2, 3, 2), 1, (1, 1, 0)), (16, False)),
    "image, same walk": ((2, 20, 24, 64), (9, 64, 64), square(padding=1), (64, True)),
    "image, rank 16 of the same walk": (
        (2, 13, 17, 72), (9, 72, 64), square(padding=1), (16, True),
    ),
    "a line, rank 8 of the same walk": ((3, 57, 40), (4, 40, 72), Window.of((4,), 1, 3), (8, True)),
    "dilation, same walk": ((3, 13, 17, 40), (9, 40, 72), square(dilation=2), (80, True)),
    "a line, same walk": ((3, 57, 40), (4, 40, 72), Window.of((4,), 1, 3), (72, True)),
    "a volume, same walk": (
        (2, 5, 6, 7, 24), (12, 24, 40), Window.of((2, 3, 2), 1, (1, 1, 0)), (40, True),
    ),
}  # fmt: skip


def draw(rng, shape):
    return rng.standard_normal(shape, np.float32).astype(bf16).astype(np.float64)


def wide_conv(x, w, window):
    """x * w in f64 on the CPU, which tests/test_rows.py holds against plain loops."""
    y = conv_cpu.conv(x.reshape(-1, x.shape[-1]) if window.pointwise else x, w, window)
    space = window.out_space(x.shape[1:-1]) if window.axes else x.shape[1:-1]
    return y.reshape(*x.shape[:1], *space, y.shape[-1])


def on_gpu(*arrays):
    return [None if a is None else to_device(a.astype(bf16), "cuda:0") for a in arrays]


TILES = [None, *extended_tile.TILES[True]]
TURNED = [None, *extended_tile.TILES[False]]


def tile_of(tile):
    """The variant with a tile of so many rows and columns."""
    return extended_tile.Tile(*tile, tile[1], 0.0)


def need_hopper():
    if not extended_gpu.hopper():
        pytest.skip("not a Hopper GPU")


@pytest.mark.gpu
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("name", FORWARD)
def test_forward(name, tile, monkeypatch):
    need_hopper()
    x_shape, w_shape, window, second, terms = FORWARD[name]
    rng = np.random.default_rng([*name.encode()])
    x, w = draw(rng, x_shape), draw(rng, w_shape)
    y, size = wide_conv(x, w, window), wide_conv(abs(x), abs(w), window)
    add = draw(rng, y.shape) if "add" in terms else None
    bias = draw(rng, y.shape[-1:]) if "bias" in terms else None
    extra, depth = None, w_shape[0] * w_shape[1]
    if second is not None:
        x2, w2 = draw(rng, second[0]), draw(rng, second[1])
        y = y + SCALE * wide_conv(x2, w2, second[2]).reshape(y.shape)
        size = size + wide_conv(abs(x2), abs(w2), second[2]).reshape(y.shape)
        extra = Extra(*on_gpu(x2, w2), second[2], to_device(SCALE, "cuda:0"))
        depth += second[1][0] * second[1][1]
    for more in (add, bias):
        if more is not None:
            y, size = y + more, size + abs(more)
    if tile is not None:
        block = second[1][2] if second is not None and second[2].groups > 1 else tile[1]
        if block % tile[1]:
            pytest.skip("the tile does not fit the blocks")
        monkeypatch.setattr(extended_plan, "choose", lambda *args: tile_of(tile))
        extended_plan.plan_forward.cache_clear()
    add, bias = on_gpu(add, bias)
    x, w = on_gpu(x, w)
    assert extended_gpu.takes(x, w, add, bias)
    out = [
        to_device(
            extended_gpu.extended_forward(x, w, window, extra=extra, add=add, bias=bias)[0], "cpu"
        )
        for _ in range(2)
    ]
    extended_plan.plan_forward.cache_clear()
    assert (out[0] == out[1]).all()
    assert_within(out[0].astype(np.float64), y, bound(y, size, depth, bf16), name)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("name", [name for name, case in FORWARD.items() if case[3] is not None])
def test_scaled_columns(name, tile, monkeypatch):
    """c * (x * w) with the second term behind it, and x * w by itself."""
    need_hopper()
    x_shape, w_shape, window, second, terms = FORWARD[name]
    width = tile[1] if tile else 64
    block = second[1][2] if second[2].groups > 1 else width
    if block % width:
        pytest.skip("the tile does not fit the blocks")
    rng = np.random.default_rng([*name.encode(), 1])
    x, w = draw(rng, x_shape), draw(rng, w_shape)
    x2, w2, c = draw(rng, second[0]), draw(rng, second[1]), draw(rng, w_shape[-1:])
    own, size = wide_conv(x, w, window), wide_conv(abs(x), abs(w), window)
    depth = w_shape[0] * w_shape[1] + second[1][0] * second[1][1]
    add = draw(rng, own.shape) if "add" in terms else None
    bias = draw(rng, own.shape[-1:]) if "bias" in terms else None
    y = c * own + wide_conv(x2, w2, second[2]).reshape(own.shape)
    sizes = abs(c) * size + wide_conv(abs(x2), abs(w2), second[2]).reshape(own.shape)
    for more in (add, bias):
        if more is not None:
            y, sizes = y + more, sizes + abs(more)
    if tile is not None:
        monkeypatch.setattr(extended_plan, "choose", lambda *args: tile_of(tile))
    extended_plan.plan_forward.cache_clear()
    extra = Extra(*on_gpu(x2, w2), second[2], None)
    add, bias = on_gpu(add, bias)
    options = {"extra": extra, "add": add, "bias": bias, "keep": True}
    c_gpu = to_device(c.astype(np.float32), "cuda:0")
    out, kept = extended_gpu.extended_forward(*on_gpu(x, w), window, c=c_gpu, **options)
    extended_plan.plan_forward.cache_clear()
    out, kept = (to_device(array, "cpu").astype(np.float64) for array in (out, kept))
    assert_within(out, y, bound(y, sizes, depth, bf16), name)
    assert_within(kept, own, bound(own, size, depth, bf16), name)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", TURNED, ids=str)
@pytest.mark.parametrize("name", BACKWARD)
def test_backward(name, tile, monkeypatch):
    need_hopper()
    x_shape, w_shape, window, (width, walks) = BACKWARD[name]
    rng = np.random.default_rng([*name.encode()])
    space = x_shape[1:-1] if window.axes else ()
    out_space = window.out_space(space) if window.axes else ()
    g, w, add = (
        draw(rng, (x_shape[0], *out_space, w_shape[2])),
        draw(rng, w_shape),
        draw(rng, x_shape),
    )
    dx = conv_cpu.conv_dx(g, w, window, space).reshape(x_shape) + add
    size = conv_cpu.conv_dx(abs(g), abs(w), window, space).reshape(x_shape) + abs(add)
    extra, depth = None, w_shape[0] * w_shape[2]
    if width:
        own, places = (window, g.shape[:-1]) if walks else (FLAT, (int(np.prod(x_shape[:-1])),))
        g2, w2 = draw(rng, (*places, width)), draw(rng, (own.taps, x_shape[-1], width))
        dx = dx + SCALE * conv_cpu.conv_dx(g2, w2, own, space if walks else ()).reshape(x_shape)
        more = conv_cpu.conv_dx(abs(g2), abs(w2), own, space if walks else ())
        size = size + more.reshape(x_shape)
        extra = Extra(*on_gpu(g2, w2), own, to_device(SCALE, "cuda:0"))
        depth += w2[:, 0].size
    if tile is not None:
        monkeypatch.setattr(extended_plan, "choose", lambda *args: tile_of(tile))
        extended_plan.plan_dx.cache_clear()
    g, w, add = on_gpu(g, w, add)
    assert extended_gpu.takes(g, w, add)
    out = to_device(extended_gpu.extended_dx(g, w, window, space, extra=extra, add=add), "cpu")
    extended_plan.plan_dx.cache_clear()
    assert_within(out.astype(np.float64), dx, bound(dx, size, depth, bf16), name)


# x, w, window: both sums read this x by this window.
PAIRED = {
    "linear": ((300, 200), (1, 200, 184), FLAT),
    "many tiles": ((5120, 72), (1, 72, 1600), FLAT),
    "image": ((2, 20, 24, 64), (9, 64, 64), square(padding=1)),
    "image, tails": ((3, 13, 17, 40), (9, 40, 72), square(padding=2, dilation=2)),
    "stride": ((3, 13, 17, 40), (9, 40, 72), square(padding=1, stride=2)),
    "a volume": ((2, 5, 6, 7, 24), (12, 24, 40), Window.of((2, 3, 2), 1, (1, 1, 0))),
}


@pytest.mark.gpu
@pytest.mark.parametrize("tile", [None, *extended_tile.PAIRS], ids=str)
@pytest.mark.parametrize("name", PAIRED)
def test_both_sums_of_one_x(name, tile, monkeypatch):
    """x * w + scale * (x * w2 + bias2) + add + bias, and the gradient of x, where x is copied once."""
    need_hopper()
    x_shape, w_shape, window = PAIRED[name]
    rng = np.random.default_rng([*name.encode()])
    x, w, w2 = draw(rng, x_shape), draw(rng, w_shape), draw(rng, w_shape)
    both, sizes = w + SCALE * w2, abs(w) + abs(w2)
    y, size = wide_conv(x, both, window), wide_conv(abs(x), sizes, window)
    add, bias, bias2 = draw(rng, y.shape), draw(rng, y.shape[-1:]), draw(rng, y.shape[-1:])
    g, space = draw(rng, y.shape), x_shape[1:-1] if window.axes else ()
    dx = conv_cpu.conv_dx(g, both, window, space).reshape(x_shape)
    dx_size = conv_cpu.conv_dx(abs(g), sizes, window, space).reshape(x_shape)
    x, w, w2, g, add, bias, bias2 = on_gpu(x, w, w2, g, add, bias, bias2)
    if tile is not None:
        forced = extended_tile.Tile(*tile, tile[1], 0.0, True)
        monkeypatch.setattr(extended_plan, "choose", lambda *args: forced)
    extended_plan.plan_forward.cache_clear()
    extended_plan.plan_dx.cache_clear()
    scale = to_device(SCALE, "cuda:0")
    extra = Extra(x, w2, window, scale, bias2)
    out = extended_gpu.extended_forward(x, w, window, extra=extra, add=add, bias=bias)[0]
    add, bias, bias2 = (to_device(a, "cpu").astype(np.float64) for a in (add, bias, bias2))
    y, size = y + SCALE * bias2 + bias + add, size + abs(bias2) + abs(bias) + abs(add)
    depth = 2 * w_shape[0] * w_shape[1] + 4
    assert_within(to_device(out, "cpu").astype(np.float64), y, bound(y, size, depth, bf16), name)
    if all(s == 1 for s in window.stride):
        extra = Extra(g, w2, window, scale)
        out = extended_gpu.extended_dx(g, w, window, space, extra=extra, add=None)
        limit = bound(dx, dx_size, 2 * w_shape[0] * w_shape[2], bf16)
        assert_within(to_device(out, "cpu").astype(np.float64), dx, limit, name)
    extended_plan.plan_forward.cache_clear()
    extended_plan.plan_dx.cache_clear()


def test_an_x_that_both_sums_read_is_copied_once():
    window, x, w = square(padding=1), (1, 128, 128, 64), (9, 64, 64)
    one = extended_plan.plan_forward(x, w, window, Second(w, window, True), 132)
    two = extended_plan.plan_forward(x, w, window, Second(w, window), 132)
    assert one.tile.pair and int(one.launch.defines["PAIR"]) == 1 and not two.tile.pair
    assert one.tile.cycles < two.tile.cycles
    turned = extended_plan.plan_dx(x, w, window, (128, 128), Second(w, window, True), 132)
    assert turned.tile.pair and turned.numbers[:2] == (16384, 64)
    for second in (Second((1, 64, 64), window.pointwise_like(), True), Second(w, square(), True)):
        assert not second.pairs(w, window)
    assert not extended_plan.plan_forward(
        x, w, window, Second(w, window, True), 132, True
    ).tile.pair


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [3, 8, 16, 72])
@pytest.mark.parametrize(
    ("x_shape", "window"),
    [
        ((2, 9, 11, 32), square(padding=1)),
        ((2, 9, 11, 40), square(padding=2, dilation=2)),
        ((2, 9, 12, 40), square(padding=1, stride=2)),
        ((2, 33, 48), Window.of((5,), 1, 2)),
    ],
    ids=str,
)
def test_narrow(x_shape, window, columns):
    """A convolution to a few columns, and its two gradients, by one product and a shifted sum."""
    rng = np.random.default_rng(columns)
    w = draw(rng, (window.taps, x_shape[-1], columns))
    x = draw(rng, x_shape)
    y, size = wide_conv(x, w, window), wide_conv(abs(x), abs(w), window)
    g, add = draw(rng, y.shape), draw(rng, y.shape)
    on = on_gpu(x, w, g, add)
    scale = to_device(SCALE, "cuda:0")
    out = to_device(
        narrow_gpu.narrow_conv(*on[:2], window, scale=scale, add=on[3], bias=None), "cpu"
    )
    expected = add + SCALE * y
    limit = bound(expected, abs(add) + size, w.shape[0] * w.shape[1], bf16)
    assert_within(out.astype(np.float64), expected, limit)
    space = x_shape[1:-1]
    dx = to_device(narrow_gpu.narrow_dx(on[2], on[1], window, space, scale=None, add=None), "cpu")
    expected = conv_cpu.conv_dx(g, w, window, space)
    size = conv_cpu.conv_dx(abs(g), abs(w), window, space)
    assert_within(dx.astype(np.float64), expected, bound(expected, size, w[..., 0].size, bf16))
    dw = to_device(narrow_gpu.narrow_dw(on[0], on[2], window, scale=None), "cpu")
    expected, size = conv_cpu.conv_dw(x, g, window), conv_cpu.conv_dw(abs(x), abs(g), window)
    assert_within(dw, expected, bound(expected, size, g[..., 0].size, np.float32))
    if window.taps * columns > narrow_gpu.LIMIT:
        return  # a forward's way alone
    tape = Tape()
    watched = tape.watch(on[0]), tape.watch(on[1])
    found = tape.gradients(ops.product(*watched, window), on[2], watched)  # g is spread once
    assert (to_device(found[0], "cpu") == dx).all()
    assert (to_device(found[1], "cpu") == dw).all()


@pytest.mark.gpu
@pytest.mark.parametrize("terms", [False, True])
@pytest.mark.parametrize(
    ("x_shape", "window", "columns"),
    [
        ((2, 13, 37, 40), square(padding=1), 16),
        ((1, 8, 32, 32), square(padding=1), 8),
        ((3, 21, 65, 328), square(padding=1), 16),
        ((2, 19, 33, 24), square(), 16),
        ((2, 19, 33, 72), square(padding=2, dilation=2), 8),
        ((2, 5, 70, 96), Window.of((2, 3), 1, (1, 0)), 16),
        ((1, 40, 40, 64), Window.of((1, 1)), 16),
    ],
)
def test_halo(x_shape, window, columns, terms):
    """A convolution to a few columns from a piece of the image with its halo."""
    rng = np.random.default_rng(x_shape)
    x, w = draw(rng, x_shape), draw(rng, (window.taps, x_shape[-1], columns))
    expected, size = wide_conv(x, w, window), wide_conv(abs(x), abs(w), window)
    add, bias, scale = None, None, None
    if terms:
        add, bias, scale = (
            draw(rng, expected.shape),
            draw(rng, (columns,)),
            to_device(SCALE, "cuda:0"),
        )
        expected, size = add + SCALE * expected + bias, abs(add) + size + abs(bias)
    limit = bound(expected, size, w.shape[0] * w.shape[1] + 2, bf16)
    x, w, add, bias = on_gpu(x, w, add, bias)
    assert halo_gpu.takes_halo(x, w, window, add, bias, least=1)
    out = to_device(halo_gpu.halo_conv(x, w, window, scale=scale, add=add, bias=bias), "cpu")
    assert_within(out.astype(np.float64), expected, limit)


def test_what_the_halo_does_not_take():
    x, w = np.zeros((1, 64, 64, 32), bf16), np.zeros((9, 32, 16), bf16)
    for window in (square(padding=1, stride=2), square(padding=8, dilation=8), blocks(square(), 2)):
        assert not halo_gpu.takes_halo(x, w, window, least=1)
    assert not halo_gpu.takes_halo(x, w[..., :12], square(padding=1), least=1)


SHARED = {
    "blocks of 40": ((2, 13, 17, 320), (9, 40, 40), blocks(square(padding=1), 8)),
    "blocks of 80 to 24": ((2, 13, 17, 320), (9, 80, 24), blocks(square(padding=1), 4)),
    "blocks of 64": ((3, 9, 14, 128), (9, 64, 16), blocks(square(padding=2, dilation=2), 2)),
    "a line": ((3, 57, 256), (4, 128, 40), blocks(Window.of((4,), 1, 3), 2)),
    "a volume": ((2, 5, 6, 7, 160), (12, 160, 24), blocks(Window.of((2, 3, 2), 1, (1, 1, 0)), 1)),
    "stride": ((2, 13, 17, 80), (9, 40, 40), blocks(square(padding=1, stride=2), 2)),
    "64 channels": ((2, 23, 25, 64), (9, 64, 64), square(padding=1)),
    "one group": ((2, 23, 25, 72), (9, 72, 136), square(padding=1)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", [n for n in SHARED if n not in ("stride", "one group")])
def test_input_gradient_of_shared_groups(name):
    need_hopper()
    x_shape, w_shape, window = SHARED[name]
    window = blocks(window, window.groups)  # one group counts as shared too
    rng = np.random.default_rng([*name.encode()])
    space = x_shape[1:-1]
    g = draw(rng, (x_shape[0], *window.out_space(space), w_shape[2] * window.groups))
    w, add = draw(rng, w_shape), draw(rng, x_shape)
    expected = SCALE * conv_cpu.conv_dx(g, w, window, space) + add
    size = conv_cpu.conv_dx(abs(g), abs(w), window, space) + abs(add)
    g, w, add = on_gpu(g, w, add)
    scale = to_device(SCALE, "cuda:0")
    out = to_device(extended_gpu.blocks_dx(g, w, window, space, scale=scale, add=add), "cpu")
    limit = bound(expected, size, w_shape[0] * w_shape[2], bf16)
    assert_within(out.astype(np.float64), expected, limit, name)


@pytest.mark.gpu
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("tile", [None, *outer_gpu._TILES], ids=str)
@pytest.mark.parametrize("name", SHARED)
def test_weight_gradient(name, tile, scaled, monkeypatch):
    need_hopper()
    if tile is not None:
        monkeypatch.setattr(outer_gpu, "_TILES", [tile])
        outer_gpu.plan_outer.cache_clear()
    x_shape, w_shape, window = SHARED[name]
    rng = np.random.default_rng([*name.encode()])
    x = draw(rng, x_shape)
    g = draw(rng, (x_shape[0], *window.out_space(x_shape[1:-1]), w_shape[2] * window.groups))
    factor = SCALE if scaled else np.float32(1)
    expected = factor * conv_cpu.conv_dw(x, g, window)
    size = conv_cpu.conv_dw(abs(x), abs(g), window)
    depth = g[..., 0].size * window.groups
    x, g = on_gpu(x, g)
    plan = outer_gpu.plan_for(x, g, window)
    outer_gpu.plan_outer.cache_clear()
    scale = to_device(SCALE, "cuda:0") if scaled else None
    out = [to_device(outer_gpu.outer_dw(x, g, window, plan, scale=scale), "cpu") for _ in range(2)]
    assert (out[0] == out[1]).all()
    assert_within(out[0], expected, bound(expected, size, depth + 64, np.float32), name)


@pytest.mark.parametrize("name", SHARED)
def test_a_weight_gradient_is_split_into_whole_steps(name):
    x_shape, w_shape, window = SHARED[name]
    g = (x_shape[0], *window.out_space(x_shape[1:-1]), w_shape[2] * window.groups)
    plan = outer_gpu.plan_outer(x_shape, g, window, 132)
    positions, span = plan.numbers[-2:]
    assert plan.shape == w_shape and span % 64 == 0
    assert (plan.splits - 1) * span < positions <= plan.splits * span
    assert bool(plan.sum) == (plan.splits > 1)
    workers, columns = (int(plan.launch.defines[name]) for name in ("WORKERS", "TILE_N"))
    units = window.taps * -(-w_shape[1] // 64)
    tiles = -(-units // workers) * -(-w_shape[2] // columns)
    assert plan.grid == (tiles * plan.splits,) and plan.threads == 128 * (workers + 1)
    grouped = Window.of((3, 3), 1, 1, groups=2)
    assert outer_gpu.plan_outer((2, 7, 9, 32), (2, 7, 9, 32), grouped, 132) is None
    assert outer_gpu.plan_outer((9, 32), (9, 32), FLAT, 132) is None
    narrow = blocks(square(padding=1), 4)
    assert outer_gpu.plan_outer((4, 32, 32, 64), (4, 32, 32, 64), narrow, 132) is None


def test_a_small_weight_gradient_fills_the_device():
    plan = outer_gpu.plan_outer((1, 128, 128, 64), (1, 128, 128, 64), square(padding=1), 132)
    assert 120 <= plan.grid[0] <= 132 and int(plan.launch.defines["TILE_N"]) == 64


# -- the planner, which needs no GPU ----------------------------------------------------------------

SHAPES = {
    "a wide linear layer": ((4608, 3072), (1, 3072, 12288), FLAT),
    "a convolution": ((4, 64, 64, 640), (9, 640, 640), square(padding=1)),
    "few rows": ((16, 3072), (1, 3072, 3072), FLAT),
}


def ways(name, hopper, extra=((1, 16, None), FLAT)):
    x, w, window = SHAPES[name]
    second = Second((extra[0][0], extra[0][1], w[2]), window.pointwise_like())
    return product_ways.forward_ways(x, w, window, second, hopper, True, bf16, 132)


def test_the_term_is_taken_in_where_that_saves_a_pass():
    assert plan.choose(*ways("a wide linear layer", True)) == "extended"
    assert plan.choose(*ways("a convolution", True)) == "extended"
    assert plan.choose(*ways("few rows", True)) == "skinny"


def test_no_way_needs_a_hopper():
    for name in SHAPES:
        what, seconds, operations, moved = ways(name, False)
        assert (
            not {"extended", "skinny"} & set(seconds) and seconds and operations > 0 and moved > 0
        )
        assert plan.choose(what, seconds, operations, moved) in ("library", "portable")


def test_choices_are_recorded_and_readable():
    with plan.recording() as choices:
        plan.choose(*ways("a wide linear layer", True))
    (choice,) = choices
    assert choice.way == "extended" and set(choice.times) == {"extended", "library"}
    text = str(choice)
    assert "extended" in text and "library" in text and "GFLOP" in text and "us" in text
    with plan.recording() as nothing:
        pass
    assert nothing == []


def test_a_narrow_convolution_is_one():
    x, w, window = (4, 64, 64, 640), (9, 640, 16), square(padding=1)
    what = product_ways.forward_ways(x, w, window, None, True, True, bf16, 132)
    assert plan.choose(*what) == "narrow"


def test_more_columns_are_narrow_where_positions_are_few():
    """Its tiles would be fewer than the multiprocessors; with many positions the parts are large."""
    window = square(padding=1)
    for side, channels, columns, way in (
        (32, 1280, 64, "narrow"), (32, 1280, 144, "narrow"), (64, 640, 64, "extended"),
        (32, 1280, 256, "extended"),
    ):  # fmt: skip
        shapes = (4, side, side, channels), (9, channels, columns)
        ways = product_ways.forward_ways(*shapes, window, None, True, True, bf16, 132)
        assert plan.choose(*ways) == way
        assert ("narrow" in ways[1]) == (9 * columns <= 5 / 4 * channels)


@pytest.mark.parametrize("name", [n for n in FORWARD if FORWARD[n][3] is not None])
def test_a_plan_covers_its_result(name):
    """Tiles and boxes of a plan, from shapes alone: whole, and within what the copy engine takes."""
    x, w, window, (_, w2, other), _ = FORWARD[name]
    found = extended_plan.plan_forward(x, w, window, Second(w2, other), 132)
    tile = int(found.launch.defines["TILE_N"])
    positions, columns, band = found.numbers
    assert 1 <= found.grid[0] <= 132 and band >= 1
    rows = found.tile.rows
    assert int(found.launch.defines.get("TILE_M", 256)) == rows
    assert found.grid[0] == min(132, -(-positions // rows) * -(-columns // tile))
    assert found.own["taps"] == w[0] and found.other["taps"] == w2[0]
    if other.groups > 1:
        assert found.other["block"] == w2[2]


SMALL = {  # fewer tiles of 256 rows than multiprocessors, at least half as many of 128
    "64 channels": ((1, 128, 128, 64), (9, 64, 64), square(padding=1), None),
    "64 channels twice": (
        (1, 128, 128, 64), (9, 64, 64), square(padding=1), Second((9, 64, 64), square(padding=1)),
    ),
    "256 columns": ((4096, 320), (1, 320, 256), FLAT, Second((1, 16, 256), FLAT)),
    "640 channels": ((1, 64, 64, 640), (9, 640, 640), square(padding=1), None),
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_small_results_are_cut_into_tiles_of_128_rows(name):
    shapes = SMALL[name]
    for scaled in (False, True):
        found = extended_plan.plan_forward(*shapes, 132, scaled)
        assert found.tile.rows == 128 and found.grid == (128,)
        assert int(found.launch.defines["TILE_M"]) == 128
    x, *rest = shapes
    large = extended_plan.plan_forward((8 * x[0], *x[1:]), *rest, 132)
    assert large.tile.rows > 128


def test_what_the_copy_engine_cannot_read():
    """Strided views, odd rows, other dtypes and nothing: refused before a device is looked at."""
    whole = np.zeros((4, 16), bf16)
    for array in (whole[:, ::2], whole[:, :8], whole[:0], whole.astype(np.float32), whole[0, :3]):
        assert not extended_gpu.takes(array)


def test_what_no_plan_takes():
    strided = square(padding=1, stride=2)
    assert extended_plan.plan_dx((2, 7, 9, 40), (9, 32, 40), strided, (13, 17), None, 132) is None
    grouped = square(padding=1, groups=2)
    assert extended_plan.plan_forward((2, 7, 9, 32), (9, 16, 40), grouped, None, 132) is None
    wide = Window.of((3, 3), 1, 300)
    assert extended_plan.plan_forward((2, 7, 9, 32), (9, 32, 40), wide, None, 132) is None
    odd = Second((1, 8, 24), blocks(FLAT, 3))
    assert extended_plan.plan_forward((9, 32), (1, 32, 72), FLAT, odd, 132) is None


def test_a_pending_product_is_what_it_stands_for():
    rng = np.random.default_rng(0)
    x, w, h, up = (rng.standard_normal(s) for s in ((5, 6), (1, 6, 7), (5, 2), (1, 2, 7)))
    first = ops.pending(h, up, scale=np.array([0.5]))
    both = ops.pending(h, up, add=first)  # the first is computed, and added to
    assert np.allclose(ops.ready(first), 0.5 * h @ up[0])
    assert np.allclose(ops.ready(both), 1.5 * h @ up[0])
    assert np.allclose(ops.extended(x, w, FLAT, both), x @ w[0] + 1.5 * h @ up[0])
    shifted = ops.pending(h, up, scale=np.array([0.5]), bias=np.arange(7.0))
    assert np.allclose(ops.ready(shifted), 0.5 * (h @ up[0] + np.arange(7)))
    assert np.allclose(ops.extended(x, w, FLAT, shifted), x @ w[0] + ops.ready(shifted))
    assert ops.ready(None) is None and ops.ready(x) is x


def test_a_change_of_the_whole_weight_waits_for_the_layer():
    rng = np.random.default_rng(1)
    x, diff, diff_b = (rng.standard_normal(s) for s in ((2, 9, 4), (3, 4, 6), (6,)))
    layer = Conv1d(rng.standard_normal((3, 4, 6)), rng.standard_normal(6), padding=1)
    scale = np.array([0.5])
    p = {"diff": diff, "diff_b": diff_b}
    change = Full(layer.shape, 0, bias=True).apply(None, layer, x, p, scale)
    assert isinstance(change, ops.Pending) and change.x is x and not change.unscaled
    expected = layer.replaced(layer.matrix + 0.5 * diff, layer.bias + 0.5 * diff_b).forward(x)
    assert np.allclose(layer.forward(x, change), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, up: ops.pending(h, up[..., :3]), "x2 \\* w2 has shape"),
        (lambda h, up: ops.pending(h.astype(np.float32), up), "cast one of them"),
        (lambda h, up: ops.pending(h, up, add=h), "add has shape"),
        (lambda h, up: ops.pending(h, up, bias=up[0, 0, :3]), "bias2 has shape"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    x, w, h, up = (np.zeros(s) for s in ((5, 6), (1, 6, 7), (5, 2), (1, 2, 7)))
    with pytest.raises((ShapeError, DtypeError), match=message):
        ops.extended(x, w, FLAT, change(h, up))


if not gpu_missing():

    @pytest.fixture(autouse=True)
    def _free():
        yield
        import cupy

        cupy.get_default_memory_pool().free_all_blocks()
