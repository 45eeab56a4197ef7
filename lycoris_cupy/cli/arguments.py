"""Arguments of the command line that have a form of their own."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np

from ..arrays import dtype_of
from ..errors import LycorisError
from ..ranks import RankRule

DTYPES = ("bf16", "f16", "f32")
RANK_KINDS = {
    "rank": "this rank at most",
    "threshold": "singular values above this",
    "ratio": "singular values above this share of the largest",
    "quantile": "until their sum reaches this share of all",
    "energy": "share of the squares to keep",
    "error": "share of the change to lose at most",
}
_Value = TypeVar("_Value")


def argument(parse: Callable[[str], _Value]) -> Callable[[str], _Value]:
    """For add_argument's `type`: parse, with its own message where argparse has a vague one."""

    def checked(text: str) -> _Value:
        try:
            return parse(text)
        except LycorisError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return checked


def dtype_named(name: str) -> np.dtype:
    """The dtype of one of DTYPES."""
    return np.dtype(np.float16) if name == "f16" else dtype_of(name)


def add_rank_rules(parser: argparse.ArgumentParser, kinds: Mapping[str, str]):
    """One option a rule, of which one can be given; a cap, and the value for convolutions."""
    how = parser.add_mutually_exclusive_group()
    for kind, text in kinds.items():
        number, name = (int, "N") if kind == "rank" else (float, "P")
        how.add_argument(f"--{kind}", type=number, metavar=name, help=text)
    parser.add_argument("--max-rank", type=int, metavar="N", help="a cap on what the rule chooses")
    parser.add_argument(
        "--conv", type=float, metavar="VALUE", help="the rule's value for kernels larger than 1x1"
    )
    return how


def rank_rule(
    args: argparse.Namespace, kinds: Mapping[str, str]
) -> tuple[RankRule | None, RankRule | None]:
    """The rule that was given, and the one for convolutions; None where there is none."""
    for kind in kinds:
        value = getattr(args, kind)
        if value is not None:
            rule = RankRule(kind, value, args.max_rank)
            conv = None if args.conv is None else RankRule(kind, args.conv, args.max_rank)
            return rule, conv
    if args.conv is not None or args.max_rank is not None:
        raise LycorisError(f"--conv and --max-rank go with one of --{', --'.join(kinds)}")
    return None, None
