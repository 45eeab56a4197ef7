"""The convolution by mma.sync with a second sum in its accumulators: the kernel itself, tile by tile,
and where the planner offers it.
"""

import numpy as np
import pytest

from lycoris_cupy import bf16, ops, plan, to_device
from lycoris_cupy.ops import conv_cpu, conv_extended_plan, conv_gpu, conv_plan, product_ways
from lycoris_cupy.ops.conv_extended_plan import Term, joins, term_of
from lycoris_cupy.ops.extended_gpu import Extra
from lycoris_cupy.ops.extended_plan import Second
from lycoris_cupy.ops.window import Window
from lycoris_cupy.tape import Tape
from tests.bounds import assert_within, bound
from tests.test_extended import FLAT, SCALE, blocks, draw, on_gpu, square, wide_conv

ONE, SAME, HALF = Window.of((1, 1)), square(padding=1), square(stride=2, padding=1)
LINE, VOLUME = Window.of((4,), 3, 2, 2), Window.of((2, 3, 2), (1, 2, 1), 1)

# x, w, window; w2, its window. x2 has the extents of x or, where its window looks at one position,
# those of y. Turned, w2 has as many columns a block as it has channels here. Blocks of w2's columns that are narrower than a tile, across its edge, and wider.
CASES = {
    "rank 16": ((2, 9, 11, 24), (9, 24, 72), SAME, (1, 16, 72), ONE),
    "same walk": ((2, 9, 11, 24), (9, 24, 136), SAME, (9, 40, 136), SAME),
    "stride": ((2, 9, 12, 40), (9, 40, 72), HALF, (1, 16, 72), ONE),
    "stride, blocks of 40": ((2, 9, 12, 16), (9, 16, 160), HALF, (9, 16, 40), blocks(HALF, 4)),
    "blocks of 160": ((2, 9, 11, 16), (9, 16, 320), SAME, (9, 24, 160), blocks(SAME, 2)),
    "groups": ((2, 9, 11, 32), (9, 16, 96), square(groups=2), (1, 8, 96), ONE.grouped(2)),
    "groups twice": ((2, 9, 11, 48), (9, 16, 72), HALF.grouped(3), (9, 8, 72), HALF.grouped(3)),
    "groups, one term": ((2, 9, 11, 32), (9, 16, 80), square(groups=2), (1, 24, 80), ONE),
    "groups, blocks": ((2, 9, 11, 48), (9, 24, 96), square(groups=2), (1, 8, 32), blocks(ONE, 3)),
    "shared groups": ((2, 9, 11, 40), (9, 8, 16), blocks(SAME, 5), (9, 24, 80), SAME),
    "a line": ((3, 57, 24), (4, 24, 40), LINE, (1, 16, 40), Window.of((1,))),
    "a volume": ((2, 4, 5, 6, 16), (12, 16, 24), VOLUME, (12, 8, 24), VOLUME),
    "linear": ((300, 72), (1, 72, 136), FLAT, (1, 24, 136), FLAT),
    "linear, blocks": ((300, 72), (1, 72, 160), FLAT, (1, 8, 40), blocks(FLAT, 4)),
    "odd": ((2, 9, 11, 3), (9, 3, 35), SAME, (1, 5, 35), ONE),
    "odd columns": ((2, 9, 11, 40), (9, 40, 35), HALF, (9, 8, 7), blocks(HALF, 5)),
    "odd channels": ((2, 9, 11, 5), (9, 5, 40), SAME, (9, 3, 8), blocks(SAME, 5)),
}
SIZES = [None, *conv_plan.TILES]


def second_of(name, back):
    """(shape of w2, its window)"""
    x, _, _, (taps, inner, columns), other = CASES[name]
    if back:
        columns = inner * (1 if other.shared else other.groups)
        return (taps, x[-1] // other.groups, columns), other
    return (taps, inner, columns), other


def case(name, back):
    """(x, w, x2, w2, add), the result in f64, and the same of absolute values; g for x if back."""
    x_shape, w_shape, window = CASES[name][:3]
    w2_shape, other = second_of(name, back)
    rng = np.random.default_rng([*name.encode(), back])
    space = x_shape[1:-1] if window.axes else ()
    to = window.out_space(space) if window.axes else ()
    columns = w_shape[2] * (window.groups if window.shared else 1)
    channels = w2_shape[1] * other.groups
    channels2 = w2_shape[2] * (other.groups if other.shared else 1)
    x, y = x_shape, (x_shape[0], *to, columns)
    x2 = (x_shape[0], *(to if other.pointwise else space), channels)
    if back:
        x, y = y, x
        x2 = (x_shape[0], *(space if other.pointwise else to), channels2)

    def total(x, w, x2, w2, add, scale):
        if not back:
            return wide_conv(x, w, window) + scale * wide_conv(x2, w2, other) + add
        rows = x2.reshape(-1, channels2) if other.pointwise else x2
        more = conv_cpu.conv_dx(rows, w2, other, space).reshape(x_shape)
        return conv_cpu.conv_dx(x, w, window, space).reshape(x_shape) + scale * more + add

    given = [draw(rng, shape) for shape in (x, w_shape, x2, w2_shape, y)]
    return given, total(*given, SCALE), total(*map(abs, given), SCALE)


def depth_of(name, back):
    terms = CASES[name][1:3], second_of(name, back)
    return sum(term_of(*term, back).inner * term[0][0] for term in terms)


def with_tile(tile, monkeypatch):
    """Plans choose this tile where all is read 16 bytes at a time."""
    choose = conv_plan.choose_tile
    if tile is not None:
        monkeypatch.setattr(
            conv_extended_plan, "choose_tile",
            lambda *args: tile if args[3] == (8, 8) else choose(*args),
        )  # fmt: skip
    conv_extended_plan.plan_forward.cache_clear()
    conv_extended_plan.plan_dx.cache_clear()


@pytest.fixture(autouse=True)
def _own_plans():
    yield
    conv_extended_plan.plan_forward.cache_clear()
    conv_extended_plan.plan_dx.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("tile", SIZES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_forward(name, tile, monkeypatch):
    with_tile(tile, monkeypatch)
    given, expected, size = case(name, False)
    rng, window, other = np.random.default_rng(1), CASES[name][2], CASES[name][4]
    bias, bias2 = (draw(rng, expected.shape[-1:]) for _ in range(2))
    expected, size = expected + bias + SCALE * bias2, size + abs(bias) + SCALE * abs(bias2)
    x, w, x2, w2, add, bias, bias2 = on_gpu(*given, bias, bias2)
    extra = Extra(x2, w2, other, to_device(SCALE, "cuda:0"), bias2)
    out = [conv_gpu.conv_extended(x, w, window, extra, add=add, bias=bias) for _ in range(2)]
    out = [to_device(array, "cpu") for array in out]
    assert (out[0] == out[1]).all()
    limit = bound(expected, size, depth_of(name, False) + 3, bf16)
    assert_within(out[0].astype(np.float64), expected, limit, name)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", SIZES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_input_gradient(name, tile, monkeypatch):
    with_tile(tile, monkeypatch)
    given, expected, size = case(name, True)
    window, other = CASES[name][2], CASES[name][4]
    space = CASES[name][0][1:-1] if window.axes else ()
    g, w, g2, w2, add = on_gpu(*given)
    extra = Extra(g2, w2, other, to_device(SCALE, "cuda:0"))
    out = conv_gpu.conv_extended_dx(g, w, window, space, extra, add=add)
    limit = bound(expected, size, depth_of(name, True) + 1, bf16)
    assert_within(to_device(out, "cpu").astype(np.float64), expected, limit, name)


@pytest.mark.parametrize("name", CASES)
def test_a_plan_covers_its_result(name):
    x, w, window = CASES[name][:3]
    space = x[1:-1] if window.axes else ()
    to = window.out_space(space) if window.axes else ()
    y = (x[0], *to, w[2] * (window.groups if window.shared else 1))
    first, turned = (term_of(*second_of(name, back), back) for back in (False, True))
    forward = conv_extended_plan.plan_forward(x, w, window, first, True, True, 132)
    back = conv_extended_plan.plan_dx(y, w, window, space, turned, True, True, 132)
    for found, shape, op in ((forward, y, "conv_extended"), (back, x, "conv_extended_dx")):
        assert found.shape == shape and found.launch.op == op
        rows, columns = (int(found.launch.defines[name]) for name in ("TILE_M", "TILE_N"))
        positions, own = np.prod(shape[:-1]), shape[-1] // window.groups
        assert found.grid == (-(-positions // rows) * -(-own // columns) * window.groups,)
        assert found.shared == 4 * 32 * 2 * (rows + columns) and found.repeats >= 1
        assert found.other["blocks"] * found.other["outer"] == shape[-1]
        copies = found.launch.defines["VEC_A"], found.launch.defines["VEC_B"]
        by_elements = {"odd": "11", "odd columns": "81", "odd channels": "18"}.get(name, "88")
        if found is back and by_elements != "88":
            by_elements = "11"  # both operands lie along the columns of g
        assert "".join(copies) == by_elements


def test_blocks_of_a_tile():
    """Each block that has a column of a tile is walked: counted column by column."""
    for own, other, tile in (
        (Term(1, 160, 1, False, False), Term(1, 40, 4, True, False), 64),
        (Term(1, 40, 3, False, False), Term(1, 24, 5, True, False), 32),
        (Term(1, 40, 3, False, False), Term(1, 120, 1, False, True), 128),
    ):
        touched = set()
        for column in range(own.outer * own.blocks):
            group, at = divmod(column, own.outer)
            touched.add((group, at // tile, column // other.outer))
        tiles = {place[:2] for place in touched}
        assert other.blocks_of(tile, own) == len(touched) / len(tiles)


@pytest.mark.parametrize("hopper", [False, True])
@pytest.mark.parametrize(
    ("x", "w", "window", "second"),
    [
        ((4, 32, 32, 256), (9, 64, 256), SAME.grouped(4), Second((1, 16, 256), ONE.grouped(4))),
        ((4, 32, 32, 256), (9, 128, 256), HALF.grouped(2), Second((1, 8, 256), ONE.grouped(2))),
        ((2, 900, 64), (3, 64, 64), Window.of((3,), 1, 300, 300), Second((1, 16, 64), Window.of((1,)))),
    ],
)  # fmt: skip
def test_it_is_offered_where_hopper_refuses(x, w, window, second, hopper):
    ways = product_ways.forward_ways(x, w, window, second, hopper, True, bf16, 132)
    assert plan.choose(*ways) == "portable"
    g = (x[0], *window.out_space(x[1:-1]), w[2])
    second = Second((1, x[-1] // second.window.groups, 16 * second.window.groups), second.window)
    ways = product_ways.dx_ways(g, w, window, x[1:-1], second, hopper, True, bf16, 132)
    assert plan.choose(*ways) == "portable"


def test_it_is_offered_where_an_input_gradient_has_a_stride():
    second = Second((1, 320, 144), ONE)
    g, w, space = (4, 32, 32, 320), (9, 320, 320), (64, 64)
    ways = product_ways.dx_ways(g, w, HALF, space, second, True, True, bf16, 132)
    assert plan.choose(*ways) == "portable" and set(ways[1]) == {"portable", "apart"}


def test_it_is_not_offered_where_hopper_takes_both():
    for hopper in (True, False):
        ways = product_ways.forward_ways(
            (4, 64, 64, 640),
            (9, 640, 640),
            SAME,
            Second((1, 16, 640), ONE),
            hopper,
            True,
            bf16,
            132,
        )
        assert plan.choose(*ways) == ("extended" if hopper else "portable")
        assert ("portable" in ways[1]) != hopper and "apart" in ways[1]


def test_wide_products_stay_with_the_library():
    ways = product_ways.forward_ways(
        (4608, 3072), (1, 3072, 12288), FLAT, Second((1, 16, 12288), FLAT), False, True, bf16, 132
    )
    assert plan.choose(*ways) == "library" and "portable" in ways[1]


def test_a_term_of_another_walk_is_written_by_itself():
    """Its own extents, which the first sum's plan does not know."""
    wide = Second((25, 8, 72), Window.of((5, 5), 1, 0))
    x, w, g, space = (2, 3, 3, 24), (9, 24, 72), (2, 3, 3, 72), (3, 3)
    ways = product_ways.forward_ways(x, w, SAME, wide, True, True, bf16, 132)
    assert "portable" not in ways[1] and plan.choose(*ways) == "apart"
    turned = Second((25, 24, 8), wide.window)
    ways = product_ways.dx_ways(g, w, SAME, space, turned, True, True, bf16, 132)
    assert "portable" not in ways[1] and plan.choose(*ways) == "apart"


def test_what_does_not_join():
    shapes = (9, 24, 72), SAME
    assert joins(bf16, *shapes, (1, 16, 72), ONE)
    assert not joins(np.dtype(np.float32), *shapes, (1, 16, 72), ONE)
    assert not joins(bf16, *shapes, (9, 16, 72), square(padding=2, dilation=2))  # another walk
    assert not joins(bf16, *shapes, (1, 4, 72), ONE)  # would make all be read by elements
    assert not joins(bf16, *shapes, (1, 24, 4), ONE, back=True)
    assert not joins(bf16, *shapes, (1, 0, 72), ONE)
    assert joins(bf16, (9, 3, 72), SAME, (1, 4, 72), ONE)  # as its own are
    assert not joins(bf16, (1, 3, 72), FLAT, (1, 4, 72), FLAT)  # cuBLASLt is better at those
    assert not joins(bf16, (9, 4, 32), SAME.grouped(4), (1, 8, 32), ONE.grouped(4))  # no tiles
    ways = product_ways.forward_ways(
        (2, 9, 11, 24), (9, 24, 72), SAME, Second((1, 16, 72), ONE), False, True, bf16, 132, False
    )
    assert "portable" not in ways[1] and "apart" in ways[1]


def test_a_grouped_convolution_takes_a_term_into_its_input_gradient():
    """One contribution to x waits for the next, which computes both: the sum is that of the two."""
    rng = np.random.default_rng(3)
    window, own = square(padding=1, groups=2), ONE.grouped(2)
    x, w, w2 = (rng.standard_normal(s) for s in ((2, 4, 5, 6), (9, 3, 8), (1, 3, 8)))
    g = rng.standard_normal((2, 4, 5, 8))
    tape = Tape()
    watched = tape.watch(x)
    y = ops.product(watched, w, window, add=ops.product(watched, w2, own))
    dx = tape.gradients(y, g, [watched])[0]
    expected = conv_cpu.conv_dx(g, w, window, (4, 5))
    rows = conv_cpu.conv_dx(g.reshape(-1, 8), w2, own, ()).reshape(x.shape)
    assert np.allclose(dx, expected + rows)
