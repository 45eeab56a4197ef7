"""The bare layer: the same product without adapters, by every library that is there."""

from __future__ import annotations

from . import cudnn_bare, plain, timing
from .case import Case
from .ulp import f64

LIBRARIES = ("cublaslt", "cudnn")


class Bare:
    """The yardsticks of one case: times[library] = {'forward_us', 'step_us', ...}.

    'own' is the project's layer; the yardstick `by` is the faster library's, the project's own only
    where there is none (a convolution without the extra `cudnn`, and on the CPU).
    """

    def __init__(self, case: Case):
        self.case, self.notes = case, {}
        self._runs = {"own": case.runs(case.engine)}
        if case.gpu and case.layer.window.taps == 1:
            self._runs["cublaslt"] = plain.bare(case)
        if case.gpu and case.layer.window.axes and cudnn_bare.available():
            try:
                made = cudnn_bare.bare(case)
                self.notes["cudnn"] = made.pop("plans")
                self._runs["cudnn"] = made
            except Exception as error:  # reported beside the other times, never hidden
                self.notes["cudnn"] = f"failed: {error}"
        self.times = {name: case.measure(runs) for name, runs in self._runs.items()}
        self._check()
        libraries = [name for name in LIBRARIES if name in self.times] or ["own"]
        self.by = {
            label: min(libraries, key=lambda name: self.times[name][f"{label}_us"])
            for label in ("forward", "step")
        }
        self._yardstick = {label: self._runs[name][label] for label, name in self.by.items()}
        if case.gpu:
            self._yardstick = {k: timing.captured(run) for k, run in self._yardstick.items()}

    def _check(self) -> None:
        """Every library's result is the layer's."""
        case = self.case
        for name, runs in self._runs.items():
            y, dx = runs["step"]()
            dx = dx[0] if name == "own" else dx  # and no factor gradients
            base = case.base_y
            if name == "cudnn":  # it adds no bias
                base = base - f64(case.layer.bias)
            case.errors({"y": base, "dx": case.base_dx}, y, dx, None)

    def measure(self) -> dict[str, float]:
        """The yardstick's times once more, to stand in the row of a measurement made beside it."""
        gpu = self.case.gpu
        return {
            f"bare_{label}_us": timing.device_us(run) if gpu else timing.wall_us(run, False)
            for label, run in self._yardstick.items()
        }

    def row(self) -> dict:
        return {
            "shape": self.case.shape.name,
            "by": self.by,
            "times": self.times,
            **{f"{name}_note": note for name, note in self.notes.items()},
        }
