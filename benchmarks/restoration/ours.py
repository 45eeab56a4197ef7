"""The project's side: a method trained by `lycoris_cupy.train.fit`, and the times of its step."""

from __future__ import annotations

import functools
import statistics
import time
from pathlib import Path

from lycoris_cupy.arrays import to_device
from lycoris_cupy.engine import Engine
from lycoris_cupy.losses import mse
from lycoris_cupy.optim import AdamW
from lycoris_cupy.train import fit

from ..timing import device_us, wall_us
from .data import Task, decibels, mean_squared_error
from .methods import ADAPTER, Method


class OnHost:
    """An engine whose forward gives NumPy arrays."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def forward(self, low):
        return to_device(self.engine.forward(low), "cpu")


def optimizer_of(engine: Engine, method: Method, task: Task) -> AdamW:
    return AdamW(engine.parameters(ADAPTER), task.schedule(method.rate), weight_decay=0.0)


def trained(base: Engine, method: Method, seed: int, task: Task, log_every: int):
    """(engine, row): a new adapter on the layers of `base`, trained from its first step on."""
    engine = method.on(base, seed)
    pairs = [tuple(to_device(a, base.device) for a in pair) for pair in task.training(seed)]
    engine.warmup(pairs[0][0])  # kernels compile side by side, and before the clock
    start = time.perf_counter()
    result = fit(
        engine,
        lambda step: tuple((array,) for array in pairs[step % len(pairs)]),
        mse,
        name=ADAPTER,
        optimizer=optimizer_of(engine, method, task),
        steps=task.steps,
        log_every=log_every,
        progress=False,
    )
    seconds = time.perf_counter() - start
    return engine, {
        "mode": "graph" if base.device != "cpu" else "eager",
        "losses": [line["loss"] for line in result.lines],
        "train_seconds": seconds,
        "parameters": sum(
            array.size for p in engine.parameters(ADAPTER).values() for array in p.values()
        ),
    }


def tested(engine: Engine, task: Task, pictures: dict) -> dict:
    """The final loss, and the decibels of photographs that were not trained on."""
    network = OnHost(engine)
    return {
        "loss": mean_squared_error(network, task.validation()),
        "decibels": decibels(network, pictures),
    }


def file_bytes(engine: Engine, path: Path, **metadata: str) -> int:
    """The size of the adapter's file, which is written."""
    engine.save_adapter(ADAPTER, path, metadata=metadata)
    return path.stat().st_size


def timed(base: Engine, method: Method, task: Task, repeats: int) -> dict:
    """A step as `Engine.capture_step` makes it, batches on the device, the loss never read.

    On a GPU it is one CUDA graph: a wait for the device inside it would have failed the capture. On
    the CPU the median of `repeats` steps.
    """
    engine = method.on(base, 0)
    first, second = ([to_device(a, base.device) for a in pair] for pair in task.training(0)[:2])
    optimizer = optimizer_of(engine, method, task)
    step = engine.capture_step(ADAPTER, mse, optimizer, *first[:1], targets=first[1:])
    run = functools.partial(step, *second)
    row = {"way": "", "mode": "graph" if base.device != "cpu" else "eager"}
    if base.device == "cpu":
        run()
        spent = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            spent.append(time.perf_counter() - start)
        return {**row, "device": "cpu", "wall_us": statistics.median(spent) * 1e6}
    row |= {"device": "cuda", "device_us": device_us(run), "wall_us": wall_us(run, True, 0.5)}
    return {**row, "steps_per_second": 1e6 / row["wall_us"]}
