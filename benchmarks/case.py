"""One shape on one device: its data, the layer without and with adapters, what they should give,
and how a call of them is timed.
"""

from __future__ import annotations

from statistics import median

import numpy as np

from lycoris_cupy import Engine, bf16, to_device
from lycoris_cupy.arrays import module_of
from lycoris_cupy.attachment import Attachment

from . import composed, reference, timing
from .adapters import SHARE, Group, factors
from .shapes import Shape
from .ulp import f64, ulp, worst

SAMPLES = 64  # positions at which outputs and input gradients are compared with f64
# A result further off than this is wrong: one rounding is half a unit, and the few on the way (x2,
# dh, and for a composition the base) are of the result's size, two or three deviations out.
MOST_ULP = 8.0
ROUNDS = 4  # of a measurement


class Case:
    """shape: what is measured. device: 'cpu' or 'cuda:0'."""

    def __init__(self, shape: Shape, device: str):
        self.shape, self.device, self.gpu = shape, device, device != "cpu"
        self.host = shape.data()
        self.engine = Engine(
            {"layer": shape.build(self.host["weight"], self.host["bias"])}, device=device
        )
        self.layer = self.engine.layers["layer"]
        self.x, self.dy = (to_device(self.host[name], device) for name in ("x", "dy"))
        xp = module_of(self.x)
        rng = np.random.default_rng(2)
        count = min(SAMPLES, shape.positions)
        self.at = xp.asarray(np.sort(rng.choice(shape.positions, count, replace=False)))
        window = self.layer.window
        self.x_patches = reference.patches(self.x, self.at, window)
        self.dy_patches = reference.patches(self.dy, self.at, window, mirrored=True)
        self.weight = f64(self.layer.matrix)
        self.base_y = xp.tensordot(self.x_patches, self.weight, axes=((1, 2), (0, 1)))
        self.base_y += f64(self.layer.bias)
        self.base_dx = self._to_dx(self.weight)
        self._dw = None

    def _to_dx(self, weight):
        xp = module_of(weight)
        return xp.tensordot(self.dy_patches, weight, axes=((1, 2), (0, 2)))

    @property
    def dw(self):
        """The gradient of the whole weight, f64: every factor's gradient comes from it."""
        if self._dw is None:
            self._dw = reference.weight_gradient(self.x, self.dy, self.layer.window)
        return self._dw

    def adapted(self, group: Group) -> Engine:
        """An engine that shares this one's layer, with the group's adapters 'a0', 'a1', ... on it,
        whose changes together are SHARE of the layer's output.
        """
        engine = Engine(self.engine.layers, device=self.device)
        size = float(np.sqrt((self.base_y**2).mean()))
        for i, adapter in enumerate(group):
            made = factors(adapter, self.x_patches[:8], size, SHARE / np.sqrt(len(group)), seed=i)
            engine.attachments[f"a{i}"] = Attachment(
                {"layer": (adapter, made)}, self.device, bf16, 1.0
            )
        return engine

    def expected(self, engine: Engine, group: Group) -> dict:
        """y, dx at the samples and every factor's gradient in f64; and `composed`, the plain
        composition's errors, the yardstick of every route.
        """
        total, grads, y_parts, dx_parts = self.weight.copy(), {}, [], []
        for i, adapter in enumerate(group):
            p = engine.parameters(f"a{i}")["layer"]
            total += reference.delta(adapter, p)
            grads[f"a{i}"] = reference.gradients(adapter, p, self.dw)
            y_parts.append(composed.change(adapter, p, self.x_patches))
            dx_parts.append(composed.change(adapter, p, self.dy_patches, mirrored=True))
        xp = module_of(total)
        y = xp.tensordot(self.x_patches, total, axes=((1, 2), (0, 1)))
        y += f64(self.layer.bias)
        dx = self._to_dx(total)
        yardstick = {
            "y": ulp(composed.composed(self.base_y, y_parts), y),
            "dx": ulp(composed.composed(self.base_dx, dx_parts), dx),
        }
        return {"y": y, "dx": dx, "grads": grads, "composed": yardstick}

    def errors(self, expected: dict, y, dx, grads) -> dict[str, dict[str, float]]:
        """'y', 'dx', 'grads' in ULP against f64; fails where one is wrong."""
        found = {
            "y": ulp(reference.rows_at(y, self.at), expected["y"]),
            "dx": ulp(reference.rows_at(dx, self.at), expected["dx"]),
        }
        if grads:
            found["grads"] = worst(
                ulp(grads[a]["layer"][factor], right)
                for a, factors in expected["grads"].items()
                for factor, right in factors.items()
            )
        for what, error in found.items():
            assert error["max"] <= MOST_ULP, (
                f"{self.shape.name}: {what} is {error['max']:.2f} ULP from f64, at most {MOST_ULP}"
            )
        return found

    def runs(self, engine: Engine) -> dict:
        """'forward' and 'step' (forward, dx, all factor gradients) of an engine on this input."""

        def step():
            y, pullback = engine.vjp(self.x)
            return y, pullback(self.dy)

        return {"forward": lambda: engine.forward(self.x), "step": step}

    def measure(self, runs: dict, yardstick: dict | None = None) -> dict[str, float]:
        """Microseconds of each run: on a GPU captured (device, device with a warm cache, wall) and
        eager wall; on the CPU wall. yardstick: by label a call (captured, on a GPU) that is timed
        in turns with the run, as 'bare_...'.
        """
        out = {}
        for label, run in runs.items():
            beside = [] if yardstick is None else [yardstick[label]]
            if not self.gpu:
                out[f"{label}_us"] = out[f"{label}_eager_wall_us"] = timing.wall_us(run, False)
                found = [timing.wall_us(other, False) for other in beside]
            else:
                replay = timing.captured(run)
                rounds, walls = [], []
                for _ in range(ROUNDS):  # device and wall in turns too
                    rounds.append(timing.in_turns_us([replay, *beside], 20 // ROUNDS))
                    walls.append(timing.wall_us(replay, True, 0.01))
                out[f"{label}_us"], *found = map(median, zip(*rounds, strict=True))
                out[f"{label}_wall_us"] = median(walls)
                out[f"{label}_warm_us"] = timing.device_us(replay, flush=False)
                out[f"{label}_eager_wall_us"] = timing.wall_us(run, True)
            out.update({f"bare_{label}_us": us for us in found})
        return out
