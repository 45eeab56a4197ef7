"""The products of a wide x with a few columns: x @ w and x^T @ g from one read of x, against f64."""

import numpy as np
import pytest

from lycoris_cupy import bf16, ops, plan, to_device
from lycoris_cupy.ops import product_gpu
from lycoris_cupy.ops.extended_gpu import hopper
from lycoris_cupy.ops.thin_product_gpu import _outer_ways, plan_thin, thin_outer, thin_product
from lycoris_cupy.ops.window import Window
from lycoris_cupy.tape import Tape
from tests.bounds import assert_within, bound

FLAT = Window()
SCALE = np.array([0.703125], np.float32)
# positions, inputs, ranks: one tile and many, tails in each, every count of blocks that share a sum, rings that go
# round several times, and 8, 16, 24 ... 64 columns of the three widths.
SIZES = [
    (1, 8, 8), (128, 64, 16), (130, 72, 24), (300, 136, 16), (77, 200, 40), (1025, 328, 8), (256, 1000, 64),
    (4608, 3072, 16), (2049, 1288, 32), (9000, 320, 16), (520, 4104, 64), (17000, 72, 56), (200, 12288, 16),
    (9000, 136, 64), (192, 600, 16),
]  # fmt: skip


def draw(rng, *shape):
    return rng.standard_normal(shape, np.float32).astype(bf16).astype(np.float64)


@pytest.fixture
def on_hopper():
    if not hopper():
        pytest.skip("the kernel is Hopper's")


@pytest.mark.gpu
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products(size, scaled, on_hopper):
    positions, inputs, ranks = size
    rng = np.random.default_rng(size)
    x, w, g = draw(rng, positions, inputs), draw(rng, inputs, ranks), draw(rng, positions, ranks)
    on_gpu = {n: to_device(a.astype(bf16), "cuda:0") for n, a in (("x", x), ("w", w), ("g", g))}
    factor = SCALE[0] if scaled else 1.0
    scale = to_device(SCALE, "cuda:0") if scaled else None
    runs = {
        "thin_product": lambda: thin_product(on_gpu["x"], on_gpu["w"][None], scale=scale),
        "thin_outer": lambda: thin_outer(on_gpu["x"], on_gpu["g"], scale=scale)[0],
    }
    exact = {"thin_product": (x, w, bf16), "thin_outer": (x.T, g, np.dtype(np.float32))}
    for name, run in runs.items():
        a, b, dtype = exact[name]
        first, second = (to_device(run(), "cpu") for _ in range(2))
        assert first.dtype == dtype and (first == second).all()  # a fixed order
        limit = bound(factor * (a @ b), factor * (abs(a) @ abs(b)), a.shape[1] + 1, dtype)
        assert_within(first.astype(np.float64), factor * (a @ b), limit, name)


@pytest.mark.gpu
def test_a_layers_prologue_takes_them(on_hopper):
    """x @ down and the gradient of down are the kernels' own, bit for bit."""
    rng = np.random.default_rng(0)
    x, w, g = (
        to_device(rng.standard_normal(shape, np.float32).astype(bf16), "cuda:0")
        for shape in ((2, 2304, 3072), (1, 3072, 16), (2, 2304, 16))
    )
    tape = Tape()
    watched = tape.watch(w)
    with plan.recording() as choices:
        h = ops.product(x, watched)
        (dw,) = tape.gradients(h, g, (watched,))
    assert [c.way for c in choices] == ["thin", "thin"]
    assert (h.value == thin_product(x, w, scale=None)).all()
    assert (dw == thin_outer(x, g, scale=None)).all()


@pytest.mark.gpu
def test_what_is_not_a_number_stays_in_its_row(on_hopper):
    """Columns and steps past the ends are zeros of both operands, not products with what is there."""
    x, w = np.ones((130, 72), np.float32), np.ones((1, 72, 8), np.float32)
    x[129, 71] = np.nan
    x[3, 0] = np.inf
    x, w = (to_device(a.astype(bf16), "cuda:0") for a in (x, w))
    h = to_device(thin_product(x, w, scale=None), "cpu").astype(np.float32)
    assert np.isnan(h[129]).all() and np.isinf(h[3]).all()
    assert (np.delete(h, [3, 129], axis=0) == 72).all()


@pytest.mark.parametrize("ranks", [8, 16, 32, 40, 64])
@pytest.mark.parametrize("size", [(1, 8), (4608, 3072), (8192, 14336), (65536, 320), (50000, 64)])
def test_plan(size, ranks):
    """Every row has a tile, blocks that share a sum all have a part, stages fit a multiprocessor."""
    rows, inner = size
    for op in ("thin_product", "thin_outer"):
        found = plan_thin(op, rows, inner, ranks, 132)
        splits = int(found.launch.defines["SPLITS"])
        assert found.grid == (-(-rows // 128) * splits,) and splits <= -(-inner // 64)
        held = 3 if ranks <= 16 else 2
        assert found.width >= ranks and held * (found.shared + 2048) <= 228 * 1024
        # No faster than memory, and no block slower than all of them.
        assert found.seconds * plan.READ > 2 * rows * inner


def test_sizes_cover_the_plans():
    for op in ("thin_product", "thin_outer"):
        found = [
            plan_thin(op, *((p, i) if op == "thin_product" else (i, p)), r, 132)
            for p, i, r in SIZES
        ]
        assert {p.width for p in found} == {16, 32, 64}
        assert {p.launch.defines["SPLITS"] for p in found} == {"1", "2", "4", "8"}


def test_more_than_64_columns_have_no_plan():
    assert plan_thin("thin_product", 4608, 3072, 72, 132) is None


def forward_ways(rows, inner, ranks, window=FLAT, bare=True):
    groups = window.groups
    w = (1, inner // groups, ranks)
    return product_gpu._forward_ways((rows, inner), w, window, None, True, bf16, 132, False, bare)


def test_where_it_is_chosen():
    for rows, inner, ranks in ((4608, 3072, 16), (8192, 14336, 64), (65536, 320, 16)):
        assert plan.choose(*forward_ways(rows, inner, ranks)) == "thin"
    assert plan.choose(*forward_ways(64, 3072, 16)) == "library"
    for other in (
        forward_ways(4608, 3072, 16, bare=False),
        forward_ways(4608, 3072, 16, Window(groups=4, shared=True)),
        forward_ways(4608, 3072, 128),
    ):
        assert "thin" not in other[1]
    rows = (4608, 3072), (4608, 16)
    assert plan.choose(*_outer_ways(*rows, FLAT, True, bf16, 132)) == "thin"
    assert set(_outer_ways(*rows, FLAT, False, bf16, 132)[1]) == {"library"}


def test_no_way_is_faster_than_memory():
    """The extended product too: its count of cycles knows nothing of what all blocks read."""
    for rows, inner, ranks in ((50000, 3072, 16), (8192, 14336, 64), (65536, 320, 16)):
        _, seconds, _, moved = forward_ways(rows, inner, ranks)
        assert "extended" in seconds and min(seconds.values()) >= moved / plan.READ
