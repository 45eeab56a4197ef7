"""`lycoris-cupy plot`: the log of a run, finished or not, as a picture."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import LycorisError
from ..train.log import read_log
from ..train.plot import plot_runs, require_plot

_EXAMPLES = """examples:
  lycoris-cupy plot run
      writes run/loss.png; the run may still be going on
  lycoris-cupy plot run other-run -o both.svg
"""


def add(commands) -> None:
    """The command's parser."""
    parser = commands.add_parser(
        "plot",
        help="draw the loss and the gradient norm of training runs",
        description="Draw the log of a training run, or of several in one picture.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", type=Path, help="a run's folder, or a log.jsonl"
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        type=Path,
        help="a .png, .svg or .pdf (default: loss.png in the run's folder)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0 when the picture is written."""
    if len({path.resolve() for path in args.runs}) < len(args.runs):
        raise LycorisError("a run was given twice")
    if args.output is None and len(args.runs) > 1:
        raise LycorisError("several runs: say with -o which file to write")
    require_plot()
    output = args.output or (_folder(args.runs[0]) / "loss.png")
    names = [_folder(path).resolve().name for path in args.runs]
    labels = names if len(set(names)) == len(names) else list(map(str, args.runs))
    plot_runs(dict(zip(labels, map(read_log, args.runs), strict=True)), output)
    print(f"wrote {output}")
    return 0


def _folder(run: Path) -> Path:
    return run if run.is_dir() else run.parent
