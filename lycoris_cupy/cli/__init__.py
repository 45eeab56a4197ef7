"""The command line: one file a command, listed in COMMANDS.

A command's file has `add(commands)`, which adds its parser with a function of the parsed arguments
as `run`; it returns the exit code. Exit codes: 0 done, 1 the file holds something that is not
understood (inspect) or the files differ (diff), 2 an error, said in one line on stderr, 130
interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys

from .. import __version__
from ..errors import LycorisError
from . import convert, demo, diff, extract, inspect, merge, plot, resize, train

COMMANDS = (inspect, diff, convert, resize, extract, merge, train, plot, demo)

_EXAMPLES = """examples:
  lycoris-cupy inspect style.safetensors
      what the file holds and what looks wrong; --base MODEL says what it would change there
  lycoris-cupy diff a.safetensors b.safetensors
  lycoris-cupy convert style.safetensors out.safetensors --to kohya --part unet
      the same adapter in the names of another program
  lycoris-cupy resize style.safetensors small.safetensors --energy 0.99
  lycoris-cupy extract base.safetensors tuned.safetensors style.safetensors --rank 16
  lycoris-cupy merge model.safetensors style.safetensors:0.8 -o merged.safetensors
  lycoris-cupy train --example train.toml
      a commented configuration; lycoris-cupy train train.toml trains an adapter as it says
  lycoris-cupy demo
      a small network, adapted, trained and merged on this machine
lycoris-cupy COMMAND --help has more for each.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line with these arguments (sys.argv's by default); the exit code."""
    try:
        args = make_parser().parse_args(arguments)
        code = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of our output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (LycorisError, OSError) as error:
        print(f"lycoris-cupy: error: {_text(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lycoris-cupy: interrupted", file=sys.stderr)
        return 130


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        "lycoris-cupy",
        description="LyCORIS weight adapters without torch: inspect, convert, resize, extract, "
        "merge and train them.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lycoris-cupy {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    return parser


def _text(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)
