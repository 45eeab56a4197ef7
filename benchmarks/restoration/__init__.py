"""Adapters that teach a trained network to undo damage that it does not know, and the same training
in torch with lycoris-lora beside it.

    python -m benchmarks.restoration --out DIR [--torch]
    python -m benchmarks.restoration.table [FILE]

The network, the photographs and the damage (scan lines, 6 % of salt and pepper) are those of
`lycoris-cupy demo`, from the packages of the extra `demo`; --torch needs the extra `peer` too.
DIR gets restoration.json, written anew after every result, table.md, crops.png and the adapters.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lycoris_cupy.errors import LycorisError

from .methods import METHODS


def main() -> int:
    """0; 1 if a target was missed, or what was asked for failed; 2 if it cannot start."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.restoration", description=__doc__.split("\n\n")[0]
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder for what comes out")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU, if any")
    add("--algorithms", default=",".join(METHODS), help=f"of {','.join(METHODS)}")
    add("--steps", type=int, default=1000, metavar="N", help="of a training (1000)")
    add("--seeds", type=int, default=3, metavar="N", help="trainings of an algorithm (3)")
    add("--patches", type=int, default=16, metavar="N", help="of 32 x 32 pixels a step (16)")
    add("--rate-factor", type=float, default=1.0, metavar="F", help="times every rate (1)")
    add("--cpu-steps", type=int, default=3, metavar="N", help="timed on the CPU (3); 0: none")
    add("--torch", action="store_true", help="the same trainings in torch with lycoris-lora")
    add(
        "--again",
        choices=("project", "torch"),
        help="keep what DIR has of the same task, and run one side's part of --algorithms anew",
    )
    add(
        "--torch-modes",
        default="eager,graph",
        help="ways to time its step, of eager,graph,compiled (eager,graph); compiling is slow",
    )
    add(
        "--torch-backend",
        default="torch",
        help="LYCORIS_KERNEL_BACKEND: torch, or auto for its fused kernels, which tune first",
    )
    add("--seconds", type=float, default=1e9, metavar="S", help="start nothing after so long")
    options = parser.parse_args()
    options.torch |= options.again == "torch"
    chosen = options.algorithms.split(",")
    if unknown := [name for name in chosen if name not in METHODS]:
        parser.error(f"--algorithms: {unknown[0]!r} is unknown: use {', '.join(METHODS)}")
    modes = options.torch_modes.split(",")
    if unknown := [mode for mode in modes if mode not in ("eager", "graph", "compiled")]:
        parser.error(f"--torch-modes: {unknown[0]!r} is unknown: use eager, graph, compiled")
    for name in ("steps", "seeds", "patches"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}, expected at least 1")
    if not 0 < options.rate_factor < float("inf"):
        parser.error(f"--rate-factor is {options.rate_factor}, expected a number above 0")
    from .run import run

    try:
        return run(options, chosen, modes)
    except (LycorisError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
