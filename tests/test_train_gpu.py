"""Training on a GPU: a step is captured and waits for nothing; a run does what the plain loop does."""

import time

import numpy as np
import pytest

from lycoris_cupy import to_device
from lycoris_cupy.optim import AdamW, Average, Lion, cosine
from lycoris_cupy.train import NonFiniteError, Step, fit, launch
from lycoris_cupy.train.reducers import nccl_missing
from tests import training
from tests.training import batch, factors, squared_error, student

pytestmark = pytest.mark.gpu
GPU = "cuda:0"
NAN = float("nan")


def moved(step):
    return tuple(tuple(to_device(x, GPU) for x in part) for part in batch(step))


def train(engine, batches=moved, steps=20, make=AdamW, loss=squared_error, **options):
    optimizer = make(engine.parameters("a"), cosine(0.02, 20, 3), clip=0.5)
    decay = options.pop("decay", None)
    average = None if decay is None else Average(optimizer.masters, decay, warmup=True)
    return training.train(engine, optimizer, steps, batches, loss, average=average, **options)


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_the_loop_is_the_plain_one(dtype):
    """To the bit: the same kernels in the same order, in a graph or not."""
    plain, fast = student(GPU, dtype), student(GPU, dtype)
    optimizer = AdamW(plain.parameters("a"), cosine(0.02, 20, 3), clip=0.5)
    losses = []
    for step in range(20):
        inputs, targets = moved(step)
        y, pullback = plain.vjp(*inputs)
        value, dy = squared_error(y, *targets)
        plain.set_parameters("a", optimizer.step(pullback(dy)[1]["a"]))
        losses.append(float(value))
    result = train(fast, log_every=20)
    assert (factors(fast) == factors(plain)).all()
    np.testing.assert_allclose(result.loss, np.mean(losses), rtol=1e-6)
    assert losses[-1] < losses[0]


def test_the_gpu_learns_what_the_cpu_does():
    cpu, gpu = student("cpu", "f32"), student(GPU, "f32")
    results = [train(engine, batches) for engine, batches in ((cpu, batch), (gpu, moved))]
    # Adam's first steps are of the size of the rate whatever the gradient: noise shows there.
    np.testing.assert_allclose(factors(gpu), factors(cpu), atol=0.01)
    np.testing.assert_allclose(results[1].loss, results[0].loss, rtol=1e-2)


@pytest.mark.parametrize(
    "options", [{"accumulate": 2}, {"decay": 0.9}, {"make": Lion}, {"max_norm": 0.3}]
)
def test_resumed_is_unbroken(options, tmp_path):
    def until(stop):
        def batches(step):
            if step == stop:
                raise KeyboardInterrupt
            return moved(step)

        return batches

    common = {"checkpoint_every": 3, "log_every": 4, **options}
    whole, broken, resumed = (student(GPU, "bf16", dropout=0.2) for _ in range(3))
    train(whole, out=tmp_path / "whole", **common)
    with pytest.raises(KeyboardInterrupt):
        train(broken, until(11), out=tmp_path / "run", **common)
    train(resumed, out=tmp_path / "run", resume=True, **common)
    assert (factors(resumed) == factors(whole)).all()
    for name in ("a.safetensors", "checkpoints/step-00000020/state.safetensors"):
        found = [(tmp_path / run / name).read_bytes() for run in ("whole", "run")]
        assert len(found[0]) > 1000 and (name != "a.safetensors" or found[0] == found[1])


def test_pieces_are_the_whole_batch():
    whole, pieces = student(GPU, "f64"), student(GPU, "f64")
    train(whole)
    train(pieces, accumulate=4)
    np.testing.assert_allclose(factors(pieces), factors(whole), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_waits_for_nothing(accumulate):
    """A kernel holds the stream for a while; the host has long asked for all steps by then."""
    import cupy

    engine = student(GPU, "bf16")
    optimizer = AdamW(engine.parameters("a"), cosine(0.02, 100))
    step = Step(engine, "a", squared_error, optimizer, accumulate=accumulate,
                average=Average(optimizer.masters, 0.9))  # fmt: skip
    inputs, targets = moved(0)
    for _ in range(3):
        step(inputs, targets)
    hold = cupy.RawKernel(
        'extern "C" __global__ void hold(long long n) {'
        "  const long long end = clock64() + n; while (clock64() < end) {} }",
        "hold",
    )
    hold((1,), (1,), (np.int64(1000),))
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.get_current_stream()
    begin = time.perf_counter()
    hold((1,), (1,), (np.int64(2_000_000_000),))  # a second or so
    for _ in range(20):
        step(inputs, targets)
    asked, running = time.perf_counter() - begin, not stream.done
    stream.synchronize()
    whole = time.perf_counter() - begin
    assert running and asked < whole / 2, (asked, whole)
    assert step.meter.look().steps == 23


def test_the_first_value_that_is_not_finite_is_named(tmp_path):
    def batches(step):
        parts = batch(step)
        if step == 7:
            parts[0][0][0, 1, 2] = NAN
        return parts

    with pytest.raises(NonFiniteError, match="^step 7: input 0 of the batch is not finite"):
        train(student(GPU, "bf16"), batches, out=tmp_path / "run", checkpoint_every=2, log_every=5)
    names = sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["step-00000004", "step-00000006"]

    def breaking(y, target):
        value, dy = squared_error(y, target)
        return value, dy * (3e38 * (target.sum() > 1e6))

    def marked(step):
        inputs, (target,) = moved(step)
        target[0, 0, 0, 0] = 1e7 if step == 4 else 0
        return inputs, (target,)

    with pytest.raises(NonFiniteError, match="^step 4: the gradient of "):
        train(student(GPU, "f32"), marked, loss=breaking)


def alone(reducer):
    engine = student(reducer.device, "f64")
    optimizer = AdamW(engine.parameters("a"), 0.02)
    training.train(engine, optimizer, 5, moved, reducer=reducer)
    return factors(engine)


def test_one_process_through_nccl():
    """NCCL among one: the whole path of several GPUs, on a machine with one."""
    if nccl_missing():
        pytest.skip(f"GPU row: {nccl_missing()}")
    engine = student(GPU, "f64")
    optimizer = AdamW(engine.parameters("a"), 0.02)
    fit(engine, moved, squared_error, name="a", optimizer=optimizer, steps=5, progress=False)
    np.testing.assert_allclose(launch(alone, 1), factors(engine), rtol=1e-9, atol=1e-12)
