"""The loop: steps, a log, validation, checkpoints, and going on where a run was stopped.

A page to read and to replace: all it uses is public in `lycoris_cupy.train`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import device_context, to_device
from ..engine import Engine
from ..errors import LycorisError
from ..optim import Average, Optimizer
from .batches import Batches, Given
from .finite import error_of_factors, raise_cause
from .progress import Progress
from .run import Run
from .step import Loss, Reducer, Step


@dataclass
class Result:
    """steps: that were made in all. loss: the mean over the steps of the last line of the log.
    lines: of the log. best: the lowest validation, and after how many steps. stopped: 'done', or
    'early' by patience. path: of the adapter's file.
    """

    steps: int
    loss: float
    lines: list[dict[str, Any]]
    best: tuple[float, int] | None
    stopped: str
    path: Path | None


def fit(
    engine: Engine,
    batches: Callable[[int], Given] | Iterable[Given],
    loss: Loss,
    *,
    name: str,
    optimizer: Optimizer,
    steps: int,
    out: str | Path | None = None,
    resume: bool = False,
    log_every: int = 10,
    checkpoint_every: int | None = None,
    keep: int = 2,
    validate: Callable[[Engine], float] | None = None,
    validate_every: int | None = None,
    patience: int | None = None,
    accumulate: int = 1,
    average: Average | None = None,
    max_norm: float | None = None,
    rng: np.random.Generator | None = None,
    configuration: Mapping[str, Any] | None = None,
    reducer: Reducer | None = None,
    progress: bool = True,
) -> Result:
    """Train the adapter `name` of an engine; its factors are the last step's in the end.

    batches: a function step -> (inputs, targets), tuples of arrays, so that any step can be made
    again; or an iterable of such pairs, which is advanced on resume. The first step is 0. A third
    part, a dict, holds what the adapter reads beside inputs: noise_level (T-LoRA), an array that is
    cut like them, or ranks (DyLoRA), a pair as `draw_block` gives it.
    loss(y, *targets) -> (value, dy), as `Engine.capture_step` takes it; on a GPU a step is a CUDA
    graph, and losses are read every `log_every` steps only. optimizer: over
    `engine.parameters(name)`. average: over its masters; validated and saved in place of them.
    accumulate: pieces a batch is cut into, see Step. max_norm: see `apply_max_norm`; it waits for
    the device at every step. rng: what batches draw from; checkpoints keep its state. reducer: of
    several processes, of which the first alone writes.

    out: a folder for log.jsonl, checkpoints/ and in the end <name>.safetensors; None writes
    nothing. checkpoint_every: steps; one is always made at the end. keep: how many stay. validate:
    engine -> a number, the lower the better, every `validate_every` steps (by default
    checkpoint_every); the best is a checkpoint of its own. patience: stop after so many
    validations without a better one. resume: go on from the newest checkpoint in `out`, bit for bit
    as if there had been no break; without one, begin. configuration: what else decides the numbers,
    such as the seed of the data; a resume with another one, or another base, is refused.

    Raises NonFiniteError, which names step and tensor, at the first NaN or infinity: the engine
    then stands before that step, and checkpoints are from before it.
    """
    validate_every = validate_every or checkpoint_every
    if validate is not None and validate_every is None:
        raise LycorisError("validate was given, but neither validate_every nor checkpoint_every")
    counts = {"steps": steps, "log_every": log_every, "keep": keep, "patience": patience}
    _require_counts(**counts, checkpoint_every=checkpoint_every, validate_every=validate_every)
    with device_context(engine.device), np.errstate(over="ignore", invalid="ignore"):
        step = Step(
            engine, name, loss, optimizer,
            accumulate=accumulate, reducer=reducer, average=average, max_norm=max_norm,
        )  # fmt: skip
        source = Batches(batches, rng)
        own = {"accumulate": accumulate, "max_norm": max_norm, "processes": step.processes}
        run = Run(step, out, steps, keep, {**own, **(configuration or {})})
        done, course = run.resume() if resume else run.begin()
        source.advance(done)
        source.restore(course.batches)
        kept = done, step.snapshot()
        source.mark(done)
        clock = time.perf_counter() - course.seconds
        with run.log(done) as log, Progress(name, steps, done, progress and run.first) as bar:
            while course.goes_on(done, steps, patience):
                step(*source(done))
                done += 1
                bar.step()
                logs = done == steps or done % log_every == 0
                validates = validate and (done == steps or done % (validate_every or steps) == 0)
                saves = done == steps or checkpoint_every and done % checkpoint_every == 0
                if not (logs or validates or saves):
                    continue
                reading = step.meter.look()
                if reading.bad is not None:
                    raise_cause(step, source, *kept, reading.bad)
                course.seconds = time.perf_counter() - clock
                course.batches = source.state()
                if logs:
                    told = {"loss": reading.loss, "grad_norm": reading.grad_norm}
                    log.write(done, course.seconds, **told, lr=rate_of(optimizer))
                    bar.tell(loss=reading.loss)
                    step.meter.clear()
                broken = error_of_factors(done, optimizer.masters) if validates or saves else None
                if broken is not None:
                    raise_cause(step, source, *kept, done - 1, broken)
                if validate and validates:
                    value = run.validated(validate)
                    log.write(done, course.seconds, validation=value)
                    if course.take(value, done):
                        run.save(done, course, "best")
                if saves or not course.goes_on(done, steps, patience):
                    run.save(done, course)
                kept = done, step.snapshot()
                source.mark(done)
        losses = [line["loss"] for line in log.lines if "loss" in line]
        return Result(
            steps=done,
            loss=losses[-1] if losses else float("nan"),
            lines=log.lines,
            best=course.best,
            stopped="done" if done >= steps else "early",
            path=run.finish(done, course),
        )


def rate_of(optimizer: Optimizer) -> float:
    """The learning rate of the last step; of Prodigy with what it has found. Waits for it."""
    step = int(to_device(optimizer.clock(), "cpu")[0]) - 1
    lr: Any = optimizer.lr(step) if callable(optimizer.lr) else optimizer.lr
    found = getattr(optimizer, "d", None)
    return float(lr) if found is None else float(lr) * float(to_device(found, "cpu")[0])


def _require_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and not (isinstance(value, int) and value >= 1):
            raise LycorisError(f"{name} is {value!r}, expected a whole number of at least 1")
