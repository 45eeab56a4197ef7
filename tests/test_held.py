"""What a training step holds: which arrays live between its passes, and the most that it takes at
once, on a GPU that only counts, on a real one, and on the CPU.
"""

import weakref

import numpy as np
import pytest

from benchmarks import timing
from benchmarks.adapters import adapters
from benchmarks.floors import step_memory
from benchmarks.shapes import SHAPES, Shape
from lycoris_cupy import Engine, Linear, bf16, plan, to_device
from lycoris_cupy.attachment import Attachment
from lycoris_cupy.ops import product_gpu
from lycoris_cupy.ops.extended_gpu import Extra
from lycoris_cupy.ops.window import Window
from tests.dry_gpu import Memory, dry_gpu

# Their factors are too large for what is counted by the positions: of LoHa the two of rank 256, of
# an up for each tap the down with its zeros.
LARGE = {
    ("conv 4x32x32 1280 k3", "LoHa r16"),
    ("conv 4x32x32 1280 k3", "LoHa Tucker r16"),
    ("conv 4x32x32 1280 k3", "LoCon r16, an up a tap"),
}


def step(engine, x, dy):
    def run():
        y, pullback = engine.vjp(x)
        return y, pullback(dy)

    return run


def dry_peak(run) -> int:
    run()
    before = Memory.begin()
    kept = run()
    most = Memory.most - before
    del kept
    assert Memory.used == before
    return most


def on_device(shape: Shape, device: str):
    """The layer, x and dy. Zeros: nothing depends on values here."""

    def zeros(size):
        return to_device(np.zeros(size, bf16), device)

    layer = shape.build(zeros(shape.weight), zeros(shape.weight[-1:]))
    return layer, zeros(shape.x), zeros((*shape.x[:-1], shape.weight[-1]))


def adapted(layer, group, device: str) -> Engine:
    engine, rng = Engine({"layer": layer}, device=device), np.random.default_rng(0)
    for i, adapter in enumerate(group):
        found = {"layer": (adapter, adapter.init(rng))}
        engine.attachments[f"a{i}"] = Attachment(found, device, bf16, 1.0)
    return engine


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def test_a_step_holds_what_is_allowed(shape):
    """The bare layer's, the gradients of the factors in f32, and twice what an adapter makes of x:
    on an H100, at the shapes that are measured."""
    with dry_gpu(90) as device:
        layer, x, dy = on_device(shape, device)
        bare = dry_peak(step(Engine({"layer": layer}, device=device), x, dy))
        assert bare == dy.nbytes + x.nbytes  # y and dx
        found = {}
        for name, group in adapters(shape.layer).items():
            most = dry_peak(step(adapted(layer, group, device), x, dy))
            found[name] = most / step_memory(shape, group, bare)
    over = {name for name, share in found.items() if share > 1}
    assert over == {name for where, name in LARGE if where == shape.name}, found


SMALL = [
    Shape("linear", (512, 768), (1024, 512)),
    Shape("conv", (3, 3, 64, 64), (2, 40, 40, 64), {"padding": 1}),
    Shape("wide conv", (3, 3, 320, 320), (1, 24, 24, 320), {"padding": 1}),
]
NAMES = ("LoRA r16", "LoKr factor 8", "LoKr factor 8 r16", "LoRA r16 + LoKr factor 8")


PAIRS = [(shape, name) for shape in SMALL for name in NAMES if name in adapters(shape.layer)]


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "name"), PAIRS, ids=[f"{s.name}-{n}" for s, n in PAIRS])
def test_the_pool_holds_what_the_dry_run_counts(shape, name):
    import cupy

    capability = int(cupy.cuda.Device().compute_capability)
    count = cupy.cuda.runtime.deviceGetAttribute(16, cupy.cuda.Device().id)
    shared = cupy.cuda.runtime.deviceGetAttribute(97, cupy.cuda.Device().id)
    group = adapters(shape.layer)[name]
    layer, x, dy = on_device(shape, "cuda:0")
    found = timing.peak_bytes(step(adapted(layer, group, "cuda:0"), x, dy), True)
    with dry_gpu(capability, processors=count, shared=shared) as device:
        layer, x, dy = on_device(shape, device)
        assert found == dry_peak(step(adapted(layer, group, device), x, dy))


FLAT, SAME, ONE = Window(), Window.of((3, 3), padding=1), Window.of((1, 1))
FOUR = SAME.grouped(4, shared=True)

# The way on an H100; x, w and the window of a product; x2, w2 and the window of a second sum.
FORWARD = {
    "library": ("library", (140, 64), (1, 64, 96), FLAT, None),
    "skinny": ("skinny", (40, 64), (1, 64, 96), FLAT, None),
    "skinny, two": ("skinny", (40, 64), (1, 64, 96), FLAT, ((40, 16), (1, 16, 96), FLAT)),
    "groups": ("library", (40, 64), (1, 16, 96), FLAT.grouped(4), None),
    "portable": ("portable", (2, 9, 11, 5), (9, 5, 7), SAME, None),
    "depthwise": ("portable", (2, 9, 11, 32), (9, 1, 32), SAME.grouped(32), None),
    "narrow": ("narrow", (1, 64, 64, 640), (9, 640, 16), SAME, None),
    "halo": ("narrow", (1, 256, 144, 320), (9, 320, 8), SAME, None),
    "extended": ("extended", (2, 40, 41, 64), (9, 64, 96), SAME, ((2, 40, 41, 16), (1, 16, 96), ONE)),
    "joined": ("portable", (2, 9, 11, 5), (9, 5, 7), SAME, ((2, 9, 11, 3), (1, 3, 7), ONE)),
    "aside": ("library", (140, 64), (1, 64, 96), FLAT, ((140, 12), (1, 12, 96), FLAT)),
    "apart": (
        "apart", (2, 9, 11, 8), (9, 8, 28), SAME, ((2, 9, 11, 12), (1, 3, 28), ONE.grouped(4)),
    ),
}  # fmt: skip
# The same of an input gradient, with g for x.
BACK = {
    "library": ("library", (140, 96), (1, 64, 96), FLAT, None),
    "skinny": ("skinny", (8, 1024), (1, 1024, 1024), FLAT, None),
    "groups": ("library", (40, 96), (1, 16, 96), FLAT.grouped(4), None),
    "portable": ("portable", (2, 9, 11, 7), (9, 5, 7), SAME, None),
    "depthwise": ("portable", (2, 9, 11, 32), (9, 1, 32), SAME.grouped(32), None),
    "narrow": ("narrow", (1, 64, 64, 16), (9, 1280, 16), SAME, None),
    "blocks": ("blocks", (2, 40, 41, 256), (9, 64, 64), FOUR, None),
    "extended": (
        "extended", (4, 64, 64, 64), (9, 64, 64), SAME, ((4, 64, 64, 16), (9, 64, 16), SAME),
    ),
    "joined": ("portable", (2, 9, 11, 7), (9, 5, 7), SAME, ((2, 9, 11, 3), (9, 5, 3), SAME)),
    "rows": ("library", (40, 96), (1, 64, 96), FLAT, ((40, 12), (1, 64, 12), FLAT)),
    "joined rows": (
        "portable", (40, 96), (1, 64, 96), FLAT, ((40, 96), (1, 16, 96), FLAT.grouped(4)),
    ),
    "apart": ("apart", (2, 9, 11, 8), (9, 16, 8), SAME, ((2, 9, 11, 28), (1, 4, 28), ONE.grouped(4))),
}  # fmt: skip
CASES = [(False, name) for name in FORWARD] + [(True, name) for name in BACK]


def product(back: bool, name: str, dtype, device: str):
    """(run(spend) -> (the result, the array that it is added to), the way that is expected)."""
    way, first, w, window, second = (BACK if back else FORWARD)[name]
    rng = np.random.default_rng(5)

    def draw(size):
        return to_device(rng.standard_normal(size, np.float32).astype(dtype), device)

    columns = w[1] * window.groups if back else w[2] * (window.groups if window.shared else 1)
    x, weight, added = draw(first), draw(w), draw((*first[:-1], columns))
    extra = None if second is None else Extra(draw(second[0]), draw(second[1]), second[2], None)

    def run(spend):
        add, options = added.astype(dtype), {"scale": None, "extra": extra, "spend": spend}
        if back:
            return product_gpu.dx(x, weight, window, first[1:-1], add=add, **options), add
        return product_gpu.forward(x, weight, window, add=add, bias=None, **options), add

    return run, way


@pytest.mark.parametrize("dtype", [bf16, np.dtype(np.float32)], ids=["bf16", "f32"])
@pytest.mark.parametrize(("back", "name"), CASES)
def test_every_way_writes_over_what_is_spent(back, name, dtype):
    with dry_gpu() as device:
        run, expected = product(back, name, dtype, device)
        with plan.recording() as choices:
            before = Memory.begin()
            out, added = run(True)
            taken = Memory.used - before
        assert out.data.ptr == added.data.ptr and out.shape == added.shape
        assert taken == added.buffer.size
        kept, added = run(False)
        assert kept.data.ptr != added.data.ptr and kept.shape == added.shape
    assert dtype != bf16 or choices[0].way == expected, choices


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [bf16, np.dtype(np.float32)], ids=["bf16", "f32"])
@pytest.mark.parametrize(("back", "name"), CASES)
def test_a_sum_in_place_is_the_sum(back, name, dtype):
    run, _ = product(back, name, dtype, "cuda:0")
    (in_place, _), (apart, added) = run(True), run(False)
    assert in_place.shape == apart.shape
    assert (to_device(in_place, "cpu") == to_device(apart, "cpu")).all()
    assert (to_device(added, "cpu") != to_device(apart, "cpu")).any()  # it was not written over


def test_a_pullback_holds_no_output_and_no_input():
    engine = Engine({"layer": layer_of(4, 3)}, device="cpu", dtype="f64")
    x = np.ones((5, 4))
    y, pullback = engine.vjp(x)
    refs = [weakref.ref(x), weakref.ref(y)]
    del x, y
    assert all(ref() is None for ref in refs)
    dx, _ = pullback(np.ones((5, 3)))
    assert dx.shape == (5, 4)


def layer_of(inputs: int, outputs: int) -> Linear:
    return Linear(np.random.default_rng(1).standard_normal((inputs, outputs)))


def test_a_step_on_the_cpu_holds_the_mixed_input_only_until_it_is_used():
    """LoKr on a linear layer: y and two arrays like x, which are the gradient of x mixed and that
    of x, and then that of x by the adapter and with the layer. In f64, in which sums are no arrays
    of their own."""
    engine = Engine({"layer": layer_of(256, 256)}, device="cpu", dtype="f64")
    engine.add("s", "lokr", rank=10**6, factor=4)  # w1 (4, 4), w2 (64, 64)
    x = np.random.default_rng(2).standard_normal((2048, 256))
    most = timing.peak_bytes(step(engine, x, x), False)
    terms, factors = 2048 * 4 * 4 * 8, (4 * 4 + 64 * 64) * 8  # of w1 by positions; gradients
    assert most <= 3 * x.nbytes + terms + factors + 2**15  # Python's own objects


@pytest.mark.parametrize("names", [["lokr"], ["locon"], ["locon", "lokr"], ["lokr", "locon"]])
def test_arrays_of_the_caller_stay_as_they_are(names, device):
    """x, dy and y, whatever is written over on the way; a second pass gives the same bits."""
    rng = np.random.default_rng(3)

    def draw(*size):
        return rng.standard_normal(size, np.float32).astype(bf16)

    for shape in SMALL[:2]:
        layer = shape.build(draw(*shape.weight), draw(shape.weight[-1]))
        engine = Engine({"layer": layer}, device=device)
        for name in names:
            engine.add(name, name, rank=8, factor=8) if name == "lokr" else engine.add(name, name)
            p = engine.parameters(name)["layer"]
            engine.set_parameters(name, {"layer": {n: draw(*v.shape) for n, v in p.items()}})
        x, dy = draw(*shape.x), draw(*shape.x[:-1], shape.weight[-1])
        held = [to_device(a.copy(), device) for a in (x, dy)]
        results = []
        for _ in range(2):
            y, pullback = engine.vjp(held[0])
            before = to_device(y, "cpu").copy()
            dx, grads = pullback(held[1])
            assert (to_device(y, "cpu") == before).all()
            results.append((y, dx, *(g for of in grads.values() for g in of["layer"].values())))
        for array, given in zip(held, (x, dy), strict=True):
            assert (to_device(array, "cpu") == given).all()
        for one, two in zip(*results, strict=True):
            assert (to_device(one, "cpu") == to_device(two, "cpu")).all()
