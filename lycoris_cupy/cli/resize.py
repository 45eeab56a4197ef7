"""`lycoris-cupy resize`: an adapter file at a lower rank."""

from __future__ import annotations

import argparse
import json

from ..io.alpha import SOURCES
from ..io.resize import resize_file
from ..ranks import RankRule
from .arguments import DTYPES, dtype_named
from .progress import Bar

_EXAMPLES = """Every module becomes the nearest one of its own kind at the rank that is asked for,
from its factors alone: LoCon plain and Tucker, and LoKr by its side w2 (which is factored if it is
full). A module that has no more than that rank passes bit for bit. The scale alpha / rank stays
what it is: alpha becomes scale * new rank. The report names the error of each: the Frobenius norm
of what is lost over that of the change.

Choose the rank by one of
  --rank 8          8, or what there is
  --energy 0.99     the fewest singular values whose squares hold 99 % of all squares
  --ratio 0.1       those above a tenth of the largest
  --error 0.05      the fewest that lose at most 5 % of the change
  --cut 4           the first 4 ranks of a DyLoRA, which is trained to be cut so; alpha stays, and
                    the scale grows to alpha / 4
and --max-rank beside the middle three; --conv-rank for kernels larger than 1x1.

examples:
  lycoris-cupy resize style.safetensors small.safetensors --rank 8
  lycoris-cupy resize style.safetensors small.safetensors --energy 0.99 --max-rank 32
  lycoris-cupy resize style.safetensors small.safetensors --error 0.05 --conv-rank 4 --json
  lycoris-cupy resize dylora.safetensors small.safetensors --cut 4
"""
_KINDS = ("rank", "energy", "ratio", "error", "cut")


def add(commands) -> None:
    """The command's parser."""
    parser = commands.add_parser(
        "resize",
        help="lower the rank of an adapter file",
        description="Lower the rank of an adapter file by the SVD of its factors.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option("file", metavar="IN", help="an adapter file of any dialect, or PEFT's folder")
    option("output", metavar="OUT", help="the file to write; for peft a new folder")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--rank", type=int, metavar="N", help="this rank at most")
    how.add_argument("--energy", type=float, metavar="P", help="share of the squares to keep")
    how.add_argument("--ratio", type=float, metavar="P", help="of the largest singular value")
    how.add_argument("--error", type=float, metavar="P", help="share of the change to lose at most")
    how.add_argument("--cut", type=int, metavar="N", help="first ranks of a DyLoRA")
    option("--max-rank", type=int, metavar="N", help="a cap on what the rule chooses")
    option("--conv-rank", type=int, metavar="N", help="rank of kernels larger than 1x1")
    option("--dtype", choices=DTYPES, help="of new factors (default: the module's)")
    option("--keep-others", action="store_true", help="pass modules on that have no rank to lower")
    option("--alpha-from", choices=SOURCES, help="the one source of alpha to believe")
    option("--json", action="store_true", help="the report as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0 when the result is in place."""
    (kind,) = (kind for kind in _KINDS if getattr(args, kind) is not None)
    rule = _rule(kind, getattr(args, kind), args.max_rank)
    conv = None
    if args.conv_rank is not None:
        conv = _rule("cut" if kind == "cut" else "rank", args.conv_rank, None)
    with Bar("resizing", "module") as bar:
        report = resize_file(
            args.file,
            args.output,
            rule,
            conv_rule=conv,
            keep_others=args.keep_others,
            dtype=None if args.dtype is None else dtype_named(args.dtype),
            alpha_from=args.alpha_from,
            progress=bar,
        )
    print(json.dumps(report.as_dict(), indent=1) if args.json else report.text())
    return 0


def _rule(kind: str, value: float, most: int | None) -> RankRule | int:
    rule = RankRule("rank" if kind == "cut" else kind, value, most)
    return int(value) if kind == "cut" else rule
