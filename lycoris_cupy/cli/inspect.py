"""`lycoris-cupy inspect`: what an adapter file holds."""

from __future__ import annotations

import argparse
import json

from ..io.adapter_file import inspect_adapter

_EXAMPLES = """examples:
  lycoris-cupy inspect style.safetensors
  lycoris-cupy inspect style.safetensors --json | jq .layers[0]
"""


def add(commands) -> None:
    """The command's parser."""
    parser = commands.add_parser(
        "inspect",
        help="say what an adapter file holds",
        description="Say what a file holds; the exit code is 1 if not all of it is understood.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "file", metavar="FILE", help="a safetensors file with LyCORIS or kohya names"
    )
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0, or 1 if not all of the file is understood."""
    report = inspect_adapter(args.file)
    print(json.dumps(report.as_dict(), indent=1) if args.json else report.text())
    return 1 if report.unmatched or not report.layers else 0
