"""The command line: inspect an adapter file, merge adapters into a checkpoint, run the demo.

Exit codes: 0 done, 1 the file holds something that is not understood (inspect), 2 an error, said in
one line on stderr, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from . import __version__
from .demo import add_arguments
from .demo import main as run_demo
from .errors import LycorisError
from .io.adapter_file import inspect_adapter
from .io.merge import merge_files

_EXAMPLES = """examples:
  lycoris-cupy inspect style.safetensors
      what the file holds: algorithm, rank, scale and where it comes from, layer by layer
  lycoris-cupy inspect style.safetensors --json | jq .layers[0]
  lycoris-cupy merge model.safetensors style.safetensors -o merged.safetensors
  lycoris-cupy merge model.safetensors style.safetensors:0.8 pose.safetensors:-1 -o out.safetensors
  lycoris-cupy demo
      a small network, adapted, trained and merged on this machine
"""

_MERGE_EXAMPLES = """The result has the names, dtypes and metadata of BASE. Every
module of an adapter must find its layer, or nothing is written; --no-strict merges those that do
and lists the others. The output may be BASE itself: it is replaced only when the new file is whole.

examples:
  lycoris-cupy merge model.safetensors style.safetensors --strength 0.8 -o merged.safetensors
  lycoris-cupy merge model.safetensors style.safetensors:0.8 pose.safetensors:-1 -o out.safetensors
  lycoris-cupy merge merged.safetensors style.safetensors:-0.8 -o back.safetensors
      takes it out again, up to rounding
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line with these arguments (sys.argv's by default); the exit code."""
    try:
        args = _parser().parse_args(arguments)
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


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "lycoris-cupy",
        description="LoCon, LoHa, LoKr and Full weight adapters without torch.",
        epilog=_EXAMPLES,
        formatter_class=form,
    )
    parser.add_argument("--version", action="version", version=f"lycoris-cupy {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    inspect = commands.add_parser(
        "inspect",
        help="say what an adapter file holds",
        description="Say what a file holds; the exit code is 1 if not all of it is understood.",
    )
    inspect.add_argument(
        "file", metavar="FILE", help="a safetensors file with LyCORIS or kohya names"
    )
    inspect.add_argument("--json", action="store_true", help="the same as JSON")
    inspect.set_defaults(run=_inspect)

    merge = commands.add_parser(
        "merge",
        help="add adapters to the weights of a checkpoint",
        description="Add adapters to a checkpoint: W + strength * scale * change, rounded once.",
        epilog=_MERGE_EXAMPLES,
        formatter_class=form,
    )
    merge.add_argument("base", metavar="BASE", help="a checkpoint, safetensors")
    merge.add_argument(
        "adapters",
        metavar="ADAPTER[:STRENGTH]",
        nargs="+",
        help="adapter files; one may come twice",
    )
    merge.add_argument("-o", "--output", metavar="OUT", required=True, help="the file to write")
    merge.add_argument(
        "--strength", type=float, default=1.0, help="of adapters without their own (default 1)"
    )
    merge.add_argument(
        "--no-strict",
        action="store_true",
        help="leave out modules that match no layer, and list them",
    )
    merge.set_defaults(run=_merge)

    demo = commands.add_parser(
        "demo", help="adapt, train and merge a small network on this machine", formatter_class=form
    )
    add_arguments(demo)
    demo.set_defaults(run=run_demo)
    return parser


def _inspect(args: argparse.Namespace) -> int:
    report = inspect_adapter(args.file)
    print(json.dumps(report.as_dict(), indent=1) if args.json else report.text())
    return 1 if report.unmatched or not report.layers else 0


def _merge(args: argparse.Namespace) -> int:
    adapters = [_with_strength(text, args.strength) for text in args.adapters]
    with _Bar() as bar:
        reports = merge_files(
            args.base, adapters, args.output, strict=not args.no_strict, progress=bar
        )
    for (_, strength), report in zip(adapters, reports, strict=True):
        print(f"{report.summary()}, at strength {strength:g}")
        for entry in report.unmatched:
            print(f"  left out: {entry}")
    print(f"wrote {args.output}")
    return 0


def _with_strength(text: str, default: float) -> tuple[str, float]:
    path, colon, strength = text.rpartition(":")
    if colon and path and not os.path.exists(text):
        try:
            return path, float(strength)
        except ValueError:
            pass  # a colon in a name, or a drive letter
    return text, default


class _Bar:
    """A progress callable of (done, total) in bytes: a bar on a terminal, elsewhere only when it
    takes long.
    """

    def __init__(self):
        self._bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None:
            from tqdm import tqdm

            wait, often = (0.5, 0.1) if sys.stderr.isatty() else (10.0, 10.0)
            self._bar = tqdm(
                desc="merging",
                total=total,
                unit="B",
                unit_scale=True,
                file=sys.stderr,
                delay=wait,
                mininterval=often,
            )
        self._bar.update(done - self._bar.n)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _text(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


if __name__ == "__main__":
    sys.exit(main())
