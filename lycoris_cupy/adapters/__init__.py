"""The algorithms. A new one is a file here and a line in ALGORITHMS; files, engine, tests and
benchmarks iterate over it.
"""

from ..errors import LycorisError
from ..layers import LayerShape
from .base import RULES, Adapter, Parameters, scale_of
from .dora import DoRA
from .factor import Factor
from .full import Full
from .locon import LoCon
from .loha import LoHa
from .lokr import LoKr, factorization
from .rows import RowPart, Rows, slice_rows

# In the order in which a file's keys are tried.
ALGORITHMS: dict[str, type[Adapter]] = {kind.algorithm: kind for kind in (LoCon, LoHa, LoKr, Full)}


def new_adapter(
    algorithm: str, shape: LayerShape, rank: int, alpha: float | None = None, **options
) -> Adapter:
    """An adapter of one of ALGORITHMS with its options, and with DoRA on it for dora='output' or
    'input' (rule: what its strength means). Raises LycorisError.
    """
    if algorithm not in ALGORITHMS:
        raise LycorisError(
            f"algorithm {algorithm!r} is unknown: use one of {', '.join(ALGORITHMS)}"
        )
    axis = options.pop("dora", None)
    if axis is None:
        return ALGORITHMS[algorithm].create(shape, rank, alpha, **options)
    rule = options.pop("rule", "base")
    return DoRA.over(ALGORITHMS[algorithm].create(shape, rank, alpha, **options), axis, rule)


__all__ = [
    "ALGORITHMS",
    "RULES",
    "Adapter",
    "DoRA",
    "Factor",
    "Full",
    "LoCon",
    "LoHa",
    "LoKr",
    "Parameters",
    "RowPart",
    "Rows",
    "factorization",
    "new_adapter",
    "scale_of",
    "slice_rows",
]
