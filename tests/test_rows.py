"""Every primitive against its formula, on both devices and in every dtype; gradients in f64, then
on both devices.
"""

import numpy as np
import pytest

from lycoris_cupy.arrays import DTYPES, to_device, wide_dtype
from lycoris_cupy.tape import PRIMITIVES, Tape, value_of
from tests.arrays import host
from tests.bounds import assert_within, bound
from tests.rows import ROWS

BY_ID = {row.id: row for row in ROWS}


def on(device, row, values, dtype):
    kept = wide_dtype(DTYPES[dtype])
    return [
        to_device(v.astype(kept if i in row.wide else DTYPES[dtype]), device)
        for i, v in enumerate(values)
    ]


def magnitude(row, values):
    if row.size is not None:
        return row.size(*values)
    return row.formula(*map(np.abs, values)) if row.linear else np.abs(row.formula(*values))


def test_every_primitive_has_a_row():
    assert set(PRIMITIVES) == {row.primitive for row in ROWS}


def test_ids_are_unique():
    assert len(BY_ID) == len(ROWS)


@pytest.mark.parametrize("dtype", ["bf16", "f32", "f64"])
@pytest.mark.parametrize("row_id", BY_ID)
def test_value(row_id, dtype, device):
    row = BY_ID[row_id]
    values = row.draw()
    arrays = on(device, row, values, dtype)
    before = [host(a) for a in arrays]
    out = row.call(*arrays)
    expected = row.formula(*values)
    limit = bound(expected, magnitude(row, values), row.depth, out.dtype, row.roundings)
    assert_within(host(out), expected, limit, row_id)
    for array, old in zip(arrays, before, strict=True):
        assert (host(array) == old).all(), "an input was changed"


def gradients(row, arrays, g):
    tape = Tape()
    args = [a if i in row.fixed else tape.watch(a) for i, a in enumerate(arrays)]
    out = row.call(*args)
    wanted = [a for i, a in enumerate(args) if i not in row.fixed]
    return value_of(out), tape.gradients(out, g, wanted)


@pytest.mark.parametrize("row_id", BY_ID)
def test_gradient_is_the_derivative(row_id):
    """Central differences along random directions, in f64: exact for products of few factors up to
    rounding.
    """
    row = BY_ID[row_id]
    values = row.draw(1)
    rng = np.random.default_rng(2)
    shape = row.call(*on("cpu", row, values, "f64")).shape
    dtype = np.float64
    g = rng.standard_normal(shape)
    if "to bf16" in row_id or "to f32" in row_id:  # a cast has no derivative but the identity
        _, (dx,) = gradients(row, on("cpu", row, values, "f64"), g)
        assert (host(dx) == g).all()
        return
    _, found = gradients(row, on("cpu", row, values, "f64"), g.astype(dtype))
    watched = [i for i in range(len(values)) if i not in row.fixed]
    step = 2.0**-14
    for i, gradient in zip(watched, found, strict=True):
        direction = rng.standard_normal(values[i].shape)
        if not row.linear:  # stay on one side of the kink
            direction = np.where(np.abs(values[i]) > 4 * step * np.abs(direction), direction, 0)

        def moved(sign, i=i, direction=direction):
            shifted = list(values)
            shifted[i] = values[i] + sign * step * direction
            return float((row.formula(*shifted) * g).sum())

        expected = (moved(1) - moved(-1)) / (2 * step)
        scale = float((magnitude(row, values) * np.abs(g)).sum()) + float(
            (np.abs(gradient) * np.abs(direction)).sum()
        )
        # A formula without bend is of degree two at most in one argument, so the difference has no
        # truncation error; what is left is the rounding of two sums of this magnitude, divided by
        # the step.
        assert (
            abs(expected - float((gradient * direction).sum()))
            <= (2.0**-48 * (1 + row.depth) / step + row.bend * step**2) * scale + 1e-300
        )


@pytest.mark.parametrize("dtype", ["bf16", "f32", "f64"])
@pytest.mark.parametrize("row_id", BY_ID)
def test_gradient_on_device(row_id, dtype, device):
    """The same gradients in each dtype on each device, within the bound that the same rule over
    absolute values gives.
    """
    row = BY_ID[row_id]
    values = row.draw(3)
    arrays = on(device, row, values, dtype)
    shape = row.call(*arrays).shape
    out_dtype = row.call(*arrays).dtype
    g = np.random.default_rng(4).standard_normal(shape).astype(DTYPES["bf16"]).astype(np.float64)
    _, expected = gradients(row, on("cpu", row, values, "f64"), g)
    if row.linear:
        _, sizes = gradients(row, on("cpu", row, [np.abs(v) for v in values], "f64"), np.abs(g))
    else:
        _, sizes = gradients(row, on("cpu", row, values, "f64"), g)
        largest = np.abs(values[0]).max(initial=0)
        if row.size is not None:
            largest += np.max(magnitude(row, values), initial=0)
        sizes = [np.abs(g).sum() * (1 + largest) for _ in sizes]
    _, found = gradients(row, arrays, to_device(g.astype(out_dtype), device))
    depth = row.depth + int(np.prod(shape))
    for value, ref, size in zip(found, expected, sizes, strict=True):
        # The gradient of bf16 arrays may be rounded once on the way to its wide sum.
        ref, size = (
            host(ref),
            np.asarray(host(size) if hasattr(size, "shape") and size.shape else size),
        )
        kept = DTYPES[dtype] if value.dtype != np.float64 else np.float64
        limit = bound(ref, size, depth, kept, roundings=row.gradient_roundings)
        assert_within(host(value), ref, limit, row_id)
