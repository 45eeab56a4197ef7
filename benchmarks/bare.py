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
        case.engine.warmup(case.x)
        self._runs = {"own": case.runs(case.engine)}
        y, (dx, _) = self._runs["own"]["step"]()
        self._check(y, dx, case.base_y)
        if case.gpu and case.layer.window.taps == 1:
            self._runs["cublaslt"] = plain.bare(case)
            self._check(*self._runs["cublaslt"]["step"](), case.base_y)
        if case.gpu and case.layer.window.axes and cudnn_bare.available():
            try:
                made = cudnn_bare.bare(case)
                self.notes["cudnn"] = made.pop("plans")
                self._check(*made["step"](), case.base_y - f64(case.layer.bias))  # it adds none
                self._runs["cudnn"] = made
            except Exception as error:  # stands in the shape's row, never hidden
                self.notes["cudnn"] = f"failed: {error}"
        self.times = {name: case.measure(runs) for name, runs in self._runs.items()}
        libraries = [name for name in LIBRARIES if name in self.times] or ["own"]
        self.by = {
            label: min(libraries, key=lambda name: self.times[name][f"{label}_us"])
            for label in ("forward", "step")
        }
        # What a layer with adapters is timed in turns with.
        self.yardstick = {label: self._runs[name][label] for label, name in self.by.items()}
        if case.gpu:
            self.yardstick = {k: timing.captured(run) for k, run in self.yardstick.items()}

    def _check(self, y, dx, right) -> None:
        """Every library's result is the layer's."""
        self.case.errors({"y": right, "dx": self.case.base_dx}, y, dx, None)

    def row(self) -> dict:
        return {
            "shape": self.case.shape.name,
            "by": self.by,
            "times": self.times,
            **{f"{name}_note": note for name, note in self.notes.items()},
        }
