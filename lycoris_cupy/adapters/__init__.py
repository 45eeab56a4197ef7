"""The algorithms. A new one is a file here and a line in ALGORITHMS; files, engine, tests and
benchmarks iterate over it.
"""

from ..errors import LycorisError
from ..layers import LayerShape
from .base import RULES, Adapter, Parameters, scale_of
from .biased import Biased
from .boft import BOFT
from .diag_oft import DiagOFT
from .dora import DoRA
from .dropout import Dropout, Dropped
from .dylora import DyLoRA, draw_block, truncated
from .factor import Factor
from .factorization import factorization
from .full import Full
from .glora import GLoRA
from .ia3 import IA3
from .locon import LoCon
from .loha import LoHa
from .lokr import LoKr
from .norm import Norm
from .option import Option
from .peft_boft import PeftBOFT
from .peft_oft import PeftOFT
from .rows import RowPart, Rows, slice_rows
from .sparse import SparseLoCon
from .tlora import TLoRA

# In the order in which a file's keys are tried.
ALGORITHMS: dict[str, type[Adapter]] = {
    kind.algorithm: kind
    for kind in (
        LoCon,
        LoHa,
        LoKr,
        Full,
        IA3,
        Norm,
        DyLoRA,
        GLoRA,
        DiagOFT,
        BOFT,
        TLoRA,
        PeftOFT,
        PeftBOFT,
    )
}


# Options of what stands on an adapter, for every algorithm that it can stand on.
DORA = {
    "dora": Option("dora", "str", None, optional=True),
    "rule": Option("rule", "str", "base"),
}


def kind_of(algorithm: str) -> type[Adapter]:
    """One of ALGORITHMS. Raises LycorisError."""
    if algorithm not in ALGORITHMS:
        raise LycorisError(
            f"algorithm {algorithm!r} is unknown: use one of {', '.join(ALGORITHMS)}"
        )
    return ALGORITHMS[algorithm]


def takes(algorithm: str, shape: LayerShape) -> bool:
    """Whether one of ALGORITHMS can sit on such a layer. Raises LycorisError for an unknown one."""
    return kind_of(algorithm).takes(shape)


def options_of(algorithm: str) -> dict[str, Option]:
    """The options that `new_adapter` takes for it. Raises LycorisError for an unknown one."""
    kind = kind_of(algorithm)
    return {**kind.options(), **(DORA if kind.decomposable else {})}


def new_adapter(
    algorithm: str, shape: LayerShape, rank: int, alpha: float | None = None, **options
) -> Adapter:
    """An adapter of one of ALGORITHMS with its options, and with DoRA on it for dora='output' or
    'input' (rule: what its strength means). Raises LycorisError.
    """
    if not takes(algorithm, shape):
        raise LycorisError(f"{algorithm} does not sit on {shape}")
    axis = options.pop("dora", None)
    if axis is None:
        return ALGORITHMS[algorithm].create(shape, rank, alpha, **options)
    rule = options.pop("rule", "base")
    return DoRA.over(ALGORITHMS[algorithm].create(shape, rank, alpha, **options), axis, rule)


__all__ = [
    "ALGORITHMS",
    "DORA",
    "RULES",
    "Adapter",
    "BOFT",
    "Biased",
    "DiagOFT",
    "DoRA",
    "Dropout",
    "Dropped",
    "DyLoRA",
    "Factor",
    "Full",
    "GLoRA",
    "IA3",
    "LoCon",
    "LoHa",
    "LoKr",
    "Norm",
    "Option",
    "Parameters",
    "PeftBOFT",
    "PeftOFT",
    "RowPart",
    "Rows",
    "SparseLoCon",
    "TLoRA",
    "draw_block",
    "factorization",
    "kind_of",
    "new_adapter",
    "options_of",
    "scale_of",
    "slice_rows",
    "takes",
    "truncated",
]
