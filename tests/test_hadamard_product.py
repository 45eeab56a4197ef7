"""A LoHa on a linear layer of few positions: which launches it takes, and that it gives what its
factors of rank R^2 give.
"""

import numpy as np
import pytest

from lycoris_cupy import Engine, Linear, LoCon, LoHa, bf16, plan, to_device
from lycoris_cupy.adapters import loha
from lycoris_cupy.attachment import Attachment
from lycoris_cupy.kernels import Kernel
from lycoris_cupy.ops.extended_gpu import hopper
from tests.bounds import ROUNDING
from tests.dry_gpu import dry_gpu

GROUPS = {
    "LoHa": (LoHa,),
    "LoRA, then LoHa": (LoCon, LoHa),
    "LoHa, then LoRA": (LoHa, LoCon),
}


def engine_of(group, device, dtype=bf16, sizes=(136, 264)):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(sizes, np.float32) * sizes[0] ** -0.5
    layer = Linear(*(a.astype(bf16) for a in (weight, rng.standard_normal(sizes[1]))))
    engine = Engine({"layer": layer.to(device)}, device=device)
    for i, algorithm in enumerate(group):
        adapter = algorithm.create(layer.shape, 8, 8.0)
        p = {n: rng.standard_normal(v.shape) / 4 for n, v in adapter.init(rng).items()}
        engine.attachments[f"a{i}"] = Attachment({"layer": (adapter, p)}, device, dtype, 0.7)
    return engine


def step(engine, x, g):
    with plan.recording() as choices:
        y, pullback = engine.vjp(x)
    dx, gradients = pullback(g)
    flat = [a[k] for a in (of["layer"] for of in gradients.values()) for k in sorted(a)]
    return [c.way for c in choices], [y, dx, *flat]


def test_a_step_takes_a_launch_for_each_result(monkeypatch):
    launched, call = [], Kernel.__call__

    def counted(self, *args, **more):
        launched.append(self.op)
        return call(self, *args, **more)

    with dry_gpu(90) as device:
        engine = engine_of(GROUPS["LoHa"], device)
        x, g = (to_device(np.zeros((64, n), bf16), device) for n in (136, 264))
        monkeypatch.setattr(Kernel, "__call__", counted)
        ways, _ = step(engine, x, g)
    assert ways[0] == "hadamard"
    assert launched == ["skinny_hadamard", "few_hadamard", "skinny_hadamard"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [bf16, np.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("name", GROUPS)
def test_it_gives_what_the_exact_factors_give(name, dtype, monkeypatch):
    if not hopper():
        pytest.skip("not a Hopper GPU")
    engine = engine_of(GROUPS[name], "cuda:0", dtype)
    rng = np.random.default_rng(1)
    x, g = (
        to_device(rng.standard_normal((2, 30, n), np.float32).astype(bf16), "cuda:0")
        for n in (136, 264)
    )
    ways, found = step(engine, x, g)
    monkeypatch.setattr(loha, "waits", lambda *of: False)
    others, expected = step(engine, x, g)
    assert ("hadamard" in ways) == (name != "LoHa, then LoRA") and "hadamard" not in others
    for a, b in zip(found, expected, strict=True):
        a, b = (to_device(v, "cpu").astype(np.float64) for v in (a, b))
        assert a.shape == b.shape
        assert np.linalg.norm(a - b) < 4 * ROUNDING["bf16"] * np.linalg.norm(b)
