"""LyCORIS adapters without torch: load, run, differentiate, train, merge and save them on NumPy or
CuPy.
"""

from . import ops
from .adapters import ALGORITHMS, Adapter, Full, LoCon, LoHa, LoKr
from .arrays import bf16, like, resolve_device, to_device, wide
from .engine import Engine
from .errors import (
    DeviceError,
    DtypeError,
    FileFormatError,
    KernelError,
    LycorisError,
    MatchError,
    ShapeError,
)
from .io.report import LoadReport
from .layers import Conv1d, Conv2d, Conv3d, Layer, LayerShape, Linear
from .tape import Tape

__version__ = "0.1.0"

__all__ = [
    "ALGORITHMS",
    "Adapter",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "DeviceError",
    "DtypeError",
    "Engine",
    "FileFormatError",
    "Full",
    "KernelError",
    "Layer",
    "LayerShape",
    "Linear",
    "LoCon",
    "LoHa",
    "LoKr",
    "LoadReport",
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
