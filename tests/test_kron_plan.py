"""Which shapes the one-piece kernels of a LoKr take, and that what they ask of a GPU is there."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest

from lycoris_cupy import bf16
from lycoris_cupy.ops import kron_gpu, mixed
from lycoris_cupy.ops.window import Window

SQUARE = Window.of((3, 3), padding=1)
HOPPER, ADA = (132, 227 * 1024 - 2560), (128, 99 * 1024 - 2560)  # multiprocessors, shared memory

TAKEN = {
    "320 channels": ((4, 128, 128, 320), (8, 8), (9, 40, 40), SQUARE),
    "640 channels": ((4, 64, 64, 640), (8, 8), (9, 80, 80), SQUARE),
    "64 channels": ((16, 32, 32, 64), (4, 4), (9, 16, 16), SQUARE),
    "wider": ((2, 16, 24, 320), (8, 8), (9, 40, 80), SQUARE),
    "8 to 4": ((1, 7, 8, 128), (4, 8), (9, 16, 64), SQUARE),
    "25 taps": ((1, 8, 8, 256), (8, 8), (25, 32, 16), Window.of((5, 5), padding=2)),
}
REFUSED = {
    "single positions": ((77, 128), (8, 8), (1, 16, 32), Window.of(())),
    "one tap": ((4, 32, 32, 320), (8, 8), (1, 40, 40), Window.of((1, 1))),
    "a stride": ((4, 32, 32, 320), (8, 8), (9, 40, 40), Window.of((3, 3), stride=2, padding=1)),
    "five blocks": ((4, 32, 32, 80), (5, 5), (9, 16, 16), SQUARE),
    "odd widths": ((4, 32, 32, 8 * 20), (8, 8), (9, 20, 20), SQUARE),
    "one axis": ((4, 32, 128), (8, 8), (3, 16, 16), Window.of((3,), padding=1)),
    "pieces mostly outside": ((64, 3, 3, 128), (8, 8), (9, 16, 16), SQUARE),
}


@pytest.mark.parametrize("limits", [HOPPER, ADA], ids=["227 KiB", "99 KiB"])
@pytest.mark.parametrize("case", TAKEN.values(), ids=TAKEN)
def test_plans_fit_the_device(case, limits):
    x, w1, w2, window = case
    count, most = limits
    forward, back, dw = kron_gpu._plans(x, w1, w2, window, count, most)
    if None in (forward, back, dw):
        assert limits is ADA  # a block needs more than there is: the other way is taken
    for plan in filter(None, (forward, back)):
        assert plan.shared <= most
        pixels, positions, pieces, inner, outer, outs, part = plan.numbers
        assert inner % part == 0 and part % 8 == 0 and plan.grid[0] <= pieces
        assert pieces * 64 >= positions and prod(plan.grid) <= max(count, plan.grid[1])
        assert plan.numbers[3:5] == (w2[1:] if plan is forward else w2[:0:-1])
    if dw is not None:
        assert dw.shared <= most and dw.numbers[3] % dw.numbers[-1] == 0


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_no_kernel_does_has_no_plan(case):
    assert not all(kron_gpu._plans(*case, *HOPPER))


def test_a_piece_with_its_halo():
    walk = kron_gpu._walk((2, 16, 24, 320), (8, 8), (9, 40, 80), SQUARE)
    assert (walk.pieces, walk.piece_pixels) == (2 * 2 * 3, 100)
    back = walk.back()
    assert (back.blocks, back.outs, back.inner, back.outer) == (8, 8, 80, 40)
    assert back.window.padding == (1, 1) and back.pixels == walk.positions


@pytest.mark.parametrize(
    ("positions", "rank", "one"), [(64, 16, True), (1, 8, True), (4608, 16, False), (64, 12, False)]
)
def test_the_first_factor_of_few_positions_is_mixed_at_once(positions, rank, one, monkeypatch):
    """Where the copy engine could read the arrays, which is looked at by their shapes alone."""
    monkeypatch.setattr(mixed, "takes", lambda *arrays: all(a.shape[-1] % 8 == 0 for a in arrays))
    x, w, w1 = (np.zeros(s, bf16) for s in ((positions, 3072), (1, 384, rank), (8, 8)))
    assert mixed._in_one_launch(x, w, w1, Window().grouped(8, shared=True)) == one
