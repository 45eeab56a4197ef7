"""`lycoris-cupy merge`: adapters added to the weights of a checkpoint."""

from __future__ import annotations

import argparse
import os

from ..adapters.base import RULES
from ..adapters.oft import READINGS
from ..io.alpha import SOURCES
from ..io.merge import merge_files
from ..io.shards import parse_size
from ..io.strength import LayerStrength, parse_strength
from ..ops.squares import AXES
from .arguments import argument
from .progress import Bar

_EXAMPLES = """BASE is a safetensors file, a *.safetensors.index.json, or a folder with one. It may
be larger than memory. The result has its names, dtypes, shards and metadata, and says what was
merged; what no adapter changes passes bit for bit. All adapters are summed in f32 and the sum is
rounded once; if rounding loses some of the change, the report says how much, and of which tensors.

Every module of an adapter must find its layer, or nothing is written; --no-strict merges those that
do and lists the others. OUT may be BASE itself if that is one file: it is replaced only when the
new file is whole. Several shards become a new folder, which gets its name when all is in it.

--strength, as often as needed:
  0.8                   of all adapters without a strength of their own
  '*attn*:0.5'          on the layers whose whole name in BASE fits the pattern
  'style=*attn*:0.5'    the same, for the adapter style.safetensors only
A pattern's strength replaces the adapter's own; where several fit, the last one counts; 0 leaves a
layer alone; one that fits nothing is an error.

examples:
  lycoris-cupy merge model.safetensors style.safetensors --strength 0.8 -o merged.safetensors
  lycoris-cupy merge model.safetensors style.safetensors:0.8 pose.safetensors:-1 -o out.safetensors
  lycoris-cupy merge merged.safetensors style.safetensors:-0.8 -o back.safetensors
      takes it out again, up to rounding
  lycoris-cupy merge model.safetensors style.safetensors --strength '*attn*:0.5' -o x --dry-run
      says what would be done: layers, strengths, files, bytes
  lycoris-cupy merge transformer/ style.safetensors -o merged/
      shards in, shards out, with the configuration files beside them
  lycoris-cupy merge model.safetensors style.safetensors --shard-size 5GB -o merged/
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
    parser.add_argument("base", metavar="BASE", help="a checkpoint: a file, an index or a folder")
    parser.add_argument(
        "adapters",
        metavar="ADAPTER[:STRENGTH]",
        nargs="+",
        help="adapter files; one may come twice",
    )
    parser.add_argument("-o", "--output", metavar="OUT", required=True, help="the file or folder")
    parser.add_argument(
        "--strength",
        metavar="[[ADAPTER=]PATTERN:]STRENGTH",
        type=argument(parse_strength),
        action="append",
        default=[],
        help="of adapters without their own (default 1), or of some layers; see below",
    )
    parser.add_argument(
        "--no-strict",
        action="store_true",
        help="leave out modules that match no layer, and list them",
    )
    parser.add_argument(
        "--shard-size",
        metavar="SIZE",
        type=argument(parse_size),
        help="bytes of tensors a shard: 5GB, 500MB, 2GiB; 0 for one file (default: BASE's shards)",
    )
    parser.add_argument("--alpha-from", choices=SOURCES, help="the one source of alpha to believe")
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
    parser.add_argument(
        "--device",
        default="cpu",
        help="where changes are computed: cpu (default), cuda, cuda:1 or auto; a GPU helps with "
        "LoHa, Tucker and several adapters",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="read and check everything, say what would be done, write nothing",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0 when the merged file is in place."""
    default, rules = strengths(args.strength)
    adapters = [with_strength(text, default) for text in args.adapters]
    with Bar("merging", "B") as bar:
        report = merge_files(
            args.base,
            adapters,
            args.output,
            rules=rules,
            strict=not args.no_strict,
            shard_size=args.shard_size,
            device=args.device,
            dry_run=args.dry_run,
            progress=bar,
            alpha_from=args.alpha_from,
            dora=args.dora,
            rule=args.rule,
            dialect=args.dialect,
        )
    lines = report.plan_lines() if args.dry_run else report.survival_lines()
    for line in [*report.adapter_lines(), *lines]:
        print(line)
    print("nothing was written" if args.dry_run else f"wrote {args.output}")
    return 0


def strengths(parsed: list[float | LayerStrength]) -> tuple[float, list[LayerStrength]]:
    """The strength of adapters without their own, and those of some layers."""
    plain = [one for one in parsed if not isinstance(one, LayerStrength)]
    return plain[-1] if plain else 1.0, [one for one in parsed if isinstance(one, LayerStrength)]


def with_strength(text: str, default: float) -> tuple[str, float]:
    """(path, strength) of 'path:strength' or of a path alone."""
    path, colon, strength = text.rpartition(":")
    if colon and path and not os.path.exists(text):
        try:
            return path, float(strength)
        except ValueError:
            pass  # a colon in a name, or a drive letter
    return text, default
