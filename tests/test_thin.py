"""The kernel that reads g once for both gradients of a thin product, tile by tile, against f64."""

import numpy as np
import pytest

from lycoris_cupy import bf16, ops, to_device
from lycoris_cupy.ops.thin_gpu import _plan, thin_gradients
from lycoris_cupy.ops.window import Window
from lycoris_cupy.tape import Tape
from tests.bounds import assert_within, bound

FLAT = Window()
SCALE = np.array([0.703125], np.float32)
# rows, columns, ranks: tails in each, one and several chunks of columns, strips of one and of many tiles.
SIZES = [
    (1024, 320, 16), (1025, 328, 8), (4608, 3072, 16), (1500, 384, 32), (2049, 1288, 24), (9000, 40, 16),
    (1031, 1280, 32),
]  # fmt: skip


def draw(rng, *shape):
    return rng.standard_normal(shape, np.float32).astype(bf16).astype(np.float64)


@pytest.mark.gpu
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gradients(size, scaled):
    rows, columns, ranks = size
    rng = np.random.default_rng(size)
    g, x, w, z, c = (
        draw(rng, rows, columns), draw(rng, rows, ranks), draw(rng, ranks, columns),
        draw(rng, rows, columns), draw(rng, columns),
    )  # fmt: skip
    arrays = [to_device(a.astype(bf16), "cuda:0") for a in (g, x, w[None])]
    more = {}
    if scaled:
        more = {
            "c": to_device(c.astype(np.float32), "cuda:0"),
            "z": to_device(z.astype(bf16), "cuda:0"),
        }
    runs = [thin_gradients(*arrays, FLAT, to_device(SCALE, "cuda:0"), **more) for _ in range(2)]
    dx, dw, gc, dc = (None if a is None else to_device(a, "cpu") for a in runs[0])
    assert all(a is None or (a == b).all() for a, b in zip(*runs, strict=True))  # a fixed order
    expected = {
        "dx": (dx, SCALE * (g @ w.T), abs(g) @ abs(w).T, columns, bf16),
        "dw": (dw[0], SCALE * (x.T @ g), abs(x).T @ abs(g), rows, np.float32),
    }
    if scaled:
        expected["gc"] = (gc, c * g, abs(c * g), 1, bf16)
        expected["dc"] = (dc, (g * z).sum(0), abs(g * z).sum(0), rows, np.float32)
    else:
        assert gc is None and dc is None
    for name, (found, exact, magnitude, depth, dtype) in expected.items():
        limit = bound(exact, magnitude, depth + 1, np.dtype(dtype))
        assert_within(found.astype(np.float64), exact, limit, name)


@pytest.mark.gpu
def test_what_is_not_taken():
    def given(rows=1024, columns=320, ranks=16, dtype=bf16):
        shapes = (rows, columns), (rows, ranks), (1, ranks, columns)
        return [to_device(np.zeros(shape, dtype), "cuda:0") for shape in shapes]

    assert thin_gradients(*given(), FLAT, None) is not None
    for odd in (
        given(rows=512), given(columns=324), given(ranks=12), given(ranks=40), given(dtype=np.float32),
    ):  # fmt: skip
        assert thin_gradients(*odd, FLAT, None) is None
    g, x, w = given()
    assert thin_gradients(g[:, ::1][1:], x[1:], w, FLAT, None) is None  # too few rows
    assert thin_gradients(g, x, w, Window(groups=2, shared=True), None) is None
    assert thin_gradients(g.T.copy().T, x, w, FLAT, None) is None  # not contiguous


@pytest.mark.gpu
def test_a_product_takes_it():
    """The gradients of a thin product are the kernel's own, bit for bit."""
    rng = np.random.default_rng(0)
    x, w, g = (
        to_device(rng.standard_normal(shape, np.float32).astype(bf16), "cuda:0")
        for shape in ((2048, 16), (1, 16, 640), (2048, 640))
    )
    tape = Tape()
    watched = tape.watch(x), tape.watch(w)
    found = tape.gradients(ops.product(*watched), g, watched)
    both = thin_gradients(g, x, w, FLAT, None)
    assert (found[0] == both.dx).all() and (found[1] == both.dw).all()


def test_plan():
    """Every column has a chunk, every row a strip, and the blocks fill the multiprocessors."""
    for columns in (40, 320, 328, 640, 3072, 12288, 14336):
        for rows in (1024, 4608, 65536):
            for ranks, scaled in ((16, False), (16, True), (32, False), (32, True)):
                plan = _plan(rows, columns, ranks, scaled, 132)
                chunks, strips = plan.grid
                assert plan.shared <= 108 * 1024  # two blocks a multiprocessor, with what is static
                assert strips * plan.span * 32 >= rows > (strips - 1) * plan.span * 32
                assert chunks * strips <= max(2 * 132, chunks)
    assert _plan(512, 320, 16, False, 132) is None and _plan(4096, 320, 40, False, 132) is None
