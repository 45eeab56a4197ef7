"""Operations around the layers, beyond their rows: laws over any shape, and the errors."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lycoris_cupy import DtypeError, LycorisError, ShapeError, Tape, bf16, ops, to_device
from lycoris_cupy.ops.normal import normal_below
from lycoris_cupy.tape import value_of
from tests.arrays import host
from tests.rows_network import between

SIZES = st.integers(1, 13)


def gradient(run, x, g):
    tape = Tape()
    watched = tape.watch(x)
    y = run(watched)
    return value_of(y), tape.gradients(y, g, [watched])[0]


@given(SIZES, SIZES, SIZES, SIZES, st.booleans(), st.integers(0, 99))
def test_bilinear_is_its_matrices(height, width, rows, columns, corners, seed):
    """Any size up and down: the two matrices written an output at a time, and the exact adjoint."""
    rng = np.random.default_rng(seed)
    x, g = rng.standard_normal((2, height, width, 3)), rng.standard_normal((2, rows, columns, 3))
    y, dx = gradient(lambda v: ops.resize_bilinear(v, (rows, columns), align_corners=corners), x, g)
    v, h = between(height, rows, corners), between(width, columns, corners)
    np.testing.assert_allclose(y, np.einsum("pi,qj,nijc->npqc", v, h, x), atol=1e-12)
    np.testing.assert_allclose((y * g).sum(), (x * dx).sum(), atol=1e-11)
    np.testing.assert_allclose(dx, np.einsum("pi,qj,npqc->nijc", v, h, g), atol=1e-12)


@pytest.mark.parametrize("corners", [False, True])
def test_bilinear_keeps_what_is_constant_and_what_has_its_size(corners, device):
    x = to_device(np.full((1, 5, 3, 2), 0.7109375, bf16), device)
    y = ops.resize_bilinear(x, (64, 2), align_corners=corners)
    assert (host(y) == 0.7109375).all()
    assert ops.resize_bilinear(x, (5, 3), align_corners=corners) is x


def test_bilinear_by_hand(device):
    """[0, 8] to four: half-pixel centres -1/4, 1/4, 3/4, 5/4 (the ends held), or thirds."""
    x = to_device(np.array([0.0, 8.0]).reshape(1, 1, 2, 1), device)
    assert host(ops.resize_bilinear(x, (1, 4))).ravel().tolist() == [0, 2, 6, 8]
    found = host(ops.resize_bilinear(x, (1, 4), align_corners=True)).ravel()
    np.testing.assert_allclose(found, [0, 8 / 3, 16 / 3, 8], rtol=1e-15)


@given(
    st.integers(1, 9), st.lists(st.integers(0, 200), max_size=60), st.integers(0, 5), st.integers(0, 9)
)  # fmt: skip
def test_embedding_adds_what_rows_are_used_for(rows, numbers, columns, seed):
    rng = np.random.default_rng(seed)
    indices = np.array(numbers, np.int64) % rows
    table = rng.standard_normal((rows, columns))
    g = rng.standard_normal((len(indices), columns))
    y, dtable = gradient(lambda t: ops.embedding(t, indices), table, g)
    expected = np.zeros_like(table)
    np.add.at(expected, indices, g)
    assert (y == table[indices]).all()
    np.testing.assert_allclose(dtable, expected, atol=1e-12)


@pytest.mark.parametrize("positions", [1, 31, 32, 33, 1024, 1025, 5000])
@pytest.mark.parametrize("rows", [1, 3, 2000])
def test_embedding_sums_runs_of_any_length(rows, positions, device):
    """Whole numbers, so that every order of a sum gives the same: the runs are complete."""
    rng = np.random.default_rng([rows, positions])
    indices = rng.integers(0, rows, positions)
    g = rng.integers(-3, 4, (positions, 3)).astype(np.float32)
    expected = np.zeros((rows, 3), np.float32)
    np.add.at(expected, indices, g)
    table = to_device(np.zeros((rows, 3), np.float32), device)
    place = to_device(indices, device)
    _, dtable = gradient(lambda t: ops.embedding(t, place), table, to_device(g, device))
    assert (host(dtable) == expected).all()


@pytest.mark.gpu
def test_embedding_on_the_gpu_is_the_same_every_time_and_marks_what_no_row_has():
    rng = np.random.default_rng(0)
    indices = to_device(rng.integers(0, 7, 3000), "cuda:0")
    table = to_device(rng.standard_normal((7, 40)).astype(bf16), "cuda:0")
    g = to_device(rng.standard_normal((3000, 40)).astype(bf16), "cuda:0")
    runs = [gradient(lambda t: ops.embedding(t, indices), table, g)[1] for _ in range(2)]
    assert (host(runs[0]) == host(runs[1])).all()
    wrong = to_device(np.array([0, 7, -1, 6, 2**32]), "cuda:0")
    y, dtable = gradient(lambda t: ops.embedding(t, wrong), table, g[:5])
    assert np.isnan(host(y)).any(axis=1).tolist() == [False, True, True, False, True]
    assert np.isfinite(host(dtable)).all()


@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.integers(0, 3), st.integers(0, 9))
def test_concatenate_and_split_are_inverse(lengths, axis, seed):
    rng = np.random.default_rng(seed)
    shapes = [[2, 3, 1, 4] for _ in lengths]
    for shape, length in zip(shapes, lengths, strict=True):
        shape[axis] = length
    arrays = [rng.standard_normal(shape).astype(bf16) for shape in shapes]
    for at in (axis, axis - 4):
        joined = ops.concatenate(arrays, at)
        assert (joined == np.concatenate(arrays, at)).all() and joined.dtype == bf16
        for part, array in zip(ops.split(joined, lengths, at), arrays, strict=True):
            assert part.shape == array.shape and (part == array).all()


def test_unshuffle_is_the_inverse_of_shuffle(device):
    x = to_device(np.arange(2 * 4 * 6 * 5).reshape(2, 4, 6, 5).astype(np.float32), device)
    assert (host(ops.pixel_shuffle(ops.pixel_unshuffle(x, 2), 2)) == host(x)).all()


def test_activations_far_out(device):
    """Neither tail overflows, and the small ends keep their digits in f64."""
    x = np.array([-1e300, -30.0, -8.0, 0.0, 8.0, 1e300])
    silu = host(ops.silu(to_device(x, device)))
    np.testing.assert_allclose(
        silu[[1, 2, 5]], [-30 * math.exp(-30), -8 / (1 + math.exp(8)), 1e300], rtol=1e-12
    )
    gelu = host(ops.gelu(to_device(x, device)))
    np.testing.assert_allclose(
        gelu[[1, 2, 5]],
        [-15 * math.erfc(30 / 2**0.5), -4 * math.erfc(8 / 2**0.5), 1e300],
        rtol=1e-12,
    )
    tanh = host(ops.gelu(to_device(x, device), form="tanh"))
    assert tanh[0] == 0 and abs(tanh[2]) < 1e-15 and tanh[5] == 1e300
    for y in (silu, gelu, tanh):
        assert y[3] == 0 and y[0] == 0
    big = to_device(np.array([-3e38, 3e38], np.float32), device)
    for run in (ops.silu, ops.gelu, lambda v: ops.gelu(v, form="tanh"), ops.relu):
        y, dx = gradient(run, big, to_device(np.ones(2, np.float32), device))
        assert host(y)[0] == 0 and host(y)[1] == host(big)[1] and host(dx).tolist() == [0, 1]


def test_relu_keeps_nan_and_is_flat_at_zero(device):
    x = to_device(np.array([np.nan, -1, 0, 2], np.float32), device)
    y, dx = gradient(ops.relu, x, to_device(np.ones(4, np.float32), device))
    assert np.isnan(host(y)[0]) and host(y)[1:].tolist() == [0, 0, 2]
    assert host(dx).tolist() == [0, 0, 0, 1]


@given(st.floats(-37, 37), st.sampled_from([np.float32, np.float64]))
def test_the_normal_distribution_is_that_of_erfc(x, dtype):
    x = np.array([x], dtype)
    below, density = (float(v[0]) for v in normal_below(x))
    u, v = np.finfo(dtype).eps / 2, float(x[0])
    expected = math.erfc(-v / math.sqrt(2)) / 2
    # exp(-x^2 / 2) carries the rounding of its argument, x^2 / 2 units; what the series gives falls
    # as 1 / |x|, its error does not.
    tiny = float(np.finfo(dtype).tiny)
    assert (
        abs(below - expected)
        <= (40 * max(1.0, abs(v)) + v * v) * u * min(expected, 1.0) + 40 * u * (v > 0) + tiny
    )
    assert (
        abs(density - math.exp(-v * v / 2) / math.sqrt(2 * math.pi)) <= (4 + v * v) * u * 0.4 + tiny
    )


def test_softmax_of_rows_that_are_minus_infinity_is_zero(device):
    x = np.array([[-np.inf, -np.inf], [0.0, -np.inf]])
    assert host(ops.softmax(to_device(x, device))).tolist() == [[0, 0], [1, 0]]


def test_group_norm_of_values_far_from_zero(device):
    """A mean of a thousand deviations costs the roundings of x, not those of its square."""
    rng = np.random.default_rng(0)
    x = (1000 + rng.standard_normal((2, 61, 47, 24))).astype(np.float32)
    one, zero = np.ones(24, np.float32), np.zeros(24, np.float32)
    y = ops.group_norm(*(to_device(a, device) for a in (x, one, zero)), groups=3)
    split = x.astype(np.float64).reshape(2, -1, 3, 8)
    centred = split - split.mean(axis=(1, 3), keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(axis=(1, 3), keepdims=True) + 1e-5)
    # A mean of 23 000 values in f32 is off by some units of 1000; squares of them would cost 60.
    assert np.abs(host(y).reshape(split.shape) - expected).max() < 1000 * 2.0**-19


def f(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


@pytest.mark.parametrize(
    "act, error, message",
    [
        (lambda: ops.gelu(f(2), form="erf"), LycorisError, "form 'erf' is unknown, expected one"),
        (lambda: ops.silu(f(2, dtype=np.int32)), DtypeError, "x has dtype int32"),
        (lambda: ops.resize_bilinear(f(2, 3, 4), (2, 2)), ShapeError, r"expected 4 axes"),
        (lambda: ops.resize_bilinear(f(1, 3, 4, 1), (0, 2)), ShapeError, "1 to 32767 pixels"),
        (lambda: ops.embedding(f(3), np.array([0])), ShapeError, r"expected 2 axes \(rows, C\)"),
        (lambda: ops.embedding(f(3, 2), f(2)), DtypeError, "of float32, expected a plain array"),
        (
            lambda: ops.embedding(f(3, 2), Tape().watch(np.array([0]))),
            DtypeError,
            "watched by a tape",
        ),
        (
            lambda: ops.embedding(f(3, 2), np.array([0, -1])),
            ShapeError,
            "reach from -1 to 0, expected 0 to 2",
        ),
        (lambda: ops.concatenate([]), ShapeError, "was given no arrays"),
        (
            lambda: ops.concatenate([f(2, 3), f(3, 3)]),
            ShapeError,
            r"array 1 has shape \(3, 3\), expected that of array 0, \(2, 3\), but for axis -1",
        ),
        (
            lambda: ops.concatenate([f(2), f(2, dtype=np.float64)]),
            DtypeError,
            "array 0 is float32 but array 1 is float64",
        ),
        (lambda: ops.concatenate([f(2, 3)], 2), ShapeError, "axis 2 is not one of the 2 axes"),
        (lambda: ops.split(f(2, 3), [1, 1]), ShapeError, "add up to 2, expected 3"),
        (lambda: ops.expand(f(2, 3), (2, 4)), ShapeError, r"expected the axes of \(2, 4\), or 1"),
        (lambda: ops.expand(f(1, 2, 3), (2, 3)), ShapeError, r"x has shape \(1, 2, 3\)"),
        (lambda: ops.pixel_unshuffle(f(1, 3, 4, 2), 2), ShapeError, "multiples of 2"),
    ],
)
def test_errors(act, error, message):
    with pytest.raises(error, match=message):
        act()
