"""A step of a LoKr with a factored w2 whose factors have their gradients from one launch, against the
same without, on a GPU of its kind.
"""

import numpy as np
import pytest

from lycoris_cupy import bf16, ops, plan, to_device
from lycoris_cupy.ops import mixed_back
from lycoris_cupy.ops.before import by_down_and_mix
from lycoris_cupy.tape import Tape
from tests.arrays import drawn, host, on_gpu


@pytest.mark.gpu
@pytest.mark.parametrize("ranks, wide", [(16, 160), (8, 72), (40, 128)])
@pytest.mark.parametrize("space", [(2, 700), (2, 24, 64)], ids=str)
def test_a_layer_takes_it_and_its_gradients_are_the_same(
    space, ranks, wide, on_hopper, monkeypatch
):
    rng = np.random.default_rng(ranks)
    sizes = (*space, 8 * wide), (1, 8 * wide, 8 * 96), (1, wide, ranks), (8, 8), (1, ranks, 96)
    x, w, down, w1, up = on_gpu(*(drawn(rng, *size) for size in sizes))
    window = ops.Window.of((1, 1)) if len(space) == 3 else ops.Window()
    shared, scale = window.grouped(8, shared=True), to_device(np.array([0.7], np.float32), "cuda:0")

    def step():
        tape = Tape()
        watched = [tape.watch(a) for a in (x, down, w1, up)]
        change = ops.pending(
            watched[0], watched[3], shared, scale=scale,
            before=by_down_and_mix(watched[1], watched[2], shared),
        )  # fmt: skip
        y = ops.extended(watched[0], w, window, change)
        g = to_device(rng.standard_normal(y.shape).astype(bf16), "cuda:0")
        with plan.recording() as choices:
            found = tape.gradients(y, g, watched)
        return g, [choice.way for choice in choices], found

    seed = rng.bit_generator.state
    g, ways, found = step()
    monkeypatch.setattr(mixed_back, "plan_thin_outers", lambda *sizes: None)
    rng.bit_generator.state = seed
    same, _, expected = step()
    assert "thin outer" in ways and (host(g) == host(same)).all()
    for a, b in zip(map(host, found), map(host, expected), strict=True):
        assert np.linalg.norm(a - b) < 2.0**-8 * np.linalg.norm(b)
