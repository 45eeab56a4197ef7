"""Attention beyond its rows: any shape, bounds of bf16 gradients, memory, repeatability, errors."""

import importlib
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lycoris_cupy import DtypeError, LycorisError, ShapeError, Tape, bf16, ops, to_device
from lycoris_cupy.tape import value_of
from tests.arrays import drawn, host
from tests.bounds import ROUNDING, assert_within
from tests.rows_network import attend

module = importlib.import_module("lycoris_cupy.ops.attention")  # ops.attention is its function


def exact(*shape, seed=0):
    return drawn(np.random.default_rng([seed, *shape]), *shape)


def run(arrays, g, device, dtype, **options):
    """(out, dq, dk, dv) on a device."""
    tape = Tape()
    watched = [tape.watch(to_device(a.astype(dtype), device)) for a in arrays]
    options = {k: to_device(v, device) if k == "mask" else v for k, v in options.items()}
    out = ops.attention(*watched, **options)
    return [value_of(out), *tape.gradients(out, to_device(g.astype(dtype), device), watched)]


def by_definition(q, k, v, g, mask=None, causal=False, scale=None):
    """(out, dq, dk, dv) and the same sums over absolute values, with whole arrays of scores."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * np.einsum("nhld,nhsd->nhls", q, k)
    queries, keys = scores.shape[2:]
    if causal:
        scores = np.where(np.arange(keys) > np.arange(queries)[:, None], -np.inf, scores)
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
    top = scores.max(axis=-1, keepdims=True)
    p = np.exp(scores - np.where(np.isinf(top), 0, top))
    p = p / np.maximum(p.sum(axis=-1, keepdims=True), 1e-300)

    def results(v, g, q, k, sign):
        dp = np.einsum("nhle,nhse->nhls", g, v)
        h = p * (dp + sign * (p * dp).sum(axis=-1, keepdims=True))
        return [
            np.einsum("nhls,nhse->nhle", p, v),
            scale * np.einsum("nhls,nhsd->nhld", h, k),
            scale * np.einsum("nhls,nhld->nhsd", h, q),
            np.einsum("nhls,nhle->nhse", p, g),
        ]

    return results(v, g, q, k, -1), results(*map(np.abs, (v, g, q, k)), 1)


SHAPES = {
    "one tile": ((2, 3, 64, 32), 64, {}),
    "odd": ((1, 2, 77, 40), 131, {}),
    "causal": ((2, 1, 130, 64), 130, {"causal": True}),
    "wide, causal": ((1, 1, 70, 128), 150, {"causal": True}),
    "masked": ((2, 2, 65, 80), 33, {"mask": np.random.default_rng(0).random((65, 33)) < 0.5}),
    "added": ((2, 2, 9, 16), 70, {"mask": np.random.default_rng(1).standard_normal((2, 1, 1, 70))}),
    "by products": ((1, 2, 33, 12), 70, {"causal": True}),
}


@pytest.mark.parametrize("name", SHAPES)
def test_bf16_within_its_roundings(name, device):
    """Probabilities, h and results are each rounded to bf16 once: bounds element by element."""
    shape, keys, options = SHAPES[name]
    q, k = exact(*shape), exact(*shape[:2], keys, shape[3], seed=1)
    v, g = exact(*k.shape, seed=2), exact(*shape, seed=3)
    expected, sizes = by_definition(q, k, v, g, **options)
    for found, value, size in zip(
        run((q, k, v), g, device, bf16, **options), expected, sizes, strict=True
    ):
        # out enters the gradients rounded; f32 sums and exponentials are a hundredth of a rounding.
        limit = ROUNDING["bf16"] * (np.abs(value) + 1.05 * size) * 1.02
        assert_within(host(found), value, limit + 1e-30, name)


@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(0, 9), st.integers(0, 9), st.integers(1, 9),
    st.integers(0, 5), st.sampled_from(["none", "causal", "allowed", "added"]), st.integers(1, 40),
)  # fmt: skip
def test_any_shape_in_blocks_of_any_size(n, heads, queries, keys, width, values, kind, budget):
    """NumPy's blocks against the definition, forward and back, in f64."""
    q, k = exact(n, heads, queries, width), exact(n, heads, keys, width, seed=1)
    v, g = exact(n, heads, keys, values, seed=2), exact(n, heads, queries, values, seed=3)
    options = {"causal": kind == "causal"}
    if kind == "allowed":
        options["mask"] = np.random.default_rng(budget).random((1, queries, keys)) < 0.5
    if kind == "added":
        options["mask"] = exact(n, 1, 1, keys, seed=4)
    before, module._SCORES = module._SCORES, budget
    try:
        found = run((q, k, v), g, "cpu", np.float64, **options)
    finally:
        module._SCORES = before
    if keys:
        for value, expected in zip(found, by_definition(q, k, v, g, **options)[0], strict=True):
            np.testing.assert_allclose(value, expected, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(found[0], attend(q, k, v, **options), rtol=1e-10, atol=1e-12)
    else:
        assert not found[0].any() and not found[1].any()


def test_no_array_of_scores_on_the_cpu():
    """2 heads of 3000 x 3000 scores are 72 MB in f32; forward and back stay below 30 MB."""
    q, k, v, g = (exact(1, 2, 3000, 8, seed=s) for s in range(4))
    tracemalloc.start()
    run((q, k, v), g, "cpu", np.float32)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6, peak


@pytest.mark.gpu
def test_no_array_of_scores_on_the_gpu():
    """One head of 16384 x 16384 scores is 512 MiB in bf16; forward and back fit into 64 MiB."""
    import cupy

    arrays = [exact(1, 1, 16384, 64, seed=s) for s in range(4)]
    pool = cupy.cuda.MemoryPool()
    pool.set_limit(size=64 << 20)
    with cupy.cuda.using_allocator(pool.malloc):
        found = run(arrays[:3], arrays[3], "cuda:0", bf16, causal=True)
        assert all(np.isfinite(host(x)).all() for x in found)


@pytest.mark.gpu
def test_gradients_are_the_same_every_time():
    q, k, v, g = (exact(2, 4, 300, 64, seed=s) for s in range(4))
    first, second = (run((q, k, v), g, "cuda:0", bf16, causal=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert (host(a) == host(b)).all()


def test_large_scores_do_not_overflow(device):
    q = to_device(np.full((1, 1, 2, 32), 300, bf16), device)
    v = to_device(exact(1, 1, 2, 32).astype(bf16), device)
    out = host(ops.attention(q, q, v))
    np.testing.assert_allclose(
        out, np.broadcast_to(host(v).mean(axis=2, keepdims=True), out.shape), atol=0.02
    )


def test_a_query_that_sees_nothing_is_zero_and_gives_no_gradient(device):
    q, k, v, g = (exact(1, 1, 3, 32, seed=s) for s in range(4))
    for mask in (
        np.array([[True] * 3, [False] * 3, [True] * 3]),
        np.array([[0.0] * 3, [-np.inf] * 3, [0.0] * 3]),
    ):
        for dtype in (bf16, np.float32):
            out, dq, dk, dv = (host(x) for x in run((q, k, v), g, device, dtype, mask=mask))
            assert not out[0, 0, 1].any() and not dq[0, 0, 1].any()
            assert np.isfinite([dq, dk, dv]).all() and dk.any()


def f(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


@pytest.mark.parametrize(
    "act, error, message",
    [
        (lambda: ops.attention(f(2, 3, 4), f(2, 3, 4), f(2, 3, 4)), ShapeError, "q has shape"),
        (
            lambda: ops.attention(f(1, 2, 3, 4), f(1, 2, 5, 6), f(1, 2, 5, 4)),
            ShapeError,
            r"k has shape \(1, 2, 5, 6\), expected \(1, 2, 5, 4\)",
        ),
        (
            lambda: ops.attention(f(1, 2, 3, 4), f(1, 2, 5, 4), f(1, 2, 6, 4)),
            ShapeError,
            r"v has shape \(1, 2, 6, 4\), expected \(1, 2, 5, 4\)",
        ),
        (
            lambda: ops.attention(f(1, 2, 3, 4), f(1, 2, 5, 4, dtype=bf16), f(1, 2, 5, 4)),
            DtypeError,
            "q is float32 but k is bfloat16",
        ),
        (
            lambda: ops.attention(*[f(1, 2, 3, 4)] * 3, mask=f(3, 1, 3)),
            ShapeError,
            r"mask has shape \(3, 1, 3\), expected \(1, 2, 3, 3\) or 1 in place of any but",
        ),
        (
            lambda: ops.attention(*[f(1, 2, 3, 4)] * 3, mask=f(4, 3)),
            ShapeError,
            r"mask has shape \(4, 3\)",
        ),
        (
            lambda: ops.attention(*[f(1, 2, 3, 4)] * 3, mask=f(3, 3, dtype=np.int64)),
            DtypeError,
            "mask is int64, expected booleans",
        ),
        (
            lambda: ops.attention(*[f(1, 2, 3, 4)] * 3, mask=Tape().watch(f(3, 3))),
            LycorisError,
            "constant of the tape",
        ),
    ],
)
def test_errors(act, error, message):
    with pytest.raises(error, match=message):
        act()
