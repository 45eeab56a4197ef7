"""What rows cannot say: the Tucker-2 decomposition, casts, and the errors of the public operations."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lycoris_cupy import (
    DtypeError,
    LycorisError,
    ShapeError,
    Tape,
    bf16,
    like,
    ops,
    to_device,
    wide,
)
from lycoris_cupy.ops import Window
from tests import naive
from tests.arrays import drawn, host
from tests.bounds import assert_within, bound

RNG = np.random.default_rng(0)


def test_tucker_decomposition_is_exact_at_full_rank(device):
    w = RNG.standard_normal((9, 7, 11))
    down, mid, up = ops.tucker_decompose(to_device(w, device), 7, 11)
    back = to_device(ops.tucker_weight(down, mid, up), "cpu")
    assert np.abs(back - w).max() < 1e-12
    assert np.abs(to_device(down, "cpu").T @ to_device(down, "cpu") - np.eye(7)).max() < 1e-12


def test_tucker_decomposition_of_a_low_rank_weight_is_exact():
    d, m, u = (
        RNG.standard_normal((13, 3)),
        RNG.standard_normal((9, 3, 2)),
        RNG.standard_normal((2, 17)),
    )
    w = ops.tucker_weight(d, m, u)
    assert (
        np.abs(ops.tucker_weight(*ops.tucker_decompose(w, 3, 2)) - w).max()
        < 1e-11 * np.abs(w).max()
    )


def test_tucker_decomposition_meets_its_error_bound():
    w = RNG.standard_normal((4, 10, 12))
    down, mid, up = ops.tucker_decompose(w, 6, 5)
    assert down.shape == (10, 6) and mid.shape == (4, 6, 5) and up.shape == (5, 12)
    left_out = 0.0
    for unfolded, rank in (
        (w.transpose(1, 0, 2).reshape(10, -1), 6),
        (w.transpose(2, 0, 1).reshape(12, -1), 5),
    ):
        left_out += (np.linalg.svd(unfolded, compute_uv=False)[rank:] ** 2).sum()
    error = ((ops.tucker_weight(down, mid, up) - w) ** 2).sum()
    assert error <= left_out * (1 + 1e-12)
    with pytest.raises(ShapeError, match=r"ranks \(11, 5\) must lie in 1 to \(10, 12\)"):
        ops.tucker_decompose(w, 11, 5)


@given(st.integers(0, 2**32 - 1))
def test_bf16_rounds_to_nearest_even(bits):
    x = np.array([bits], np.uint32).view(np.float32)
    if not np.isfinite(x[0]):
        return
    low = (bits & 0xFFFF0000, (bits & 0xFFFF0000) + 0x10000)
    rest = bits & 0xFFFF
    up = rest > 0x8000 or (rest == 0x8000 and (bits >> 16) & 1)
    expected = np.array([low[1] if up else low[0]], np.uint64).astype(np.uint32)
    found = like(x, np.zeros(1, bf16))
    assert (wide(found).view(np.uint32) == expected).all()


@pytest.mark.gpu
def test_casts_on_the_gpu_are_those_of_the_cpu():
    special = np.array([0.0, -0.0, np.inf, -np.inf, 3.4e38, -3.4e38, 1e-40, 65504.0], np.float32)
    x = np.concatenate(
        [special, RNG.standard_normal(100_000).astype(np.float32), np.full(3, np.nan, np.float32)]
    )
    found = to_device(ops.cast(to_device(x, "cuda:0"), "bf16"), "cpu")
    expected = x.astype(bf16)
    same = (found.view(np.uint16) == expected.view(np.uint16)) | (
        np.isnan(wide(found)) & np.isnan(x)
    )
    assert same[np.abs(x) != np.float32(1e-40)].all()


@st.composite
def geometries(draw):
    axes = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(axes))
    stride, padding, dilation = (
        tuple(draw(st.integers(low, 3)) for _ in range(axes)) for low in (1, 0, 1)
    )
    space = tuple(
        draw(st.integers(max(d * (k - 1) + 1 - 2 * p, 1), 8))
        for k, p, d in zip(kernel, padding, dilation, strict=True)
    )
    window = Window.of(kernel, stride, padding, dilation, groups).grouped(
        groups, draw(st.booleans())
    )
    return (
        window,
        space,
        draw(st.integers(0, 2)),
        draw(st.sampled_from([1, 2, 8, 9])),
        draw(st.sampled_from([1, 3, 8])),
    )


@given(geometries())
def test_product_of_any_geometry(geometry):
    check_geometry(geometry, "cpu", np.float64)


@pytest.mark.gpu
@given(geometries())
def test_product_of_any_geometry_on_the_gpu(geometry):
    check_geometry(geometry, "cuda:0", bf16)


def check_geometry(geometry, device, dtype):
    """Value, gradient of the input and gradient of the weight against the definition."""
    window, space, batch, inputs, outputs = geometry
    exact = partial(drawn, np.random.default_rng(0))
    x = exact(batch, *space, inputs * window.groups)
    w = exact(window.taps, inputs, outputs * (1 if window.shared else window.groups))
    y = naive.product(x, w, window)
    g = exact(*y.shape)
    tape = Tape()
    vx, vw = (tape.watch(to_device(a.astype(dtype), device)) for a in (x, w))
    out = ops.product(vx, vw, window)
    dx, dw = tape.gradients(out, to_device(g.astype(dtype), device), [vx, vw])
    found = [host(a) for a in (out.value, dx, dw)]
    expected = [y, naive.product_dx(g, w, window, space), naive.product_dw(x, g, window)]
    ax, aw, ag = map(np.abs, (x, w, g))
    sizes = [
        naive.product(ax, aw, window),
        naive.product_dx(ag, aw, window, space),
        naive.product_dw(ax, ag, window),
    ]
    depth = 32 + window.taps * max(inputs, outputs) + int(np.prod(y.shape))
    for value, ref, size, name in zip(found, expected, sizes, ("y", "dx", "dw"), strict=True):
        assert_within(value, ref, bound(ref, size, depth, dtype), name)


def test_convolution_takes_flame_weights(device):
    x, w, b = (RNG.standard_normal(s) for s in ((2, 7, 5, 6), (3, 2, 3, 8), (8,)))
    options = {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "groups": 2}
    tape = Tape()
    vw = tape.watch(to_device(w, device))
    y = ops.convolution(to_device(x, device), vw, to_device(b, device), **options)
    window = Window.of((3, 2), **options)
    expected = naive.product(x, w.reshape(6, 3, 8), window) + b
    assert np.abs(to_device(y.value, "cpu") - expected).max() < 1e-12
    g = np.ones(y.shape)
    (dw,) = tape.gradients(y, to_device(g, device), [vw])
    assert (
        np.abs(to_device(dw, "cpu") - naive.product_dw(x, g, window).reshape(w.shape)).max() < 1e-12
    )


def f(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda: ops.product(f(2, 3), f(1, 4, 5)), ShapeError, "expected 4 channels"),
        (lambda: ops.product(f(2, 3), f(3, 5)), ShapeError, "expected \\(taps, in, out\\)"),
        (
            lambda: ops.product(f(2, 3), f(1, 3, 5, dtype=bf16)),
            DtypeError,
            "x is float32 but w is bfloat16",
        ),
        (
            lambda: ops.product(f(2, 3), f(1, 3, 5), bias=f(4)),
            ShapeError,
            "bias has shape \\(4,\\)",
        ),
        (lambda: ops.product(f(2, 3), f(1, 3, 5), add=f(2, 4)), ShapeError, "add has shape"),
        (
            lambda: ops.product(f(2, 3), f(1, 3, 5), add=f(2, 5, dtype=np.float64)),
            DtypeError,
            "x is float32 but add is float64",
        ),
        (lambda: ops.product(f(2, 3), f(1, 3, 5), scale=f(2)), ShapeError, "expected \\(1,\\)"),
        (
            lambda: ops.product(f(2, 3), f(1, 3, 5), scale=Tape().watch(f(1))),
            LycorisError,
            "constant of the tape",
        ),
        (
            lambda: ops.product(f(2, 3, dtype=np.int32), f(1, 3, 5)),
            DtypeError,
            "expected bf16, f32 or f64",
        ),
        (
            lambda: ops.product(f(1, 2, 2, 3), f(9, 3, 5), Window.of((3, 3))),
            ShapeError,
            "smaller than the window",
        ),
        (
            lambda: ops.product(f(2, 4), f(1, 2, 3), Window(groups=2)),
            ShapeError,
            "multiple of the 2 groups",
        ),
        (
            lambda: ops.convolution(f(2, 5, 3), f(3, 4)),
            ShapeError,
            "expected \\(\\*kernel, IN, OUT\\)",
        ),
        (lambda: ops.kron_weight(f(2, 3, 1), f(1, 2, 2)), ShapeError, "w1 has shape.*\\(L, M\\)"),
        (lambda: ops.mix_blocks(f(2, 5), f(3, 2)), ShapeError, "multiple of the 2 columns"),
        (
            lambda: ops.mixed_product(f(2, 6), f(1, 3, 2), f(3, 4), Window(groups=2, shared=True)),
            ShapeError,
            "a column for each of 2 groups",
        ),
        (
            lambda: ops.low_rank_weight(f(2, 3, 4), f(1, 5, 6)),
            ShapeError,
            "expected \\(2 or 1, 4, OUT\\)",
        ),
        (lambda: ops.tucker_weight(f(3, 4), f(2, 5, 6), f(6, 7)), ShapeError, "mid has shape"),
        (lambda: ops.fold_core(f(3, 4), f(2, 5, 6)), ShapeError, "mid has shape"),
        (
            lambda: ops.hadamard_weight(f(1, 3, 2), f(1, 2, 5), f(1, 4, 2), f(1, 2, 5)),
            ShapeError,
            "down2 has shape",
        ),
        (lambda: ops.face_split(f(2, 3, 4), f(2, 5, 4), -1), ShapeError, "but for axis -1"),
        (lambda: ops.face_split(f(2, 3), f(2, 3), 0), ShapeError, "must be -1 or -2"),
        (lambda: ops.add(f(2), f(3)), ShapeError, "expected that of a"),
        (lambda: ops.cast(f(2), "f16"), DtypeError, "f16"),
        (lambda: ops.prelu(f(2, 3), f(2)), ShapeError, "slope has shape"),
        (lambda: ops.transpose(f(2, 3), (0, 0)), ShapeError, "not an order"),
        (lambda: ops.pixel_shuffle(f(1, 2, 2, 6), 2), ShapeError, "multiple of 2\\^2"),
        (lambda: ops.resize_nearest(f(2, 2), 2), ShapeError, "expected \\(N, H, W, C\\)"),
        (lambda: ops.tap_diagonal(f(2, 2)), ShapeError, "expected \\(taps, IN, R\\)"),
        (lambda: ops.expand_rows(f(3), (2, 4)), ShapeError, "expected \\(4,\\)"),
    ],
)
def test_errors(act, error, message):
    with pytest.raises(error, match=message):
        act()


def test_two_tapes_do_not_mix():
    with pytest.raises(LycorisError, match="two tapes"):
        ops.add(Tape().watch(f(2)), Tape().watch(f(2)))
