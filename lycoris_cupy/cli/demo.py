"""`lycoris-cupy demo`: a small network, adapted, trained and merged on this machine."""

from __future__ import annotations

import argparse

from ..demo import add_arguments
from ..demo import main as run_demo


def add(commands) -> None:
    """The command's parser."""
    parser = commands.add_parser(
        "demo",
        help="adapt, train and merge a small network on this machine",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """What the demo returns."""
    return run_demo(args)
