"""The demo's checks: a reloaded adapter is the trained one, a merged network is the live one.

Live and merged compute the same network, y = x * (W + dW) + b, PReLU, ..., and differ by rounding.
With u the unit roundoff, 2^-8 for bf16 and 2^-24 for f32, one layer's outputs for the same x differ
by at most

    e = u (|live| + |merged|)                   each result is rounded once
      + u |x| * |W + dW|                        the merged weight is rounded once
      + (2 u + u^2) |x| * |dW|'                 inside a live adapter, at most twice on the way
      + 2 (K + 16) 2^-24 |x| * (|W| + |dW|')    two f32 sums of K terms; 16 for bias, scale and dW

where |dW|' is the change that the factors' absolute values make. That is checked on every element
of every layer, on the input that the layer sees.

For the whole network, carrying such bounds on through |W| gives 10^19 from one layer. They are
carried with the true derivatives instead: at the output element where both differ most,

    |live - merged| <= sum over layers <|d output / d layer|, e + 2 u |layer|>   2 u: PReLU, twice
                       + 2 u |output| + the f32 tail

to first order in u, whatever the signs of the roundings. One pullback gives all the derivatives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..arrays import Array, bf16, f32, module_of, to_device
from ..engine import Engine, Topology
from ..ops.elementwise import add, cast
from ..ops.product import product
from .ncnn import Network
from .upscaler import topology_of

UNITS = {"bf16": 2.0**-8, "f32": 2.0**-24}
ADAPTER = "adapter"
Seen = dict[str, tuple[Array, Array]]  # layer -> its input and output in the network, f32


@dataclass(frozen=True)
class Check:
    """measured <= bound."""

    what: str
    measured: float
    bound: float

    @property
    def holds(self) -> bool:
        return self.measured <= self.bound  # false for NaN

    def __str__(self) -> str:
        return f"{self.what} is {self.measured:.3g}, expected at most {self.bound:.3g}"


def reloaded_check(trained: Engine, name: str, path: Path) -> Check:
    """How many values in the file are not, bit for bit, those of the trained adapter: 0."""
    fresh = Engine(trained.layers, trained.topology, device=trained.device, dtype=trained.dtype)
    fresh.attach(path, name=name)
    kept, found = (_bits(engine.parameters(name)) for engine in (trained, fresh))
    differing = float((kept != found).sum()) if kept.shape == found.shape else np.inf
    return Check(f"{name}, reloaded against trained: values that differ", differing, 0.0)


def _bits(parameters) -> np.ndarray:
    """All factors, in the order of their names, as one row of 16-bit integers."""
    arrays = [p[factor] for _, p in sorted(parameters.items()) for factor in sorted(p)]
    return np.concatenate([to_device(array, "cpu").view(np.uint16).ravel() for array in arrays])


def merged_checks(
    network: Network, name: str, path: Path, low: np.ndarray, device: str
) -> list[Check]:
    """Merged against live on a picture (H, W, 3), in bf16 and f32: each layer, and the output."""
    network = _rounded(network)  # the same numbers in both dtypes

    def engine(dtype, wrap: Callable[[Topology], Topology] = lambda topology: topology) -> Engine:
        topology = wrap(topology_of(network, device, dtype))
        made = Engine(network.layers, topology, device=device, dtype=dtype)
        made.attach(path, name=ADAPTER)
        return made

    x = low[None].astype(bf16)
    seen: Seen = {}
    exact = engine(f32, lambda topology: _noting(topology, seen))
    exact.forward(x)
    shifted = engine(f32, _shifted)
    checks = []
    for dtype, unit in UNITS.items():
        what = f"{name}, merged against live in {dtype}:"
        alone = engine(dtype, lambda _: _side_by_side(list(seen)))
        share = _worst_share(alone, exact, seen, unit)
        checks.append(Check(f"{what} difference of a layer / its bound", share, 1.0))
        live = engine(dtype)
        y, z = (to_device(e.forward(x), "cpu").astype(f32) for e in (live, live.merged()))
        worst = np.unravel_index(np.argmax(abs(y - z)), y.shape)
        bound = _output_bound(shifted, exact, x, seen, worst, unit)
        checks.append(Check(f"{what} difference of the output", float(abs(y - z)[worst]), bound))
    return checks


def _worst_share(alone: Engine, exact: Engine, seen: Seen, unit: float) -> float:
    """The greatest |live - merged| / bound of any element of any layer, on what the layer sees."""
    xs = [cast(x, alone.dtype) for x, _ in seen.values()]
    lives, mergeds = alone.forward(*xs), alone.merged().forward(*xs)
    shares = []
    for name, x, live, merged in zip(seen, xs, lives, mergeds, strict=True):
        live, merged = cast(live, f32), cast(merged, f32)
        bound = _layer_bound(exact, name, cast(x, f32), abs(live) + abs(merged), unit)
        # Without a bias the bound is 0 where the input is, and so is the difference.
        shares.append((abs(live - merged) / (bound + np.finfo(f32).tiny)).max())
    return float(np.max([float(share) for share in shares]))  # NaN stays


def _layer_bound(exact: Engine, name: str, x: Array, results: Array, unit: float) -> Array:
    """e of the module docstring.  x: f32. results: |live| + |merged|."""
    layer, attached = exact.layers[name], exact.attachments[ADAPTER]
    adapter, p, scale = attached.adapters[name], attached.canonical()[name], attached.scales[name]
    sizes = {factor: abs(array) for factor, array in p.items()}
    change = adapter.delta_weight(layer.matrix, p, scale)
    size = adapter.delta_weight(layer.matrix, sizes, abs(scale))
    terms = layer.shape.taps * layer.shape.inputs + 16
    weight = unit * abs(layer.matrix + change) + (2 * unit + unit**2) * size
    weight = weight + 2 * terms * UNITS["f32"] * (abs(layer.matrix) + size)
    return unit * results + product(abs(x), weight, layer.window)


def _output_bound(
    shifted: Engine, exact: Engine, x: Array, seen: Seen, worst: tuple, unit: float
) -> float:
    """The bound of the module docstring for one element of the output."""
    y, pullback = shifted.vjp(x, *(module_of(out).zeros_like(out) for _, out in seen.values()))
    one = module_of(y).zeros_like(y)
    one[worst] = 1
    (_, *derivatives), _ = pullback(one)
    # The tail, in both: an addition and two sums of four taps, whose sizes add up to 1.375.
    total = 2 * 9 * 1.375**2 * UNITS["f32"] * float(abs(y).max())
    total += 2 * unit * float(abs(y[worst]))
    for (name, (x, out)), g in zip(seen.items(), derivatives, strict=True):
        error = _layer_bound(exact, name, x, 2 * abs(out), unit) + 2 * unit * abs(out)
        total += float((abs(g) * error).sum())
    return total


def _noting(topology: Topology, seen: Seen) -> Topology:
    """The same topology; `seen` gets every layer's input and output."""

    def noting(call, *inputs):
        def noted(name, x):
            seen[name] = x, call(name, x)
            return seen[name][1]

        return topology(noted, *inputs)

    return noting


def _shifted(topology: Topology) -> Topology:
    """The same topology with an input added to each layer's output: their gradients are equal."""

    def shifted(call, x, *shifts):
        left = iter(shifts)
        return topology(lambda name, x: add(call(name, x), next(left)), x)

    return shifted


def _side_by_side(names: list[str]) -> Topology:
    """Each layer by itself, on an input of its own."""
    return lambda call, *inputs: [call(name, x) for name, x in zip(names, inputs, strict=True)]


def _rounded(network: Network) -> Network:
    """The network with the bf16 numbers that an Engine makes of it, in f32."""
    layers = {name: layer.to("cpu", bf16).to("cpu", f32) for name, layer in network.layers.items()}
    slopes = {name: slope.astype(bf16).astype(f32) for name, slope in network.slopes.items()}
    return replace(network, layers=layers, slopes=slopes)
