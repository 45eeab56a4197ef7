"""LyCORIS adapters without torch, on NumPy or CuPy."""

from . import ops
from .arrays import bf16, like, resolve_device, to_device, wide
from .errors import (
    DeviceError,
    DtypeError,
    FileFormatError,
    KernelError,
    LycorisError,
    MatchError,
    ShapeError,
)
from .tape import Tape

__version__ = "0.1.0"

__all__ = [
    "DeviceError",
    "DtypeError",
    "FileFormatError",
    "KernelError",
    "LycorisError",
    "MatchError",
    "ShapeError",
    "Tape",
    "bf16",
    "like",
    "ops",
    "resolve_device",
    "to_device",
    "wide",
]
