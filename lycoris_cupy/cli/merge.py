"""`lycoris-cupy merge`: adapters added to the weights of a checkpoint."""

from __future__ import annotations

import argparse
import os

from ..adapters import RULES
from ..adapters.oft import READINGS
from ..io.merge import merge_files
from ..ops.squares import AXES
from .progress import Bar

_EXAMPLES = """The result has the names, dtypes and metadata of BASE. Every
module of an adapter must find its layer, or nothing is written; --no-strict merges those that do
and lists the others. The output may be BASE itself: it is replaced only when the new file is whole.

examples:
  lycoris-cupy merge model.safetensors style.safetensors --strength 0.8 -o merged.safetensors
  lycoris-cupy merge model.safetensors peft-folder:0.8 -o merged.safetensors
  lycoris-cupy merge model.safetensors style.safetensors:0.8 pose.safetensors:-1 -o out.safetensors
  lycoris-cupy merge merged.safetensors style.safetensors:-0.8 -o back.safetensors
      takes it out again, up to rounding
"""


def add(commands) -> None:
    """The command's parser."""
    parser = commands.add_parser(
        "merge",
        help="add adapters to the weights of a checkpoint",
        description="Add adapters to a checkpoint: W + strength * scale * change, rounded once.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("base", metavar="BASE", help="a checkpoint, safetensors")
    parser.add_argument(
        "adapters",
        metavar="ADAPTER[:STRENGTH]",
        nargs="+",
        help="adapter files; one may come twice",
    )
    parser.add_argument("-o", "--output", metavar="OUT", required=True, help="the file to write")
    parser.add_argument(
        "--strength", type=float, default=1.0, help="of adapters without their own (default 1)"
    )
    parser.add_argument(
        "--no-strict",
        action="store_true",
        help="leave out modules that match no layer, and list them",
    )
    parser.add_argument(
        "--rule",
        choices=RULES,
        default="base",
        help="what a strength means where programs differ (DoRA, rotations): 'base' blends from "
        "the model, so that 0 is the model; 'reference' is LyCORIS's own (default base)",
    )
    parser.add_argument(
        "--dora",
        choices=AXES,
        help="what magnitudes belong to, where their shape allows both and no metadata says it",
    )
    parser.add_argument(
        "--dialect",
        choices=READINGS,
        help="whose rotations a file holds, where it allows several readings",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0 when the merged file is in place."""
    adapters = [with_strength(text, args.strength) for text in args.adapters]
    with Bar("merging", "B") as bar:
        reports = merge_files(
            args.base,
            adapters,
            args.output,
            strict=not args.no_strict,
            progress=bar,
            dora=args.dora,
            rule=args.rule,
            dialect=args.dialect,
        )
    for (_, strength), report in zip(adapters, reports, strict=True):
        print(f"{report.summary()}, at strength {strength:g}")
        for entry in report.unmatched:
            print(f"  left out: {entry}")
    print(f"wrote {args.output}")
    return 0


def with_strength(text: str, default: float) -> tuple[str, float]:
    """(path, strength) of 'path:strength' or of a path alone."""
    path, colon, strength = text.rpartition(":")
    if colon and path and not os.path.exists(text):
        try:
            return path, float(strength)
        except ValueError:
            pass  # a colon in a name, or a drive letter
    return text, default
