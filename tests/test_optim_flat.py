"""Many factors in one go: flat buffers, NumPy's blocks, tables for kernels, launches of a step, and
the GPU against the CPU.
"""

import re

import numpy as np
import pytest

from lycoris_cupy import Engine, Linear, bf16, kernels, to_device
from lycoris_cupy.cuda_source import expand
from lycoris_cupy.errors import DeviceError, DtypeError, MatchError
from lycoris_cupy.optim import (
    SGD,
    Accumulator,
    AdamW,
    Average,
    Lion,
    Prodigy,
    ScheduleFreeAdamW,
    multi,
    random_bits,
    round_stochastically,
)
from lycoris_cupy.optim.flat import BLOCK, Layout
from tests.test_optim import on

# Larger than a block of NumPy's and than a kernel's chunk, odd, of one element and of none.
SHAPES = [(BLOCK + 5, 3), (7,), (1, 1), (0, 4), (64, 33), (8, 1024), (3, 3, 5), (130,)]
METHODS = {
    "sgd": (SGD, {"lr": 0.02, "weight_decay": 0.1}),
    "nesterov": (SGD, {"lr": 0.02, "nesterov": True}),
    "lion": (Lion, {"lr": 0.02, "weight_decay": 0.1}),
    "adamw": (AdamW, {"lr": 0.02, "weight_decay": 0.1}),
    "prodigy": (Prodigy, {"d0": 0.01, "weight_decay": 0.1}),
    "schedule_free": (ScheduleFreeAdamW, {"lr": 0.02, "weight_decay": 0.1}),
}
EACH = pytest.mark.parametrize("method", METHODS)


def many(seed, dtype, shapes=SHAPES, count=1):
    """Layers of two factors of these shapes, count times over."""
    rng = np.random.default_rng(seed)
    flat = [rng.standard_normal(shape).astype(dtype) for shape in shapes * count]
    return {
        f"layer{i}": {
            name: value for name, value in zip("ab", flat[2 * i : 2 * i + 2], strict=True)
        }
        for i in range(len(flat) // 2)
    }


def values(nested):
    host = on("cpu", nested)
    parts = [np.asarray(v, np.float64).ravel() for p in host.values() for v in p.values()]
    return np.concatenate(parts)


def rows_of(nested):
    """Two rows, mixed."""
    return {
        layer: {n: (len(layer) + i + int(layer[5:])) % 2 for i, n in enumerate(p)}
        for layer, p in nested.items()
    }


def test_a_layout_leaves_no_gap_and_no_overlap():
    like = many(0, np.float32)
    layout = Layout(like, rows_of(like))
    spots = layout.spots
    assert [s.begin for s in spots] == [0, *(s.end for s in spots[:-1])]
    assert spots[-1].end == layout.length == sum(v.size for p in like.values() for v in p.values())
    whole = [s.size % 4 == 0 for s in spots]
    assert whole == sorted(whole, reverse=True)  # so that all of them begin at whole quads
    names = [(layer, name) for layer, p in like.items() for name in p]
    assert {(s.layer, s.name): s.place for s in spots} == {n: i for i, n in enumerate(names)}
    buffer = layout.fill(np.zeros(layout.length), like)
    views = layout.nested(buffer)
    assert [(layer, name) for layer, p in views.items() for name in p] == names
    assert (values(views) == values(like)).all()
    assert all(np.shares_memory(v, buffer) for p in views.values() for v in p.values() if v.size)


def test_blocks_are_neighbours_of_one_row_that_fit_the_cache():
    like = many(1, np.float32, count=3)
    layout = Layout(like, rows_of(like))
    buffer, at = layout.fill(np.zeros(layout.length, np.float32), like), 0
    row_at = {i: s.row for s in layout.spots for i in range(s.begin, s.end)}
    for block in layout.blocks:
        assert block.own.start == at and 0 < block.own.stop - at <= BLOCK
        at = block.own.stop
        assert {row_at[i] for i in range(block.own.start, at)} == {block.row}
        assert (block.gathered(like, np.dtype(np.float32)) == buffer[block.own]).all()
    assert at == layout.length
    assert len(layout.blocks) < layout.length / BLOCK + 2 * 3 + 2  # small factors share one


def test_bits_of_a_block_are_those_of_its_factors():
    like, step = many(0, bf16, count=2), np.array([7], np.uint32)
    layout = Layout(like, rows_of(like))
    for size in (64, BLOCK, 1 << 20):
        found = np.concatenate([block.bits(2**33 + 5, step) for block in layout.cut(size)])
        for spot in layout.spots:
            expected = random_bits(spot.shape, 2**33 + 5, step, spot.place)
            assert (spot.of(found) == expected).all()


def test_nothing_at_all_is_a_step():
    optimizer = AdamW({})
    assert optimizer.step({}) == {} and Layout({}).length == 0


@pytest.mark.parametrize("method", [m for m in METHODS if m != "prodigy"])
def test_all_at_once_is_each_alone(method, device):
    """A factor's values do not depend on what lies beside it (but Prodigy's, whose estimate is one
    for all): bit for bit, on each device.
    """
    kind, options = METHODS[method]
    start, grads = on(device, many(0, np.float32)), on(device, many(1, np.float32))
    together = kind(start, **options)
    for _ in range(2):
        together.step(grads)
    for layer in start:
        alone = kind({layer: start[layer]}, **options)
        for _ in range(2):
            alone.step({layer: grads[layer]})
        one, other = ({layer: o.masters[layer]} for o in (together, alone))
        assert (values(one) == values(other)).all()


@pytest.mark.parametrize("seed", [None, 4])
def test_out_is_set_in_the_same_pass(seed, device):
    """As set_parameters does, bf16 and f32 factors together, and the masters are the same."""
    magnitude = np.random.default_rng(5).standard_normal(11).astype(np.float32)
    start = {**many(0, bf16), "wide": {"magnitude": magnitude}}
    grads = {**many(1, np.float32), "wide": {"magnitude": np.ones(11, np.float32)}}
    out = on(device, {**many(0, bf16), "wide": {"magnitude": magnitude.copy()}})
    optimizers = [AdamW(on(device, start), lr=0.1, clip=1.0, seed=seed) for _ in range(2)]
    for _ in range(3):
        masters = optimizers[0].step(on(device, grads))
        found = optimizers[1].step(on(device, grads), out=out)
        assert (values(masters) == values(found)).all()
        for layer, p in start.items():
            for name, v in p.items():
                given, master = (to_device(x[layer][name], "cpu") for x in (out, masters))
                assert given.dtype == v.dtype and (given == master.astype(v.dtype)).all()
    assert not (values(out) == values(start)).all()


def test_an_engine_is_written_directly(device):
    engine = Engine({"a": Linear(np.ones((8, 8), np.float32))}, device=device)
    engine.add("x", "locon", rank=2)
    factors = engine.parameters("x")
    grads = on(device, {"a": {n: np.ones(v.shape, np.float32) for n, v in factors["a"].items()}})
    optimizer = AdamW(factors, lr=0.1)
    masters = optimizer.step(grads, out=factors)
    for name, v in factors["a"].items():
        expected = to_device(masters["a"][name], "cpu").astype(bf16)
        assert v is engine.parameters("x")["a"][name] and (to_device(v, "cpu") == expected).all()


@EACH
def test_gradients_are_read_only_and_of_any_layout(method, device):
    """Not contiguous, off the boundaries of quads, bf16, f64: as the plain f32 ones."""
    kind, options = METHODS[method]
    plain = many(1, bf16)

    def changed(how):
        return {k: {n: how(v) for n, v in p.items()} for k, p in plain.items()}

    def off(v):
        """At an address that is no whole quad."""
        return to_device(
            np.concatenate([[1], v.astype(np.float32).ravel()]).astype(np.float32), device
        )[1:].reshape(v.shape)

    runs = []
    for grads in (
        on(device, changed(lambda v: v.astype(np.float32))),
        on(device, plain),
        on(device, changed(lambda v: v.astype(np.float64))),
        changed(off),
        changed(lambda v: to_device(v.astype(np.float32).T.copy(), device).T),
    ):
        optimizer = kind(on(device, many(0, np.float32)), clip=1.0, **options)
        before = values(grads)
        for _ in range(2):
            optimizer.step(grads)
        assert (values(grads) == before).all()
        runs.append(values(optimizer.masters))
    assert all((run == runs[0]).all() for run in runs)


def test_what_is_refused():
    p = {"a": {"w": np.zeros((2, 3), bf16)}}
    optimizer, g = AdamW(p), {"a": {"w": np.zeros((2, 3), np.float32)}}
    with pytest.raises(DtypeError, match=r"array to write of a.w is float32 .* expected bfloat16"):
        optimizer.step(g, out=g)
    with pytest.raises(DtypeError, match="C-contiguous, as the parameter was"):
        optimizer.step(g, out={"a": {"w": np.zeros((3, 2), bf16).T}})
    with pytest.raises(MatchError, match="no array to write for factor 'w' of layer 'a'"):
        optimizer.step(g, out={})
    with pytest.raises(DtypeError, match=r"a.w is float32 and b.w is float64: f64 stands alone"):
        AdamW({**g, "b": {"w": np.zeros(1)}})
    with pytest.raises(DtypeError, match="a.w has dtype int64, expected bf16, f32 or f64"):
        Average({"a": {"w": np.zeros(1, np.int64)}})
    assert (optimizer.masters["a"]["w"] == 0).all() and optimizer._counts["steps"] == 0


@pytest.mark.gpu
def test_devices_are_not_mixed():
    p = {"a": {"w": np.zeros(3, np.float32)}}
    with pytest.raises(DeviceError, match="gradient of a.w lies on the CPU, the factor on the GPU"):
        AdamW(on("cuda:0", p)).step(p)
    with pytest.raises(DeviceError, match="a.w and b.w lie on different devices"):
        AdamW({**p, "b": on("cuda:0", p)["a"]})


# -- what kernels are told -------------------------------------------------------------------------


def test_tables_cover_every_element_once():
    like = many(0, np.float32, count=130)  # more arrays than one launch takes
    layout = Layout(like, rows_of(like))
    tensors, chunks, parts = multi._tables(layout)
    assert len(tensors) == len(layout.spots) > 2 * multi.SOURCES
    covered = np.zeros(layout.length, int)
    for (begin, size, row, place), spot in zip(tensors.tolist(), layout.spots, strict=True):
        assert (begin, size, row, place) == (spot.begin, spot.size, spot.row, spot.place)
    for tensor, chunk in chunks.tolist():
        begin, size = tensors[tensor, :2]
        first = begin + chunk * multi.CHUNK
        assert first < begin + size
        covered[first : min(first + multi.CHUNK, begin + size)] += 1
    assert (covered == 1).all()
    seen = 0
    for work, first, last, count in parts:
        assert last - first <= multi.SOURCES and work["first_tensor"] == first
        assert work["first_chunk"] == seen
        own = chunks[seen : seen + count, 0]
        assert first <= own.min() and own.max() < last
        seen += count
    assert seen == len(chunks)


def test_the_host_knows_the_kernels_sizes():
    text = expand(multi.FILE)
    for name in ("THREADS", "CHUNK", "SOURCES", "NUMBERS", "FINISH"):
        found = re.search(rf"\b{name} = (\d+)", text)
        assert found and int(found[1]) == getattr(multi, name)
    # All that a launch may pass is 4096 bytes.
    assert multi._WORK.itemsize + 8 * 26 < 4096 and multi._NUMBERS.itemsize + 64 < 4096


def launches(run):
    """The kernels that a call asks for; they are not launched."""
    with kernels.asking() as asked:
        run()
    return [kernel.op for kernel in asked]


@pytest.mark.gpu
@EACH
def test_a_step_is_a_launch(method):
    """Of 16 factors and of 1000, with clipping, and with factors kept in bf16 alone."""
    kind, options = METHODS[method]
    sums = ["prodigy_sums"] if kind is Prodigy else []
    ends = ["prodigy_estimate"] if kind is Prodigy else []
    op = {"nesterov": "sgd"}.get(method, method)
    few, lots = on("cuda:0", many(0, bf16, count=2)), on("cuda:0", many(0, bf16, [(4, 2)] * 1000))
    for parameters, parts in ((few, 1), (lots, 3)):
        grads = {a: {b: v.astype(np.float32) for b, v in p.items()} for a, p in parameters.items()}
        step = ["tell", *sums * parts, *ends, *[op] * parts]
        optimizer = kind(parameters, **options)
        assert launches(lambda o=optimizer, g=grads: o.step(g)) == step
        assert launches(lambda o=optimizer, g=grads, p=parameters: o.step(g, out=p)) == step
        bits = kind(parameters, seed=1, **options)
        assert launches(lambda o=bits, g=grads: o.step(g)) == step
        optimizer = kind(parameters, clip=1.0, **options)
        step[1:1] = ["squares"] * parts + ["norm_bound"]
        assert launches(lambda o=optimizer, g=grads: o.step(g)) == step
    accumulator, average = Accumulator(few), Average(few)
    assert launches(lambda: accumulator.add(few)) == ["approach"]
    assert launches(lambda: average.update(few)) == ["approach"]


@pytest.mark.gpu
@EACH
def test_nothing_in_a_step_waits(method):
    """A whole step can be captured, what the host tells of it included, and a capture forbids to
    wait. The graph reads the gradients and takes the numbers that it was captured with, whatever
    steps are taken in between.
    """
    import cupy

    kind, options = METHODS[method]
    start, first, second = (on("cuda:0", many(i, np.float32)) for i in range(3))
    out = on("cuda:0", many(0, np.float32))
    optimizer, plain = (kind(start, clip=1.0, **options) for _ in range(2))
    kept = optimizer.snapshot()
    optimizer.step(first, out=out)  # compiles
    optimizer.restore(kept)
    stream, pool = cupy.cuda.Stream(non_blocking=True), cupy.cuda.MemoryPool()
    cupy.cuda.get_current_stream().synchronize()
    with stream, cupy.cuda.using_allocator(pool.malloc):
        stream.begin_capture(cupy.cuda.runtime.streamCaptureModeThreadLocal)
        try:
            optimizer.step(first, out=out)
        finally:
            graph = stream.end_capture()

    def replay():
        cupy.cuda.get_current_stream().synchronize()
        graph.launch(stream)
        stream.synchronize()

    replay()
    counts = dict(plain._counts)
    plain.step(first)
    assert (values(optimizer.masters) == values(plain.masters)).all()
    assert (values(out) == values(plain.masters)).all()
    for o in (optimizer, plain):
        o.step(second)
    replay()
    plain._counts = counts
    plain.step(first)
    assert (values(optimizer.masters) == values(plain.masters)).all()


# -- the GPU against the CPU -----------------------------------------------------------------------


@pytest.mark.gpu
@EACH
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_the_gpu_is_the_cpu(method, dtype):
    """Three steps with two rates, clipped, over more factors than one launch takes."""
    kind, options = METHODS[method]
    shapes = [*SHAPES, *[(3, 2)] * 500]
    start, base = many(0, dtype, shapes), many(1, dtype, shapes)
    rates = {layer: {"a": 0.5} for layer in start}
    host = kind(start, clip=100.0, rates=rates, **options)
    device = kind(on("cuda:0", start), clip=100.0, rates=rates, **options)
    for i in range(3):
        # Of one direction, so that Prodigy's sum does not cancel.
        noise = many(2 + i, dtype, shapes)
        grads = {a: {b: v + noise[a][b] / 8 for b, v in p.items()} for a, p in base.items()}
        host.step(grads)
        device.step(on("cuda:0", grads))
    # No step is longer than 10 lr. A step makes 16 roundings a value at most; the sums of norm and
    # estimate are at most 64 roundings deep, and what they scale errs by as much.
    rate = 0.02 if "lr" in options else 1e-2
    size = np.abs(values(start)).max() + 3 * 10 * rate
    limit = 3 * (16 + 64) * np.finfo(dtype).eps * size
    assert np.abs(values(device.masters) - values(host.masters)).max() <= limit
    assert np.abs(values(host.masters) - values(start)).max() > 50 * limit
    found = float(to_device(device.grad_norm, "cpu")[0])
    assert abs(found - host.grad_norm[0]) <= 64 * np.finfo(dtype).eps * found
    if isinstance(host, Prodigy) and isinstance(device, Prodigy):
        assert host.d > host.d0
        np.testing.assert_allclose(to_device(device.d, "cpu"), host.d, 256 * np.finfo(dtype).eps)


@pytest.mark.gpu
def test_stochastic_rounding_is_the_same_bits():
    """Every kind of f32: normal, subnormal, infinite, NaN."""
    bits = np.random.default_rng(0).integers(0, 2**32, (1023, 7), np.uint32)
    bits[0] = 0, 0x80000000, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0xFFFFFFFF, 0x7F800001
    bits[1] = 1, 0x80000001, 0x007FFFFF, 0x00FFFFFF, 0x3F808000, 0x3F80FFFF, 0x3F810000
    x, clock = bits.view(np.float32), np.array([2**32 - 1], np.uint32)
    for seed, tensor in ((0, 0), (2**64 - 1, 3), (0x0123456789ABCDEF, 2**32 - 1)):
        expected = round_stochastically(x, seed, clock, tensor)
        found = round_stochastically(
            to_device(x, "cuda:0"), seed, to_device(clock, "cuda:0"), tensor
        )
        assert (to_device(found, "cpu").view(np.uint16) == expected.view(np.uint16)).all()


@pytest.mark.gpu
def test_steps_in_bf16_alone_are_the_same_bits():
    """Products with powers of two are exact, so that both devices round the same f32 values."""
    shapes = [*SHAPES, *[(3, 2)] * 500]
    start = many(0, bf16, shapes)
    host = SGD(start, lr=2**-9, momentum=0, seed=2**40 + 7)
    device = SGD(on("cuda:0", start), lr=2**-9, momentum=0, seed=2**40 + 7)
    for i in range(3):
        drawn = many(1 + i, np.float32, shapes)
        grads = {a: {b: np.exp2(np.round(v)) for b, v in p.items()} for a, p in drawn.items()}
        host.step(grads)
        device.step(on("cuda:0", grads))
        assert (values(device.masters) == values(host.masters)).all()
    assert (values(host.masters) != values(start)).any()
