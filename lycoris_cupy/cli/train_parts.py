"""What a configuration of `lycoris-cupy train` stands for: network, batches, loss, optimizer."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import losses
from ..arrays import wide_dtype
from ..demo.extra import NETWORK, network_files
from ..engine import Engine
from ..errors import LycorisError
from ..optim import Optimizer, constant, cosine, linear, rate_factors
from .named import called, function_named, guarded
from .pictures import damaged_pictures, picture_pairs
from .train_config import OPTIMIZERS, Configuration

LOSSES = ("mse", "l1", "charbonnier", "cross_entropy")
DEMO = "demo"
_VALIDATED = 4  # batches of held out pictures


def engine_of(config: Configuration, device: str) -> Engine:
    """The network on a device, without an adapter."""
    table, where = config["network"], config.where("network", "source")
    source, dtype = table["source"], table["dtype"]
    if source == NETWORK or source.endswith(".param"):
        from ..demo.ncnn import read_network
        from ..demo.upscaler import build_engine

        own = config.near(source), config.near(source).with_suffix(".bin")
        return build_engine(
            read_network(*(network_files() if source == NETWORK else own)), device, dtype
        )
    if ":" not in source:
        raise LycorisError(
            f"{where} is {source!r}, expected {NETWORK!r}, a .param, or 'module:function'"
        )
    function = function_named(source, config.path.parent, where)
    takes = inspect.signature(function).parameters
    offered = {"device": device, "dtype": dtype}
    given = {key: value for key, value in offered.items() if key in takes}
    made = called(function, {**given, **table["options"]}, where)
    if isinstance(made, Engine):
        if made.device == device:
            return made
        return Engine(made.layers, made.topology, device=device, dtype=made.dtype)
    layers, topology = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(layers, dict) or not (topology is None or callable(topology)):
        raise LycorisError(
            f"{where}: {source} returns {type(made).__name__}, expected an Engine, its layers, or "
            "(layers, topology)"
        )
    return Engine(layers, topology, device=device, dtype=dtype)


def batches_of(config: Configuration, dtype) -> tuple[Any, list | None]:
    """(batches, as `fit` takes them; those of validation, or None) for a network of this dtype."""
    data = config["data"]
    if data["batches"] is not None:
        return _own_batches(config)
    folder = None if data["pictures"] in (None, DEMO) else config.near(data["pictures"])
    if data["pairs"] is not None:
        draw, pictures = picture_pairs(config.near(data["pairs"]), data["patch"])
    else:
        draw, pictures = damaged_pictures(folder, data["patch"])
    seed = config[""]["seed"]
    count = min(math.ceil(data["held_out"] * len(pictures)), len(pictures) - 1)
    order = np.random.default_rng([seed, 1]).permutation(len(pictures))
    held, kept = ([pictures[i] for i in sorted(part)] for part in (order[:count], order[count:]))

    def made(pictures: list, *number: int):
        rng = np.random.default_rng([seed, *number])
        x, target = draw(pictures, data["batch"], data["patch"], rng)
        return (x,), (target.astype(wide_dtype(dtype)),)

    validation = [made(held, 3, i) for i in range(_VALIDATED)] if held else None
    return lambda step: made(kept, 2, step), validation


def loss_of(config: Configuration) -> Callable:
    """loss(y, *targets) -> (value, dy)."""
    name, where = config["train"]["loss"], config.where("train", "loss")
    if name in LOSSES:
        return getattr(losses, name)
    if ":" not in name:
        raise LycorisError(
            f"{where} is {name!r}, expected one of {', '.join(LOSSES)}, or 'module:function'"
        )
    return guarded(function_named(name, config.path.parent, where), where)


def optimizer_of(config: Configuration, parameters, steps: int) -> Optimizer:
    """The optimizer over an engine's parameters."""
    table, where = config["optimizer"], config.where("optimizer")
    kind = OPTIMIZERS[table["kind"]]
    lr = table["lr"]
    if lr is None:
        lr = inspect.signature(kind).parameters["lr"].default
    settings = dict(config.settings)
    settings |= {k: table[k] for k in ("weight_decay", "clip") if table[k] is not None}
    if table["stochastic_rounding"]:
        settings["seed"] = config[""]["seed"]
    try:
        if table["schedule"] != "constant":
            schedule = {"linear": linear, "cosine": cosine}[table["schedule"]]
            lr = schedule(lr, steps, table["warmup"], table["end"])
        elif table["warmup"]:
            lr = constant(lr, table["warmup"])
        rates = rate_factors(parameters, table["rates"], table["plus"])
        return kind(parameters, lr, rates=rates, **settings)
    except LycorisError as error:
        raise type(error)(f"{where} {error}") from None


def _own_batches(config: Configuration) -> tuple[Any, list | None]:
    data, folder = config["data"], config.path.parent
    where = config.where("data", "batches")
    batches = called(function_named(data["batches"], folder, where), data["options"], where)
    if not callable(batches) and not hasattr(batches, "__iter__"):
        raise LycorisError(
            f"{where}: {data['batches']} returns {type(batches).__name__}, expected a function of "
            "the step or an iterable"
        )
    batches = guarded(batches, where) if callable(batches) else batches
    if data["validation"] is None:
        return batches, None
    where = config.where("data", "validation")
    return batches, list(called(function_named(data["validation"], folder, where), {}, where))
