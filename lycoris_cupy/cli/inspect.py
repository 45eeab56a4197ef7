"""`lycoris-cupy inspect`: what an adapter file holds, and what it would do to a model."""

from __future__ import annotations

import argparse
import json

from ..adapters.oft import READINGS
from ..io.alpha import SOURCES
from ..io.atomic import require_other
from ..io.inspection import inspect_file
from ..io.page import write_page
from ..io.source import files_read
from .progress import Bar

_EXAMPLES = """|dW| is the Frobenius norm of a layer's change at strength 1. The effective rank is
the exponential of the entropy of its singular values (Roy and Vetterli 2007). Both come from the
factors: the change is not built. The exit code is 1 if not all of the file is understood, or, with
--base, matched.

examples:
  lycoris-cupy inspect style.safetensors
      algorithm, rank, scale and where it comes from, norm, what looks wrong, layer by layer
  lycoris-cupy inspect style.safetensors --base model.safetensors
      which layers it would change, by how much, and why others are not found
  lycoris-cupy inspect style.safetensors --html style.html
      one page with charts of norms and spectra
  lycoris-cupy inspect style.safetensors --json | jq '.layers[] | select(.notes != [])'
"""


def add(commands) -> None:
    """The command's parser."""
    parser = commands.add_parser(
        "inspect",
        help="say what an adapter file holds, and what looks wrong",
        description="Say what an adapter file holds, and what it would do to a model.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option("file", metavar="FILE", help="an adapter file of any dialect, or PEFT's folder")
    option("--base", metavar="MODEL", help="the checkpoint it is for, safetensors")
    option("--json", action="store_true", help="the same as JSON, with the spectra")
    option("--html", metavar="OUT", help="write one self-contained page with charts")
    option("--alpha-from", choices=SOURCES, help="the one source of alpha to believe")
    option(
        "--dialect",
        choices=READINGS,
        help="whose rotations the file holds, where it allows several readings",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0, or 1 if not all of the file is understood."""
    if args.html:
        require_other(args.html, files_read(args.file, args.base))
    with Bar("inspecting") as bar:
        found = inspect_file(
            args.file, args.base, alpha_from=args.alpha_from, dialect=args.dialect, progress=bar
        )
    if args.html:
        write_page(args.html, found)
    if args.json:
        print(json.dumps(found.as_dict(), indent=1))
    elif args.html:
        print(f"{found.report.summary()}\nwrote {args.html}")
    else:
        print(found.text())
    return 1 if found.report.unmatched or not found.figures else 0
