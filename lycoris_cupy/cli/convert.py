"""`lycoris-cupy convert`: an adapter file in another dialect, or as plain LoRA."""

from __future__ import annotations

import argparse
import json

from ..io.alpha import SOURCES
from ..io.convert import convert_file
from ..io.dialects import DIALECTS
from ..io.target import PARTS
from .arguments import DTYPES, dtype_named
from .progress import Bar

_EXAMPLES = f"""dialects:
{chr(10).join(f"  {dialect.name:14} {dialect.about}" for dialect in DIALECTS.values())}

Factors that need no change pass bit for bit. A loss (a rank or a dtype that cannot hold the change,
a key that has no place) is refused unless --lossy is given, and is then listed layer by layer.
Names whose dots became underscores need the model they are for to get them back: --base.

examples:
  lycoris-cupy convert style.safetensors out.safetensors --to kohya --part unet
  lycoris-cupy convert style.safetensors out.safetensors --to diffusers --base unet.safetensors
  lycoris-cupy convert loha.safetensors out.safetensors --to lycoris --algorithm lora --base m
      exact: a LoHa of rank R is a LoRA of rank R * R or less
  lycoris-cupy convert a.safetensors b.safetensors --to kohya --algorithm lora --rank 8 --lossy
  lycoris-cupy convert peft-folder out.safetensors --to lycoris
"""


def add(commands) -> None:
    """The command's parser."""
    parser = commands.add_parser(
        "convert",
        help="write an adapter file in another dialect, or as plain LoRA",
        description="Write an adapter in the names of another program, or as plain LoRA.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option("file", metavar="IN", help="an adapter file of any dialect, or PEFT's folder")
    option("output", metavar="OUT", help="the file to write; for peft a new folder")
    option("--to", required=True, choices=tuple(DIALECTS), metavar="DIALECT", help="see below")
    option("--base", metavar="MODEL", help="the model it is for: its layer names are written")
    option("--algorithm", choices=("lora",), help="make every module plain LoRA")
    option("--rank", type=int, metavar="N", help="of the LoRA, at most (default: the exact one)")
    option("--dtype", choices=DTYPES, help="of the factors (default: theirs)")
    option("--lossy", action="store_true", help="accept losses, and list them")
    option("--part", choices=PARTS, help="of a model, for modules that do not tell theirs")
    option("--only", choices=PARTS, help="leave out all other parts of the model")
    option("--alpha-from", choices=SOURCES, help="the one source of alpha to believe")
    option("--json", action="store_true", help="the report as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0 when the result is in place."""
    with Bar("converting", "module") as bar:
        done = convert_file(
            args.file,
            args.output,
            args.to,
            base=args.base,
            algorithm=args.algorithm,
            rank=args.rank,
            dtype=None if args.dtype is None else dtype_named(args.dtype),
            lossy=args.lossy,
            part=args.part,
            only=args.only,
            alpha_from=args.alpha_from,
            progress=bar,
        )
    print(json.dumps(done.as_dict(), indent=1) if args.json else done.text())
    return 0
