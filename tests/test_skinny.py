"""Products of few positions by every variant of the kernel, which is called itself, whatever the
planner would take, on a GPU of its kind.
"""

from math import prod

import numpy as np
import pytest

from lycoris_cupy import bf16, to_device
from lycoris_cupy.ops import conv_cpu, extended_gpu, skinny_gpu
from lycoris_cupy.ops.extended_gpu import Extra
from lycoris_cupy.ops.window import Window
from tests.arrays import host, on_gpu
from tests.bounds import assert_within, bound

FLAT, ONE = Window(), Window.of((1, 1))
SCALE = np.array([0.703125], np.float32)

# x, columns; width of x2 (of a block), blocks, terms. Tails in rows, columns and channels; strips that
# end with a block; more steps than a ring has stages, fewer than a cluster has blocks.
FORWARD = {
    "one position": ((72,), 136, 0, 1, ""),
    "scaled": ((1, 264), 40, 0, 1, "scale add bias"),
    "few steps": ((64, 64), 64, 0, 1, "bias"),
    "full": ((64, 3072), 1024, 0, 1, ""),
    "two tiles of rows": ((2, 50, 136), 200, 24, 1, "add bias"),
    "rank 16": ((17, 328), 648, 16, 1, "add bias bias2"),
    "rank 72": ((64, 200), 264, 72, 1, "add bias2"),
    "a long second sum": ((33, 8), 136, 1096, 1, "bias"),
    "an image": ((2, 3, 5, 72), 24, 8, 1, "add"),
    "blocks of 384": ((64, 1536), 1536, 384, 4, ""),
    "blocks of 8": ((5, 40), 40, 24, 5, "add bias bias2"),
    "blocks of 200": ((40, 128), 800, 136, 4, "bias2"),
    # Warps without a row, with one, with all of theirs.
    **{f"{p} positions": ((p, 456), 264, 24, 1, "add") for p in (1, 7, 16, 63, 65, 128)},
}
# g, inputs, width of the second sum (of a block), blocks, terms.
BACKWARD = {
    "one position": ((72,), 136, 0, 1, ""),
    "scaled": ((3, 264), 40, 0, 1, "scale add"),
    "full": ((64, 3072), 1024, 0, 1, "add"),
    "two tiles of rows": ((2, 50, 136), 200, 24, 1, "add"),
    "rank 16": ((17, 328), 648, 16, 1, "add"),
    "rank 72": ((64, 200), 264, 72, 1, ""),
    "an image": ((2, 3, 5, 72), 24, 8, 1, "add"),
    "blocks of 384": ((64, 1536), 1536, 16, 4, ""),
    "blocks of 72": ((5, 40), 360, 72, 5, "add"),
}


def draw(rng, shape):
    return rng.standard_normal(shape, np.float32).astype(bf16).astype(np.float64)


def times(x, w, window=FLAT):
    """x * w in f64, which tests/test_rows.py holds against plain loops."""
    y = conv_cpu.conv(x.reshape(-1, x.shape[-1]), w, window)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def added(rng, terms, positions, columns):
    """What stands beside two products, as far as terms name it: add, bias, bias2."""
    shapes = {"add": (positions, columns), "bias": (columns,), "bias2": (columns,)}
    return [draw(rng, shape) if term in terms else None for term, shape in shapes.items()]


def totals(own, second, add, bias, bias2):
    """(y, its size) of y = own + SCALE * (second + bias2) + add + bias, from (value, size) of both
    products."""
    b2 = 0 if bias2 is None else bias2
    y, size = own[0] + SCALE * (second[0] + b2), own[1] + second[1] + abs(b2)
    for more in (add, bias):
        if more is not None:
            y, size = y + more, size + abs(more)
    return y, size


def only(monkeypatch, *plans):
    """only(variant): this one is taken wherever it is listed, the best one of other lists; all of
    the best with None. The plans that are kept are let go, and again after the last."""
    choose = skinny_gpu._choose

    def clear(variant=None):
        if variant is not None:  # the plan of a product apart, which is asked for too, stays
            monkeypatch.setattr(
                skinny_gpu,
                "_choose",
                lambda size, of: variant if variant in of else choose(size, of),
            )
        for made in plans:
            made.cache_clear()

    yield clear
    clear()


@pytest.fixture(params=[None, *skinny_gpu.VARIANTS], ids=str)
def variant(request, monkeypatch):
    if not extended_gpu.hopper():
        pytest.skip("not a Hopper GPU")
    if request.param is not None:
        monkeypatch.setattr(skinny_gpu, "_choose", lambda *sizes: request.param)
    skinny_gpu._plan.cache_clear()
    yield request.param
    skinny_gpu._plan.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORWARD)
def test_forward(name, variant):
    shape, columns, width2, blocks, terms = FORWARD[name]
    rng = np.random.default_rng([*name.encode()])
    x, w = draw(rng, shape), draw(rng, (1, shape[-1], columns))
    y, size, depth = times(x, w), times(abs(x), abs(w)), shape[-1] + width2 + 4
    if "scale" in terms:
        y = SCALE * y
    add = draw(rng, y.shape) if "add" in terms.split() else None
    bias = draw(rng, (columns,)) if "bias" in terms.split() else None
    window = ONE if len(shape) == 4 else FLAT
    extra = None
    if width2:
        own = FLAT.grouped(blocks, shared=True) if blocks > 1 else FLAT
        x2 = draw(rng, (*shape[:-1], blocks * width2))
        w2 = draw(rng, (1, width2, columns // blocks))
        bias2 = draw(rng, (columns,)) if "bias2" in terms else None
        b2 = 0 if bias2 is None else bias2
        y = y + SCALE * (times(x2, w2, own) + b2)
        size = size + times(abs(x2), abs(w2), own) + abs(b2)
        x2, w2, bias2 = on_gpu(x2, w2, bias2)
        extra = Extra(x2, w2, own.grouped(blocks, shared=True), to_device(SCALE, "cuda:0"), bias2)
        if window.axes:
            extra = extra._replace(window=window)
    for more in (add, bias):
        if more is not None:
            y, size = y + more, size + abs(more)
    scale = to_device(SCALE, "cuda:0") if "scale" in terms else None
    x, w, add, bias = on_gpu(x, w, add, bias)
    assert extended_gpu.takes(x, w, add, bias)
    run = skinny_gpu.skinny_forward
    out = [host(run(x, w, window, extra=extra, scale=scale, add=add, bias=bias)) for _ in range(3)]
    assert (out[0] == out[1]).all() and (out[0] == out[2]).all()
    assert_within(out[0], y, bound(y, size, depth, bf16), name)


@pytest.mark.gpu
@pytest.mark.parametrize("name", BACKWARD)
def test_backward(name, variant):
    shape, inputs, width2, blocks, terms = BACKWARD[name]
    rng = np.random.default_rng([*name.encode()])
    g, w = draw(rng, shape), draw(rng, (1, inputs, shape[-1]))
    dx, size = times(g, w.swapaxes(1, 2)), times(abs(g), abs(w).swapaxes(1, 2))
    depth = shape[-1] + width2 + 4
    if "scale" in terms:
        dx = SCALE * dx
    extra, add = None, draw(rng, dx.shape) if "add" in terms else None
    if width2:
        own = FLAT.grouped(blocks, shared=True)
        g2 = draw(rng, (prod(shape[:-1]), blocks * width2))
        w2 = draw(rng, (1, inputs // blocks, width2))
        dx = dx + SCALE * times(g2, w2.swapaxes(1, 2), own).reshape(dx.shape)
        size = size + times(abs(g2), abs(w2).swapaxes(1, 2), own).reshape(dx.shape)
        extra = Extra(*on_gpu(g2, w2), own, to_device(SCALE, "cuda:0"))
    if add is not None:
        dx, size = dx + add, size + abs(add)
    scale = to_device(SCALE, "cuda:0") if "scale" in terms else None
    g, w, add = on_gpu(g, w, add)
    window = ONE if len(shape) == 4 else FLAT
    out = host(skinny_gpu.skinny_dx(g, w, window, extra=extra, scale=scale, add=add))
    assert_within(out, dx, bound(dx, size, depth, bf16), name)


@pytest.mark.gpu
@pytest.mark.parametrize("positions", [3, 40])
def test_blocks_that_share_w(positions, variant):
    """Rows of channels of one position each, forward and back."""
    rng = np.random.default_rng(positions)
    window = FLAT.grouped(5, shared=True)
    x, w = draw(rng, (positions, 5 * 72)), draw(rng, (1, 72, 16))
    g, add = draw(rng, (positions, 5 * 16)), draw(rng, (positions, 5 * 72))
    y, size = times(x, w, window), times(abs(x), abs(w), window)
    dx = add + SCALE * times(g, w.swapaxes(1, 2), window)
    dx_size = abs(add) + times(abs(g), abs(w).swapaxes(1, 2), window)
    x, w, g, add = on_gpu(x, w, g, add)
    none = {"extra": None, "scale": None, "add": None, "bias": None}
    assert_within(
        host(skinny_gpu.skinny_forward(x, w, window, **none)), y, bound(y, size, 72, bf16)
    )
    scale = to_device(SCALE, "cuda:0")
    out = host(skinny_gpu.skinny_dx(g, w, window, extra=None, scale=scale, add=add))
    assert_within(out, dx, bound(dx, dx_size, 18, bf16))
