"""`lycoris-cupy demo`: a trained super-resolution network learns to undo damage it has never seen.

The network and the photographs come with the packages of the extra `demo`; nothing is downloaded.
This file is the command. What runs is in `run`, which may import those packages.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lycoris-cupy demo`."""
    add = parser.add_argument
    out = Path("demo-out")
    add("--out", type=Path, default=out, metavar="DIR", help=f"for the results (default: {out})")
    add(
        "--steps",
        type=int,
        default=100,
        metavar="N",
        help="training steps an adapter (default: 100)",
    )
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto, the default, takes a GPU if there is one",
    )
    add("--seed", type=int, default=0, metavar="N", help="of patches, damage and adapters")
    add("--photo", type=Path, metavar="FILE", help="a picture of your own to upscale too")


def main(args: argparse.Namespace) -> int:
    """0, or 1 if a check does not hold; all is written before. LycorisError if it cannot start."""
    from .extra import require_extra

    require_extra()
    from .run import run

    failed = run(args.out, args.steps, args.device, args.seed, args.photo)
    for check in failed:
        print(f"lycoris-cupy: error: {check}", file=sys.stderr)
    return 1 if failed else 0
