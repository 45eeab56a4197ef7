"""The algorithms. A new one is a file here and a line in ALGORITHMS; files, engine, tests and
benchmarks iterate over it.
"""

from .base import Adapter, Parameters, scale_of
from .factor import Factor
from .full import Full
from .locon import LoCon
from .loha import LoHa
from .lokr import LoKr, factorization
from .rows import RowPart, Rows, slice_rows

# In the order in which a file's keys are tried.
ALGORITHMS: dict[str, type[Adapter]] = {kind.algorithm: kind for kind in (LoCon, LoHa, LoKr, Full)}

__all__ = [
    "ALGORITHMS",
    "Adapter",
    "Factor",
    "Full",
    "LoCon",
    "LoHa",
    "LoKr",
    "Parameters",
    "RowPart",
    "Rows",
    "factorization",
    "scale_of",
    "slice_rows",
]
