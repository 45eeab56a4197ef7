"""`lycoris-cupy extract`: an adapter out of two checkpoints."""

from __future__ import annotations

import argparse
import json

from ..extraction import FORMS, Form
from ..io.dialects import DIALECTS
from ..io.extract import extract_files
from ..io.target import PARTS
from .arguments import DTYPES, RANK_KINDS, add_rank_rules, dtype_named, rank_rule
from .progress import Bar

_EXAMPLES = """BASE and TUNED are safetensors files, indices or folders with one, in bf16, f16, f32
or 8-bit floats; one layer of them is in memory at a time. Layers that are equal are left out. Norms
become Norm adapters, a changed bias stands beside the factors (diff_b). The report names the error
of each layer: |change - adapter| / |change|, of the values as written.

forms:
  locon      W' - W ~ down up, by the singular value decomposition: the best there is of its rank
  tucker     the same for linear layers; convolutions become down, core, up by Tucker-2 (HOOI)
  lokr       the nearest Kronecker product w1 x w2 (Van Loan and Pitsianis); with a rule for the
             rank w2 is factored too
  full       the change itself
A low rank that would take no fewer numbers than the change becomes full.

The rank, one of: --rank N; --threshold T, singular values above T; --ratio P, above P times the
largest; --quantile P, until their sum reaches P of all, as LyCORIS counts; --energy P, the same of
their squares; --error P, losing at most P of the change. --conv is its value for kernels larger
than 1x1. Large matrices are decomposed by random projections where a check shows that no more than
2 % of the error is owed to them, and in full elsewhere.

examples:
  lycoris-cupy extract base.safetensors tuned.safetensors style.safetensors --rank 16
  lycoris-cupy extract base.safetensors tuned.safetensors a.safetensors --error 0.3 --max-rank 64
  lycoris-cupy extract base.safetensors tuned.safetensors a.safetensors --ratio 0.1 --conv 0.2
  lycoris-cupy extract base.safetensors tuned.safetensors a.safetensors --form tucker --rank 16
  lycoris-cupy extract base.safetensors tuned.safetensors a.safetensors --form lokr --factor 8
  lycoris-cupy extract base/ tuned/ a.safetensors --rank 32 --device cuda --to kohya --part unet
"""


def add(commands) -> None:
    """The command's parser."""
    parser = commands.add_parser(
        "extract",
        help="make an adapter of the difference between two checkpoints",
        description="Make an adapter that leads from one checkpoint to another.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option("base", metavar="BASE", help="the checkpoint that was trained from")
    option("tuned", metavar="TUNED", help="the checkpoint that was trained")
    option("output", metavar="OUT", help="the adapter file to write")
    option("--form", choices=FORMS, default="locon", help="see below (default: locon)")
    add_rank_rules(parser, RANK_KINDS)
    option(
        "--sparse",
        type=float,
        metavar="P",
        help="keep the largest entries of what locon leaves out too, from this quantile on: 0.98 "
        "keeps 2 %% of them; programs of today but this one do not read them",
    )
    option("--factor", type=int, default=-1, metavar="N", help="of LoKr's split (default: -1)")
    dialects = [name for name, one in DIALECTS.items() if one.alpha == "tensor"]
    option("--to", choices=dialects, default="lycoris", help="the names (default: lycoris)")
    option("--part", choices=PARTS, help="of a model, for layers that do not tell theirs")
    option("--exclude", metavar="PATTERN", action="append", default=[], help="layers to leave out")
    option(
        "--tolerance",
        type=float,
        default=0.0,
        metavar="P",
        help="layers that changed by at most this share of their norm count as equal (default 0)",
    )
    option("--dtype", choices=DTYPES, default="f16", help="of the factors (default: f16)")
    option("--device", default="cpu", help="cpu (default), cuda, cuda:1 or auto")
    option("--json", action="store_true", help="the report as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0 when the adapter is in place."""
    rule, conv = rank_rule(args, RANK_KINDS)
    with Bar("extracting", "layer") as bar:
        report = extract_files(
            args.base,
            args.tuned,
            args.output,
            Form(args.form, rule, conv, args.factor, args.sparse),
            to=args.to,
            part=args.part,
            exclude=tuple(args.exclude),
            tolerance=args.tolerance,
            dtype=dtype_named(args.dtype),
            device=args.device,
            progress=bar,
        )
    print(json.dumps(report.as_dict(), indent=1) if args.json else report.text())
    return 0
