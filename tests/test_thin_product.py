"""The product of a wide x with a few columns from one read of x, against f64."""

import numpy as np
import pytest

from lycoris_cupy import bf16, ops, plan, to_device
from lycoris_cupy.ops import product_ways
from lycoris_cupy.ops.thin_product_gpu import _SHARED, plan_thin, thin_product
from lycoris_cupy.ops.window import Window
from tests.bounds import assert_within, bound

FLAT = Window()
SCALE = np.array([0.703125], np.float32)
# positions, inputs, ranks: one tile and many, tails in each, every count of blocks that share a sum, and rings that go
# round several times.
SIZES = [
    (1, 8, 8), (128, 64, 16), (130, 72, 16), (300, 136, 16), (77, 200, 8), (1025, 328, 8), (256, 1000, 16),
    (4608, 3072, 16), (2049, 1288, 16), (9000, 320, 16), (520, 4104, 8), (17000, 72, 16), (200, 12288, 16),
    (9000, 136, 8), (192, 600, 16), (12000, 600, 16),
]  # fmt: skip


def draw(rng, *shape):
    return rng.standard_normal(shape, np.float32).astype(bf16).astype(np.float64)


@pytest.mark.gpu
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products(size, scaled, on_hopper):
    positions, inputs, ranks = size
    rng = np.random.default_rng(size)
    x, w = draw(rng, positions, inputs), draw(rng, inputs, ranks)
    on_gpu = [to_device(a.astype(bf16), "cuda:0") for a in (x, w[None])]
    factor = SCALE[0] if scaled else 1.0
    scale = to_device(SCALE, "cuda:0") if scaled else None
    first, second = (to_device(thin_product(*on_gpu, scale=scale), "cpu") for _ in range(2))
    assert first.dtype == bf16 and (first == second).all()  # a fixed order
    limit = bound(factor * (x @ w), factor * (abs(x) @ abs(w)), inputs + 1, bf16)
    assert_within(first.astype(np.float64), factor * (x @ w), limit, str(size))


@pytest.mark.gpu
def test_a_layers_prologue_takes_it(on_hopper):
    """x @ down is the kernel's own, bit for bit."""
    rng = np.random.default_rng(0)
    x, w = (
        to_device(rng.standard_normal(shape, np.float32).astype(bf16), "cuda:0")
        for shape in ((2, 700, 3072), (1, 3072, 16))
    )
    with plan.recording() as choices:
        h = ops.product(x, w)
    assert [c.way for c in choices] == ["thin"]
    assert (h == thin_product(x, w, scale=None)).all()


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


@pytest.mark.parametrize("ranks", [8, 16])
@pytest.mark.parametrize("size", [(1, 8), (4608, 3072), (8192, 14336), (65536, 320), (50000, 64)])
def test_plan(size, ranks):
    """Every row has a tile, blocks that share a sum all have a part, stages fit a multiprocessor."""
    rows, inner = size
    found = plan_thin(rows, inner, ranks, 132)
    splits = int(found.launch.defines["SPLITS"])
    assert found.grid == (-(-rows // 128) * splits,) and splits <= -(-inner // 64)
    assert 3 * (_SHARED + 2048) <= 228 * 1024
    # No faster than memory, and no block slower than all of them.
    assert found.seconds * plan.READ > 2 * rows * inner


def test_sizes_cover_the_plans():
    found = {plan_thin(*size, 132).launch.defines["SPLITS"] for size in SIZES}
    assert found == {"1", "2", "4", "8"}


def test_more_than_16_columns_have_no_plan():
    assert plan_thin(4608, 3072, 24, 132) is None


def forward_ways(rows, inner, ranks, window=FLAT, bare=True):
    groups = window.groups
    w = (1, inner // groups, ranks)
    arguments = (rows, inner), w, window, None, True, True, bf16, 132, False, bare
    return product_ways.forward_ways(*arguments)


def test_where_it_is_chosen():
    for rows, inner, ranks in ((1024, 3072, 16), (2048, 4096, 8)):
        assert plan.choose(*forward_ways(rows, inner, ranks)) == "thin"
    for other in (
        forward_ways(1024, 3072, 16, bare=False),
        forward_ways(1024, 3072, 16, Window(groups=4, shared=True)),
        forward_ways(1024, 3072, 64),
        forward_ways(4608, 3072, 16),
    ):
        assert "thin" not in other[1]


def test_no_way_is_faster_than_memory():
    """The extended product too: its count of cycles knows nothing of what all blocks read."""
    for rows, inner, ranks in ((50000, 3072, 16), (8192, 14336, 64), (65536, 320, 16)):
        _, seconds, _, moved = forward_ways(rows, inner, ranks)
        assert "extended" in seconds and min(seconds.values()) >= moved / plan.READ
