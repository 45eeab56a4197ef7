"""Launches whose blocks run at once, on a device that has no room for them."""

import numpy as np
import pytest

from lycoris_cupy import bf16, ops, to_device
from lycoris_cupy.ops import cooperative, extended_low_rank_gpu, extended_mixed_gpu
from lycoris_cupy.ops.before import by_down, by_mix
from lycoris_cupy.ops.extended_gpu import hopper
from lycoris_cupy.ops.window import Window

FLAT = Window()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["low rank", "mixed"])
def test_without_room_it_goes_another_way(kind, monkeypatch):
    import cupy

    if not hopper():
        pytest.skip("the kernels are Hopper's")
    rng, tries = np.random.default_rng(2), []

    def draw(*shape):
        return to_device(rng.standard_normal(shape, np.float32).astype(bf16), "cuda:0")

    def refuse(*args, **of):
        tries.append(1)
        raise cupy.cuda.driver.CUDADriverError(720)

    x, w = draw(1536, 512), draw(1, 512, 768)
    if kind == "low rank":
        before, second, other = by_down(draw(1, 512, 16), FLAT), draw(1, 16, 768), FLAT
        module, name = extended_low_rank_gpu, "plan_low_rank"
        planned = module.plan_low_rank(1536, 512, 16, 768, 132)
    else:
        before, second = by_mix(draw(4, 4)), draw(1, 128, 192)
        other, module, name = FLAT.grouped(4, shared=True), extended_mixed_gpu, "plan_mixed"
        planned = module.plan_mixed(1536, 768, 4, 4, 128, 132)
    forced = planned._replace(launch=refuse, seconds=0.0)
    monkeypatch.setattr(module, name, lambda *sizes: forced)
    monkeypatch.setattr(cooperative, "_refused", set())
    change = ops.pending(x, second, other, before=before)
    found = [to_device(ops.extended(x, w, FLAT, change), "cpu") for _ in range(2)]
    assert len(tries) == 1 and cooperative.refused()
    by_itself = ops.pending(before(x), second, other)
    expected = to_device(ops.extended(x, w, FLAT, by_itself), "cpu")
    assert all((y == expected).all() for y in found)
