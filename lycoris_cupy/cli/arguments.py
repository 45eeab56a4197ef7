"""Arguments of the command line that have a form of their own."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

from ..errors import LycorisError

_Value = TypeVar("_Value")


def argument(parse: Callable[[str], _Value]) -> Callable[[str], _Value]:
    """For add_argument's `type`: parse, with its own message where argparse has a vague one."""

    def checked(text: str) -> _Value:
        try:
            return parse(text)
        except LycorisError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return checked
