"""What `lycoris-cupy demo` does, from the network's files to the table."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import __version__
from ..engine import Engine
from ..errors import LycorisError
from .checks import Check, merged_checks, reloaded_check
from .extra import NETWORK, network_files
from .ncnn import Network, read_network
from .photographs import (
    bicubic,
    held_out,
    psnr,
    read_picture,
    save_picture,
    training_photographs,
)
from .picture import before_after
from .training import METHODS, train
from .upscaler import build_engine, upscale

CHECKED = 64  # rows and columns of low resolution on which merged and live are compared


@dataclass(frozen=True)
class Trained:
    """One adapter on an engine of its own, and its figures."""

    engine: Engine
    path: Path
    step_ms: float
    checks: list[Check]

    @property
    def parameters(self) -> int:
        (attached,) = self.engine.attachments.values()
        return sum(array.size for p in attached.parameters.values() for array in p.values())


def run(out: Path, steps: int, device: str, seed: int, photo: Path | None) -> list[Check]:
    """Everything; writes into `out` and prints. Returns the checks that do not hold."""
    start = time.perf_counter()
    if steps < 1 or seed < 0:
        raise LycorisError(f"--steps {steps} must be at least 1 and --seed {seed} at least 0")
    own = None if photo is None else (photo.stem, read_picture(photo))
    network = read_network(*network_files())
    pictures, training = held_out(seed), training_photographs()
    base = build_engine(network, device)
    out.mkdir(parents=True, exist_ok=True)
    print(f"{NETWORK} on {base.device}, {steps} steps an adapter", flush=True)
    trained = {}
    for name in METHODS:
        engine = Engine(base.layers, base.topology, device=base.device)
        step_ms = train(engine, name, METHODS[name], training, steps, seed)
        path = out / f"{name.lower()}.safetensors"
        engine.save_adapter(name, path, metadata={"steps": str(steps), "seed": str(seed)})
        trained[name] = Trained(
            engine, path, step_ms, _checks(network, name, engine, path, pictures)
        )
    engines = {"network": base, **{f"+ {name}": one.engine for name, one in trained.items()}}
    lows, originals = zip(*pictures.values(), strict=True)
    upscaled = {"bicubic": [bicubic(low) for low in lows]}
    upscaled |= {label: [upscale(e, low) for low in lows] for label, e in engines.items()}
    columns = {"low resolution": list(lows), **upscaled, "original": list(originals)}
    before_after(out / "before-after.png", columns)
    if own is not None:
        stem, picture = own
        for label, engine in engines.items():
            end = label.removeprefix("+ ").lower()
            save_picture(out / f"{stem}-{end}.png", upscale(engine, picture))
    decibels = {
        label: [psnr(y, original) for y, original in zip(ys, originals, strict=True)]
        for label, ys in upscaled.items()
    }
    seconds = time.perf_counter() - start
    about = (
        f"lycoris_cupy {__version__}, {base.device}, {platform.machine()}, NumPy {np.__version__}"
    )
    about += f"; {steps} steps an adapter, seed {seed}, {seconds:.0f} s."
    table = _table(about, list(pictures), decibels, trained)
    (out / "table.md").write_text(table, encoding="utf-8")
    print(f"\n{table}\nwritten to {out}: before-after.png, table.md and the two adapters")
    return [check for one in trained.values() for check in one.checks if not check.holds]


def _checks(network: Network, name: str, engine: Engine, path: Path, pictures) -> list[Check]:
    low = next(iter(pictures.values()))[0][:CHECKED, :CHECKED]
    reloaded = reloaded_check(engine, name, path)
    return [reloaded, *merged_checks(network, name, path, low, engine.device)]


def _table(
    about: str, names: list[str], decibels: dict[str, list[float]], trained: dict[str, Trained]
) -> str:
    """The results in Markdown."""
    quality = [
        [name, *(f"{values[row]:.2f}" for values in decibels.values())]
        for row, name in enumerate(names)
    ]
    quality.append(["mean", *(f"{np.mean(values):.2f}" for values in decibels.values())])
    figures = [
        [name, f"{t.parameters:,}", f"{t.path.stat().st_size:,}", f"{t.step_ms:.0f}"]
        for name, t in trained.items()
    ]
    checks = [
        [c.what, f"{c.measured:.3g}", f"{c.bound:.3g}", "yes" if c.holds else "NO"]
        for t in trained.values()
        for c in t.checks
    ]
    parts = [
        f"# {NETWORK}, taught to undo scan lines, salt and pepper",
        about,
        "PSNR of photographs that were not trained on, dB:",
        _markdown(["photograph", *decibels], quality),
        _markdown(["adapter", "parameters", "file, bytes", "ms a step"], figures),
        _markdown(["check", "measured", "at most", "holds"], checks),
    ]
    return "\n\n".join(parts) + "\n"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    padded = ([cell.ljust(n) for cell, n in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)
