"""LyCORIS adapters without torch: load, run, differentiate, train, merge and save them on NumPy or
CuPy.
"""

from . import ops
from .adapters import (
    ALGORITHMS,
    BOFT,
    IA3,
    Adapter,
    DiagOFT,
    DoRA,
    DyLoRA,
    Full,
    GLoRA,
    LoCon,
    LoHa,
    LoKr,
    Norm,
    TLoRA,
    draw_block,
)
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
from .norms import GroupNorm, LayerNorm
from .recipe import AddReport, Recipe
from .tape import Tape

__version__ = "0.1.0"

__all__ = [
    "ALGORITHMS",
    "Adapter",
    "AddReport",
    "BOFT",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "DeviceError",
    "DiagOFT",
    "DoRA",
    "DtypeError",
    "DyLoRA",
    "Engine",
    "FileFormatError",
    "Full",
    "GLoRA",
    "GroupNorm",
    "IA3",
    "KernelError",
    "Layer",
    "LayerNorm",
    "LayerShape",
    "Linear",
    "LoCon",
    "LoHa",
    "LoKr",
    "LoadReport",
    "LycorisError",
    "MatchError",
    "Norm",
    "Recipe",
    "ShapeError",
    "TLoRA",
    "Tape",
    "bf16",
    "draw_block",
    "like",
    "ops",
    "resolve_device",
    "to_device",
    "wide",
]
