"""`lycoris-cupy diff`: two adapter files layer by layer."""

from __future__ import annotations

import argparse
import json

from ..io.alpha import SOURCES
from ..io.diff import diff_files
from .progress import Bar

_EXAMPLES = """What is compared is each layer's change, scale included: 'same' is bit for bit,
'equal' the same change from other factors, 'changed' comes with |B - A| / |A|. Files may be in
different dialects. The exit code is 0 if both do the same, 1 if not.

examples:
  lycoris-cupy diff step-1000.safetensors step-2000.safetensors
  lycoris-cupy diff lokr.safetensors lora.safetensors --base model.safetensors
      how far a conversion is from what it was made of
  lycoris-cupy diff a.safetensors b.safetensors --json | jq '.layers[] | select(.what=="changed")'
"""


def add(commands) -> None:
    """The command's parser."""
    parser = commands.add_parser(
        "diff",
        help="compare two adapter files layer by layer",
        description="Compare two adapter files layer by layer.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option("a", metavar="A", help="an adapter file of any dialect, or PEFT's folder")
    option("b", metavar="B", help="another")
    option("--base", metavar="MODEL", help="the checkpoint both are for")
    option("--alpha-from", choices=SOURCES, help="the one source of alpha to believe")
    option("--json", action="store_true", help="the same as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0 if both do the same, 1 if not."""
    with Bar("comparing") as bar:
        found = diff_files(args.a, args.b, args.base, alpha_from=args.alpha_from, progress=bar)
    print(json.dumps(found.as_dict(), indent=1) if args.json else found.text())
    return 0 if found.same else 1
