"""What belongs to a run beside its steps: the folder, checkpoints, and who of several writes.

log.jsonl, checkpoints/step-00000100, checkpoints/best-00000080, <name>.safetensors
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import f64, to_device
from ..engine import Engine
from ..errors import LycorisError
from ..io.atomic import require_place
from ..optim.nested import Nested
from .checkpoint import Checkpoints, read_state
from .course import Course
from .fingerprint import base_fingerprint, configuration_of, require_same_run
from .log import NAME, Log
from .metadata import training_metadata
from .step import Step

CHECKPOINTS = "checkpoints"


class Run:
    """out: the folder, or None: then nothing is written. keep: how many periodic checkpoints stay.
    configuration: what decides the numbers, beside the adapter and the optimizer.
    """

    def __init__(
        self,
        step: Step,
        out: str | Path | None,
        steps: int,
        keep: int,
        configuration: Mapping[str, Any],
    ):
        self.step, self.steps = step, steps
        self.first = step.rank == 0  # of several processes this one writes and shows
        self.out = None if out is None else Path(out)
        self._checkpoints = None if out is None else Checkpoints(Path(out) / CHECKPOINTS, keep)
        self._base, self._configuration = "", dict(configuration)
        if out is not None:
            self._base = base_fingerprint(step.engine, step.name)
            self._configuration = configuration_of(
                step.engine, step.name, step.optimizer, step.average, **configuration
            )

    def begin(self) -> tuple[int, Course]:
        """Make the folder. Raises LycorisError if a run is in it already."""
        if self.out is not None and self._checkpoints is not None and self.first:
            if (self.out / NAME).exists() or self._checkpoints.latest() is not None:
                raise LycorisError(
                    f"{self.out}: holds a run already: resume it, or choose another folder"
                )
            self._make()
        return 0, Course()

    def resume(self) -> tuple[int, Course]:
        """Go to the newest checkpoint, if there is one: how many steps are done, and their course.

        Raises LycorisError if it is of another configuration or another base.
        """
        path = None if self._checkpoints is None else self._checkpoints.latest()
        if self._checkpoints is None or path is None:
            if self.first and self.out is not None:
                self._make()
            return 0, Course()
        if self.first:
            self._checkpoints.sweep()
        state = read_state(path, self.step.engine.device)
        require_same_run(state["configuration"], self._configuration, str(path))
        if state["base"] != self._base:
            raise LycorisError(
                f"{path}: was trained on another base: the fingerprint of its weights is "
                f"{state['base'][:12]}, that of this network's {self._base[:12]}: resume on the "
                "weights it was begun on"
            )
        self.step.restore(state["training"])
        return state["step"], Course(**state["course"])

    def log(self, done: int) -> Log:
        """The log, from this step on."""
        return Log(self.out if self.first else None, done)

    def save(self, done: int, course: Course, kind: str = "step") -> None:
        """Write a checkpoint."""
        if self._checkpoints is None or not self.first:
            return
        state = {
            "step": done,
            "base": self._base,
            "configuration": self._configuration,
            "course": asdict(course),
            "training": self.step.snapshot(),
        }
        self._checkpoints.save(done, state, lambda path: self._save(path, done, course), kind)

    def finish(self, done: int, course: Course) -> Path | None:
        """Write the adapter's own file, and the last checkpoint where a kill came before it: behind
        the best one of the same step, or before the one that is too many was gone.
        """
        if self.out is None or not self.first:
            return None
        self.save(done, course)
        path = self.out / f"{self.step.name}.safetensors"
        self._save(path, done, course)
        return path

    def validated(self, validate: Callable[[Engine], float]) -> float:
        """What the first process finds, with the factors in the engine that would be saved."""
        value = np.zeros(1, f64)
        if self.first:
            with self._evaluated():
                value += float(validate(self.step.engine))
        if self.step.reducer is None:
            return float(value[0])
        shared = to_device(value, self.step.engine.device)
        self.step.reducer.mean(shared)  # of the others' zeros
        return float(shared[0]) * self.step.processes

    @contextmanager
    def _evaluated(self) -> Iterator[None]:
        """Within it the engine has the average in place of the factors, if there is one."""
        step = self.step
        values = evaluated_values(step)
        try:
            if values is not step.optimizer.masters:
                step.engine.set_parameters(step.name, values)
            yield
        finally:
            if values is not step.optimizer.masters:
                step.engine.set_parameters(step.name, step.optimizer.masters)

    def _save(self, path: Path, done: int, course: Course) -> None:
        step = self.step
        facts = {
            "step": done,
            "steps": self.steps,
            "best": course.best,
            "base": self._base,
            "configuration": self._configuration,
        }
        adapters = step.engine.attachments[step.name].adapters
        notes = training_metadata(step.name, adapters, step.optimizer, facts)
        with self._evaluated():
            step.engine.save_adapter(step.name, path, metadata=notes)

    def _make(self) -> None:
        assert self.out is not None
        require_place(self.out)
        self.out.mkdir(exist_ok=True)


def evaluated_values(step: Step) -> Nested:
    """The average, or what an optimizer that averages by itself offers, or the masters."""
    if step.average is not None:
        return step.average.values
    return getattr(step.optimizer, "averaged", step.optimizer.masters)
