"""`lycoris-cupy resize`: an adapter file at a lower rank."""

from __future__ import annotations

import argparse
import json

from ..errors import LycorisError
from ..io.alpha import SOURCES
from ..io.resize import resize_file
from ..ranks import RankRule
from .arguments import DTYPES, RANK_KINDS, add_rank_rules, dtype_named, rank_rule
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
and --max-rank beside the middle three; --conv is the value for kernels larger than 1x1.

examples:
  lycoris-cupy resize style.safetensors small.safetensors --rank 8
  lycoris-cupy resize style.safetensors small.safetensors --energy 0.99 --max-rank 32
  lycoris-cupy resize style.safetensors small.safetensors --error 0.05 --conv 0.2 --json
  lycoris-cupy resize dylora.safetensors small.safetensors --cut 4
"""
_KINDS = {kind: RANK_KINDS[kind] for kind in ("rank", "energy", "ratio", "error")}


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
    how = add_rank_rules(parser, _KINDS)
    how.add_argument("--cut", type=int, metavar="N", help="first ranks of a DyLoRA")
    option("--dtype", choices=DTYPES, help="of new factors (default: the module's)")
    option("--keep-others", action="store_true", help="pass modules on that have no rank to lower")
    option("--alpha-from", choices=SOURCES, help="the one source of alpha to believe")
    option("--json", action="store_true", help="the report as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0 when the result is in place."""
    if args.cut is not None:
        rule, conv = int(RankRule("rank", args.cut).value), None
    else:
        rule, conv = rank_rule(args, _KINDS)
    if rule is None:
        raise LycorisError(f"say which rank: one of --{', --'.join(_KINDS)}, --cut")
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
