"""The process that trains and times in torch: a JSON line a result on standard output.

python -m benchmarks.restoration.torch_side --task TASK.json [--seconds S]

TASK.json is what `benchmarks.restoration` was asked for. {"section": "runs", ...} is a training
with one seed, {"section": "timings", ...} a way to run a step; either may have "error" instead.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from lycoris_cupy.arrays import DTYPES
from lycoris_cupy.demo.extra import network_files
from lycoris_cupy.demo.ncnn import Network, read_network
from lycoris_cupy.demo.photographs import held_out
from lycoris_cupy.demo.upscaler import build_engine

from .data import Task, decibels, mean_squared_error
from .methods import FINE_TUNING, FINE_TUNING_RATE, METHODS
from .torch_network import TorchNetwork, adapted, tensor
from .torch_training import Trainer

TORCH = "torch"
WAYS = {
    "rebuild": False,
    "bypass": True,
}  # how lycoris-lora runs a change: in the weight, or beside
MODES = ("eager", "graph", "compiled")
WALL_SECONDS = 0.5


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.restoration.torch_side")
    parser.add_argument("--task", type=Path, required=True, help="as the command writes it")
    parser.add_argument("--seconds", type=float, default=1e9, help="start nothing after this")
    options = parser.parse_args()
    # What libraries print must not come between the lines of JSON.
    out, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
    os.dup2(2, 1)
    told = json.loads(options.task.read_text())
    os.environ["LYCORIS_KERNEL_BACKEND"] = told["torch_backend"]
    torch.backends.cudnn.benchmark = True
    for row in Worker(told, time.monotonic() + options.seconds).rows():
        print(json.dumps(row), file=out, flush=True)
    return 0


class Worker:
    """told: task (fields of Task), methods, seeds, device, dtype, modes, torch_backend."""

    def __init__(self, told: dict, deadline: float):
        self.told, self.deadline = told, deadline
        self.task, self.device, self.dtype = Task(**told["task"]), told["device"], told["dtype"]
        self.network: Network = read_network(*network_files())
        self.pictures = held_out(0)
        self.versions = {"version": version("torch"), "lycoris_lora": version("lycoris-lora")}

    def rows(self) -> Iterator[dict]:
        """Each method's times, which need a second or two, then its trainings."""
        for name in [*self.told["methods"], FINE_TUNING]:
            for way in (
                WAYS if name in METHODS and METHODS[name].algorithm != "full" else ["rebuild"]
            ):
                for mode in self.told["modes"]:
                    row = {"section": "timings", "method": name, "way": way, "mode": mode}
                    yield self._tried(row, functools.partial(self._timed, name, way, mode))
            for seed in range(self.told["seeds"]):
                row = {"section": "runs", "method": name, "seed": seed}
                yield self._tried(row, functools.partial(self._trained, name, seed))

    def _tried(self, row: dict, run: Callable[[], dict]) -> dict:
        row = {"side": TORCH, **row, **self.versions}
        if time.monotonic() > self.deadline:
            return {**row, "error": "not run: the time was spent"}
        print(f"torch: {row['method']} {row.get('mode', '')}{row.get('seed', '')}", flush=True)
        start = time.monotonic()
        try:
            row.update(run())
        except Exception as error:  # a peer's failure is a result
            row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            traceback.print_exc()
        return {**row, "seconds": time.monotonic() - start}

    def trainer(
        self, name: str, seed: int, way: str = "rebuild", compiled: bool = False
    ) -> Trainer:
        """A new network with the method on it, before its first step."""
        network = TorchNetwork(self.network).to(self.device)
        if name == FINE_TUNING:
            trained, rate = network, FINE_TUNING_RATE
        else:
            base = build_engine(self.network, "cpu", DTYPES[self.dtype])
            method = METHODS[name]
            rate = method.rate
            trained = adapted(network, method, method.on(base, seed), WAYS[way])
        run = torch.compile(network, dynamic=False) if compiled else network
        rates = self.task.schedule(rate)
        return Trainer(run, trained.parameters(), rates, self.device, self.dtype)

    def moved(self, pairs: list[tuple[np.ndarray, np.ndarray]]) -> list[tuple[torch.Tensor, ...]]:
        """Batches on the device, f32."""
        return [tuple(tensor(a).float().to(self.device) for a in pair) for pair in pairs]

    def _timed(self, name: str, way: str, mode: str) -> dict:
        if mode == "compiled":
            torch._dynamo.reset()
        trainer = self.trainer(name, 0, way, mode == "compiled")
        (low, original), (other, of_other) = self.moved(self.task.training(0)[:2])
        run = functools.partial(trainer.step, other, of_other)
        if self.device == "cpu":
            return {"device": "cpu", "wall_us": _wall_us(run, self.device)}
        if mode == "compiled":
            for _ in range(3):
                run()  # compiles
        if mode != "eager":
            trainer.capture(low, original)
        from ..peers.torch_timing import device_us

        # Eager, the events see the gaps in which the device waits for the host: that is its time.
        row = {"device": "cuda", "device_us": device_us(run), "wall_us": _wall_us(run, "cuda")}
        return {**row, "steps_per_second": 1e6 / row["wall_us"]}

    def _trained(self, name: str, seed: int) -> dict:
        trainer, pairs = self.trainer(name, seed), self.moved(self.task.training(seed))
        row: dict = {"mode": "eager"}
        if self.device != "cpu":
            try:
                trainer.capture(*pairs[0])
                row["mode"] = "graph"
            except RuntimeError as error:  # it waits for the device somewhere: eager does the same
                row["not_captured"] = " ".join(str(error).split())[:200]
        start = time.perf_counter()
        losses, every = [], self.told["log_every"]
        total = torch.zeros((), device=self.device)  # read now and then, as `fit` does
        for step in range(self.task.steps):
            total += trainer.step(*pairs[step % len(pairs)])
            if (step + 1) % every == 0:
                losses.append(float(total) / every)
                total.zero_()
        row |= {"losses": losses, "train_seconds": time.perf_counter() - start}
        return row | {
            "loss": mean_squared_error(trainer, self.task.validation()),
            "decibels": decibels(trainer, self.pictures),
            "parameters": sum(p.numel() for p in trainer.trained),
        }


def _wall_us(run: Callable, device: str) -> float:
    """Microseconds a step, many in a row, the device's end awaited once."""

    def wait():
        if device != "cpu":
            torch.cuda.synchronize()

    run()
    wait()
    start = time.perf_counter()
    run()
    wait()
    repeats = max(2, min(500, int(WALL_SECONDS / max(time.perf_counter() - start, 1e-6))))
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    wait()
    return (time.perf_counter() - start) / repeats * 1e6


if __name__ == "__main__":
    raise SystemExit(main())
