"""Arguments of the command line that have a form of their own."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from ..arrays import dtype_of
from ..errors import LycorisError

DTYPES = ("bf16", "f16", "f32")
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
