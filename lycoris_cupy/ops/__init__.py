"""Differentiable operations on arrays, and on arrays that a tape watches, for NumPy and CuPy."""

from .activations import gelu, relu, silu
from .attention import attention
from .bilinear import resize_bilinear
from .cayley import cayley, rotation_columns
from .columns import column_sum, expand_rows
from .concatenate import concatenate, split
from .dropout import Draw, dropout, kept_gain
from .elementwise import add, cast, multiply, prelu, scale
from .embedding import embedding
from .extended import Pending, extended, pending, ready
from .hadamard import face_split, hadamard_weight
from .hadamard_product import hadamard_product
from .join import join_columns, take_columns
from .kron import kron_weight, mix_blocks
from .kron_square import kron_square
from .low_rank import fold_core, low_rank_weight, tucker_weight
from .magnitude import magnitude, shifted
from .mixed import mixed_product
from .norm import group_norm, layer_norm
from .product import convolution, product, product_dw, product_dx
from .ranks import interleave, mask_ranks, take_rows
from .scale_columns import scale_columns, spread_columns
from .shapes import (
    expand,
    pixel_shuffle,
    pixel_unshuffle,
    reshape,
    resize_nearest,
    tap_diagonal,
    transpose,
)
from .skew import cayley_series, skew_blocks
from .softmax import softmax
from .squares import changed_square, low_rank_square
from .tucker2 import tucker_decompose
from .turn import turn_blocks
from .window import Window

__all__ = [
    "Draw",
    "Window",
    "add",
    "attention",
    "cast",
    "cayley",
    "changed_square",
    "cayley_series",
    "column_sum",
    "concatenate",
    "convolution",
    "dropout",
    "embedding",
    "Pending",
    "expand",
    "expand_rows",
    "extended",
    "face_split",
    "fold_core",
    "gelu",
    "group_norm",
    "hadamard_product",
    "hadamard_weight",
    "join_columns",
    "interleave",
    "kept_gain",
    "kron_square",
    "kron_weight",
    "layer_norm",
    "low_rank_square",
    "low_rank_weight",
    "magnitude",
    "mask_ranks",
    "mix_blocks",
    "mixed_product",
    "multiply",
    "pixel_shuffle",
    "pixel_unshuffle",
    "pending",
    "prelu",
    "product",
    "product_dw",
    "product_dx",
    "ready",
    "relu",
    "reshape",
    "resize_bilinear",
    "resize_nearest",
    "rotation_columns",
    "scale",
    "scale_columns",
    "shifted",
    "silu",
    "softmax",
    "spread_columns",
    "split",
    "skew_blocks",
    "take_columns",
    "take_rows",
    "tap_diagonal",
    "transpose",
    "tucker_decompose",
    "tucker_weight",
    "turn_blocks",
]
