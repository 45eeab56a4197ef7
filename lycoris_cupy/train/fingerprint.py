"""What a run is made of, so that it is never continued with something else."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..arrays import to_device
from ..engine import Engine
from ..errors import LycorisError
from ..optim import Average, Optimizer
from ..optim.nested import items

# A run may be continued with these changed: more steps, or other machines.
FREE = ("steps", "processes")
_SHOWN = 4  # differences


def base_fingerprint(engine: Engine, name: str) -> str:
    """SHA-256, as hexadecimal digits, of all that is frozen: the layers and the adapters beside
    `name`, their strengths, names, shapes, dtypes and bytes.
    """
    digest = hashlib.sha256()
    frozen = {
        f"{layer}\0{what}": array
        for layer, one in engine.layers.items()
        for what, array in (("weight", one.weight), ("bias", one.bias))
        if array is not None
    }
    for other, attached in engine.attachments.items():
        if other != name:
            frozen |= {
                f"{other}\0{layer}\0{factor}\0{attached.strength}": array
                for layer, factor, array in items(attached.parameters)
            }
    for key, array in sorted(frozen.items()):
        host = to_device(array, "cpu")
        digest.update(f"{key}\0{host.dtype}\0{host.shape}\0".encode())
        digest.update(memoryview(host.reshape(-1).view(np.uint8)))
    return digest.hexdigest()


def configuration_of(
    engine: Engine, name: str, optimizer: Optimizer, average: Average | None, **more: Any
) -> dict[str, Any]:
    """What decides a run's numbers, as text and numbers: the adapter, the optimizer, the average.

    A schedule is known by its rates at some steps. more: the loop's own settings.
    """
    adapters = engine.attachments[name].adapters
    parts: dict[str, Any] = {
        "adapter": {
            layer: f"{adapter.title} {_sizes(engine.parameters(name)[layer])}"
            for layer, adapter in adapters.items()
        },
        "strength": engine.strength[name],
        "dropout": str(engine.attachments[name].dropout),
        "dtype": str(engine.dtype),
        "optimizer": described(optimizer),
        "average": None if average is None else described(average),
    }
    return parts | more


def described(thing: Any) -> dict[str, Any]:
    """The class of an optimizer or an average, and its public settings."""
    out: dict[str, Any] = {"class": type(thing).__name__}
    for key, value in vars(thing).items():
        if key == "lr" and callable(value):
            schedule: Any = value
            value = [float(schedule(step)) for step in (0, 1, 10, 100, 1000, 10000)]
        if isinstance(value, (bool, int, float, str, tuple, list, type(None))) and key[0] != "_":
            out[key] = list(value) if isinstance(value, tuple) else value
    return out


def require_same_run(kept: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Raise LycorisError, naming what differs, unless a checkpoint may be continued like this."""
    before, after = flat(kept), flat(now)
    names = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    changed = [key for key in names if key.split(".")[-1] not in FREE]
    if not changed:
        return
    told = [f"{k} was {_short(before, k)}, is {_short(after, k)}" for k in changed[:_SHOWN]]
    more = f", and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
    raise LycorisError(
        f"{where} was made with another configuration: {'; '.join(told)}{more}: "
        "resume with the old one, or start anew in another folder"
    )


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, its keys joined by dots."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + str(key)] = value
    return out


def _short(values: Mapping[str, Any], key: str) -> str:
    text = repr(values[key]) if key in values else "not there"
    return text if len(text) <= 80 else text[:77] + "..."


def _sizes(factors: Mapping[str, Any]) -> str:
    return " ".join(f"{n}{tuple(p.shape)}".replace(" ", "") for _, n, p in items({"": factors}))
