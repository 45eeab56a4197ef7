"""How operations join layers: a transformer block and a U-Net block as topologies, their gradients
against finite differences, and a few steps of training.
"""

from functools import partial

import numpy as np
import pytest

from lycoris_cupy import Conv2d, Engine, GroupNorm, LayerNorm, Linear, ops, to_device
from lycoris_cupy.arrays import on_gpu
from lycoris_cupy.losses import charbonnier, cross_entropy
from lycoris_cupy.optim import AdamW
from lycoris_cupy.tape import value_of
from tests.arrays import host

WIDTH, HEADS, WORDS = 16, 2, 11


def normal(rng, *shape):
    return rng.standard_normal(shape) / np.sqrt(np.prod(shape[:-1]))


def self_attention(qkv, **options):
    """(N, L, 3 C), as one projection makes it, to (N, L, C)."""
    n, length, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    apart = ops.transpose(ops.reshape(qkv, (n, length, 3 * HEADS, width // HEADS)), (0, 2, 1, 3))
    q, k, v = ops.split(apart, [HEADS] * 3, axis=1)
    out = ops.attention(q, k, v, **options)
    return ops.reshape(ops.transpose(out, (0, 2, 1, 3)), (n, length, width))


def transformer(device, dtype):
    """Words (N, L) to logits (N, L, WORDS); a causal block and a gated product behind it."""
    rng = np.random.default_rng(0)
    layers = {
        "norm1": LayerNorm(1 + 0.1 * normal(rng, WIDTH), normal(rng, WIDTH)),
        "qkv": Linear(normal(rng, WIDTH, 3 * WIDTH)),
        "out": Linear(normal(rng, WIDTH, WIDTH)),
        "norm2": LayerNorm(1 + 0.1 * normal(rng, WIDTH), None),
        "up": Linear(normal(rng, WIDTH, 48), normal(rng, 48)),
        "down": Linear(normal(rng, 24, WIDTH)),
        "head": Linear(normal(rng, WIDTH, WORDS)),
    }
    table = rng.standard_normal((WORDS, WIDTH))

    def topology(call, words, seen):
        x = ops.embedding(placed[0], words)
        mask = seen.reshape(seen.shape[0], 1, 1, seen.shape[1])
        a = self_attention(call("qkv", call("norm1", x)), mask=mask, causal=True)
        x = ops.add(x, call("out", a))
        gate, value = ops.split(call("up", call("norm2", x)), [24, 24])
        x = ops.add(x, call("down", ops.multiply(ops.gelu(gate), value)))
        return call("head", x)

    engine = Engine(layers, topology, device=device, dtype=dtype)
    placed = [ops.cast(to_device(table, engine.device), dtype)]
    return engine


def u_net(device, dtype):
    """An image and a vector a sample to an image of its size: down, attention over the pixels, up,
    the skip beside it.
    """
    rng = np.random.default_rng(1)
    layers = {
        "in": Conv2d(normal(rng, 3, 3, 12, WIDTH), padding=1),
        "norm1": GroupNorm(1 + 0.1 * normal(rng, WIDTH), normal(rng, WIDTH), groups=4),
        "down": Conv2d(normal(rng, 3, 3, WIDTH, WIDTH), normal(rng, WIDTH), stride=2, padding=1),
        "time": Linear(normal(rng, 6, WIDTH), normal(rng, WIDTH)),
        "norm2": GroupNorm(1 + 0.1 * normal(rng, WIDTH), normal(rng, WIDTH), groups=2),
        "qkv": Linear(normal(rng, WIDTH, 3 * WIDTH)),
        "out": Conv2d(normal(rng, 3, 3, 2 * WIDTH, 12), padding=1),
    }

    def topology(call, x, time):
        skip = ops.silu(call("norm1", call("in", ops.pixel_unshuffle(x, 2))))
        h = call("down", skip)
        n, height, width, channels = h.shape
        time = ops.reshape(call("time", ops.silu(time)), (n, 1, 1, channels))
        h = ops.silu(call("norm2", ops.add(h, ops.expand(time, h.shape))))
        flat = ops.reshape(h, (n, height * width, channels))
        h = ops.add(h, ops.reshape(self_attention(call("qkv", flat)), h.shape))
        h = ops.resize_bilinear(h, tuple(skip.shape[1:3]))
        return ops.pixel_shuffle(call("out", ops.concatenate([h, skip])), 2)

    return Engine(layers, topology, device=device, dtype=dtype)


def words(device):
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, WORDS, (3, 7))
    seen = np.ones((3, 7), bool)
    seen[1, 5:] = False
    return to_device(tokens, device), to_device(seen, device)


def images(device):
    rng = np.random.default_rng(3)
    return tuple(to_device(rng.standard_normal(s), device) for s in ((2, 14, 10, 3), (2, 6)))


NETWORKS = {"transformer": (transformer, words), "u-net": (u_net, images)}


def adapted(name, device, dtype, spread=0.3):
    """The engine with a LoKr on every layer that takes one, and a Norm on the others."""
    build, inputs = NETWORKS[name]
    engine = build(device, dtype)
    engine.add("a", "lokr", rank=2, factor=4)
    engine.add("n", "norm", ["norm*"])
    rng = np.random.default_rng(4)
    for adapter in ("a", "n"):
        values = {
            layer: {n: spread * rng.standard_normal(v.shape) for n, v in p.items()}
            for layer, p in engine.parameters(adapter).items()
        }
        placed = {
            layer: {n: to_device(v, engine.device) for n, v in p.items()}
            for layer, p in values.items()
        }
        engine.set_parameters(adapter, placed)
    return engine, inputs(device)


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_the_derivatives(name):
    """Along a random direction in every factor and in the input, by central differences in f64."""
    engine, inputs = adapted(name, "cpu", "f64")
    rng = np.random.default_rng(5)
    y, pullback = engine.vjp(*inputs)
    dy = rng.standard_normal(y.shape)
    dx, grads = pullback(dy)

    def value(*given):
        return float((engine.forward(*given) * dy).sum())

    step = 1e-5
    checked = 0
    for adapter in ("a", "n"):
        for layer, factors in engine.parameters(adapter).items():
            for factor, array in factors.items():
                direction, before = rng.standard_normal(array.shape), array.copy()
                ends = []
                for moved in (before + step * direction, before - step * direction, before):
                    engine.set_parameters(adapter, {layer: {factor: moved}})
                    ends.append(value(*inputs))
                slope = (ends[0] - ends[1]) / (2 * step)
                found = float((grads[adapter][layer][factor] * direction).sum())
                assert abs(slope - found) <= 1e-6 * max(1.0, abs(slope)), (layer, factor)
                checked += 1
    assert checked >= 2 * len(engine.layers)
    if name == "transformer":
        assert dx == (None, None)  # words and masks have no gradient
    else:
        moves = [rng.standard_normal(x.shape) for x in inputs]
        ends = [
            value(*(x + sign * step * move for x, move in zip(inputs, moves, strict=True)))
            for sign in (1, -1)
        ]
        slope = (ends[0] - ends[1]) / (2 * step)
        found = sum(float((d * move).sum()) for d, move in zip(dx, moves, strict=True))
        assert abs(slope - found) <= 1e-6 * abs(slope)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_training_makes_the_loss_fall(name, dtype, device):
    """A captured AdamW step of the block: next words that follow a rule, an image's negative."""
    engine, inputs = adapted(name, device, dtype, spread=0.05)
    if name == "transformer":
        target = to_device((host(inputs[0]).astype(np.int64) * 3 + 1) % WORDS, device)
        loss = partial(cross_entropy, smoothing=0.01)
    else:
        image = host(inputs[0]).astype(np.float32)
        target = to_device(-image, device)
        loss = charbonnier
    optimizer = AdamW(engine.parameters("a"), lr=0.02)
    step = engine.capture_step("a", loss, optimizer, *inputs, targets=[target])
    seen = [float(host(step(*inputs, target))) for _ in range(25)]
    assert np.isfinite(seen).all()
    assert seen[-1] < 0.75 * seen[0], seen


def test_the_device_is_the_engines(device):
    engine, inputs = adapted("u-net", device, "bf16")
    assert on_gpu(value_of(engine.forward(*inputs))) == (device != "cpu")
