"""The gradients of a LoHa's factors of few positions in one launch: on a GPU of its kind, and the
blocks followed in Python.
"""

from itertools import product
from math import prod

import numpy as np
import pytest

from lycoris_cupy import bf16, to_device
from lycoris_cupy.ops import counters, extended_gpu
from lycoris_cupy.ops import few_hadamard_gpu as few
from tests.bounds import ROUNDING, assert_within, bound
from tests.dry_gpu import Array, dry_gpu

SCALE = np.array([0.703125], np.float32)
F32 = np.dtype(np.float32)
# K, N. Fewer steps than warps; tails of steps and of tiles; more steps than a warp has room for.
SIZES = (8, 8), (40, 56), (384, 1032), (1304, 4200), (3072, 3072)
POSITIONS = 1, 3, 37, 64, 65, 128


def draw(rng, *shape):
    return rng.standard_normal(shape, np.float32).astype(bf16)


def wide(array):
    return to_device(array, "cpu").astype(np.float64)


def sums(v, f1, f2):
    """h[p, r, s] = sum over l of v[p, l] * f1[l, r] * f2[l, s]."""
    ranks = f1.shape[1], f2.shape[1]
    split = (f1[:, :, None] * f2[:, None]).reshape(len(f1), prod(ranks))
    return (v @ split).reshape(len(v), *ranks)


def gradients(h, v, f1, f2):
    """(df1 (l, R), df2 (l, R)) from the h of the other side."""
    ranks = f1.shape[1]
    c = (v.T @ h.reshape(len(h), -1)).reshape(-1, ranks, ranks)
    return np.einsum("lrs,ls->lr", c, f2), np.einsum("lrs,lr->ls", c, f1)


def checked(found, here, there, factor, name):
    """Both gradients of a side, (v, f1, f2) with factors (l, R), from the other side's."""
    width, positions, ranks = there[1].shape[0], *there[0].shape[:1], there[1].shape[1]
    own, other = [abs(a) for a in here], [abs(a) for a in there]
    h, size = sums(*there), sums(*other)
    # The product of two values is rounded to bf16, and h once more.
    rounded = bound(h, size, width, bf16) + ROUNDING["bf16"] * size
    most = gradients(size + rounded, *own)
    exact, carried = gradients(h, *here), gradients(rounded, *own)
    for i in range(2):
        limit = factor * carried[i]
        limit += bound(factor * exact[i], factor * most[i], positions + ranks + 1, F32)
        assert_within(found[i], factor * exact[i], limit, f"{name}, factor {i + 1}")


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [8, 16])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gradients(size, positions, ranks):
    if not extended_gpu.hopper():
        pytest.skip("not a Hopper GPU")
    (k, n), rng = size, np.random.default_rng([*size, positions, ranks])
    x, g = draw(rng, positions, k), draw(rng, positions, n)
    factors = [draw(rng, 1, *s) for s in ((k, ranks), (ranks, n)) * 2]
    d1, u1, d2, u2 = (a[0].astype(np.float64) for a in factors)
    inputs = x.astype(np.float64), d1, d2
    outputs = g.astype(np.float64), u1.T, u2.T
    on = [to_device(a, "cuda:0") for a in (x, g, *factors)]
    planned = few.few_hadamard_plan(*on)
    assert planned is not None
    for scale in (None, SCALE):
        given = None if scale is None else to_device(scale, "cuda:0")
        ran = [few.few_hadamard_gradients(*on[:2], on[2:], planned, scale=given) for _ in range(2)]
        assert not wide(counters.counters().view(np.int32)).any()
        out, again = (list(map(wide, a)) for a in ran)
        assert [a.shape for a in out] == [a.shape for a in factors]
        assert all((a == b).all() for a, b in zip(out, again, strict=True))
        factor = 1.0 if scale is None else float(scale[0])
        name = f"{size}, {positions} positions, {ranks} ranks, scale {factor}"
        checked([out[0][0], out[2][0]], inputs, outputs, factor, f"d, {name}")
        checked([out[1][0].T, out[3][0].T], outputs, inputs, factor, f"u, {name}")


def followed(planned, x, g, factors):
    """What few_hadamard.cu computes by its own indices. Fails where a value is written twice."""
    positions, k, n, ranks = planned.numbers
    d1, u1, d2, u2 = factors
    sides = (x, d1, d2), (g, u1.T, u2.T)
    groups, quads = -(-positions // 32), ranks // 4
    first, tiles = 2 * groups * quads * 8, (-(-n // 48), -(-k // 48))
    h = np.full((2, groups * 32, ranks, ranks), np.nan)
    for cluster in range(first // 8):
        side, group, r = cluster % 2, cluster // 2 // quads, cluster // 2 % quads * 4
        v, f1, f2 = sides[side]
        rows, steps = np.zeros((32, v.shape[1])), -(-v.shape[1] // 16)
        part = v[group * 32 : group * 32 + 32]
        rows[: len(part)] = part
        total = 0
        for i in range(64):
            at = slice(i * steps // 64 * 16, (i + 1) * steps // 64 * 16)
            total = total + sums(rows[:, at], f1[at, r : r + 4], f2[at])
        for block in range(8):
            p, own = block % 2 * 16, r + block // 2
            to = h[side, group * 32 + p : group * 32 + p + 16, own]
            assert np.isnan(to).all()
            to[:] = total[p : p + 16, block // 2]
    assert not np.isnan(h).any()
    out = [np.full(f.shape, np.nan) for f in (d1, u1.T, d2, u2.T)]
    for block in range(first, planned.grid[0]):
        begun = block - first
        if begun >= sum(tiles):
            assert planned.grid[0] - block < 8
            continue
        back = begun >= tiles[0]
        at = slice((begun - tiles[0] * back) * 48, (begun - tiles[0] * back) * 48 + 48)
        v, f1, f2 = sides[not back]
        own = gradients(h[int(back), :positions], v[:, at], f1[at], f2[at])
        for whole, part in zip(out[not back :: 2], own, strict=True):
            assert np.isnan(whole[at]).all()
            whole[at] = part
    return out[0], out[1].T, out[2], out[3].T


@pytest.mark.parametrize("ranks", [8, 16])
@pytest.mark.parametrize("size", SIZES[:4], ids=str)
def test_the_blocks_make_everything_once(size, ranks):
    (k, n), rng = size, np.random.default_rng(0)
    for positions in (3, 65):
        planned = few.plan_few_hadamard(positions, k, n, ranks)
        shapes = (positions, k), (positions, n), (k, ranks), (ranks, n), (k, ranks), (ranks, n)
        x, g, d1, u1, d2, u2 = (rng.integers(-3, 4, s).astype(np.float64) for s in shapes)
        change = x.T @ g
        one, two = change * (d2 @ u2), change * (d1 @ u1)
        expected = one @ u1.T, d1.T @ one, two @ u2.T, d2.T @ two
        found = followed(planned, x, g, (d1, u1, d2, u2))
        assert all((a == b).all() for a, b in zip(found, expected, strict=True))


def test_what_it_is_for():
    assert few.plan_few_hadamard(64, 3072, 3072, 16).grid == (256,)
    assert few.plan_few_hadamard(5, 40, 56, 8).grid == (32 + 8,)
    refused = (0, 64, 64, 16), (129, 64, 64, 16), (64, 60, 64, 16), (64, 64, 60, 16)
    refused += (64, 64, 64, 24), (64, 64, 64, 4), (64, 1 << 24, 64, 8)
    assert all(few.plan_few_hadamard(*s) is None for s in refused)


def test_arrays_that_fit():
    with dry_gpu():

        def plan(*changed):
            shapes = [(2, 5, 64), (2, 5, 72), *((1, 64, 8), (1, 8, 72)) * 2]
            for at, shape in changed:
                shapes[at] = shape
            arrays = [Array(s, bf16) for s in shapes]
            return few.few_hadamard_plan(*arrays), arrays

        planned, (x, g, *factors) = plan()
        out = few.few_hadamard_gradients(x, g, factors, planned, scale=None)
        assert [(a.shape, a.dtype) for a in out] == [(f.shape, F32) for f in factors]
        for at, shape in product(range(6), ((1, 64, 16), (1, 16, 72), (5, 64))):
            assert plan((at, shape))[0] is None
