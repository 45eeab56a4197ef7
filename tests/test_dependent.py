"""Launches that begin while the kernel before them ends: who waits, and that nothing is read too early."""

import numpy as np
import pytest

from lycoris_cupy import Engine, Linear, LoCon, LoKr, bf16, dependent, to_device
from lycoris_cupy.attachment import Attachment
from lycoris_cupy.cuda_source import expand, signatures, source_folder
from lycoris_cupy.layers import LayerShape
from tests.arrays import drawn


def waiting():
    for path in sorted(source_folder().glob("*.cu")):
        source = expand(path.name)
        yield from ((path.name, op) for op in signatures(source) if dependent.waits(source, op))


def test_a_kernel_that_waits_lets_the_next_one_begin():
    """Only after it waits: a kernel behind it waits for this one, which must not be done before its own
    predecessor is."""
    found = list(waiting())
    assert ("extended.cu", "extended") in found and ("thin.cu", "thin_sum") in found
    for file, op in found:
        body = expand(file).split(f"NAME({op})", 1)[1].split('extern "C"', 1)[0]
        before, after = body.split("await_previous();")
        assert after.lstrip().startswith("let_next();"), (file, op)
        assert "return" not in before, (file, op)


def test_arguments_as_they_lie_in_memory():
    struct = np.zeros((), [("a", np.int32, 3)])
    found = [dependent._bytes_of(v) for v in (None, np.int32(-7), np.float32(0.5), struct)]
    assert [v.tobytes() for v in found] == [
        bytes(8), np.int32(-7).tobytes(), np.float32(0.5).tobytes(), bytes(12)
    ]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("positions", [8, 64, 4608])
def test_a_captured_step_is_the_step_bit_for_bit(positions):
    """Many replays one behind another, each kernel's blocks beside the last of the one before."""
    import cupy

    rng = np.random.default_rng(positions)
    engine = Engine({"layer": Linear(drawn(rng, 768, 1536, size=0.03), None)}, device="cuda:0")
    shape = LayerShape(engine.layers["layer"].window, 768, 1536)
    adapters = {"a": LoCon(shape, 16, 8.0), "b": LoKr.create(shape, 8, factor=8, full_matrix=True)}
    for name, adapter in adapters.items():
        made = {n: drawn(rng, *v.shape, size=0.1) for n, v in adapter.init(rng).items()}
        engine.attachments[name] = Attachment({"layer": (adapter, made)}, "cuda:0", bf16, 1.0)
    x = to_device(drawn(rng, positions, 768).astype(bf16), "cuda:0")
    dy = to_device(drawn(rng, positions, 1536).astype(bf16), "cuda:0")

    def step():
        y, pullback = engine.vjp(x)
        dx, grads = pullback(dy)
        factors = [v for of in grads.values() for v in of["layer"].values()]
        return [y, dx, *factors]

    from benchmarks.timing import captured

    expected, replay = step(), captured(step)
    for _ in range(50):
        results = replay()
    cupy.cuda.get_current_stream().synchronize()
    for found, right in zip(results, expected, strict=True):
        assert (found == right).all()
