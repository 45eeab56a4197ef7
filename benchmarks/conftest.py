"""Options, order and shared state of the benchmarks.

Tests of one shape stand together, the peers' last, so that all columns of a row are measured within
a minute of each other, and one shape at a time is in memory.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from lycoris_cupy.arrays import gpu_missing

from .bare import Bare
from .case import Case
from .environment import environment
from .results import Results, default_path
from .shapes import CPU_SHAPES, SHAPES, Shape

DEVICE = "cpu" if gpu_missing() else "cuda:0"


def pytest_addoption(parser):
    group = parser.getgroup("lycoris_cupy benchmarks")
    group.addoption(
        "--results",
        metavar="FILE",
        help="where the measurements go (default: benchmarks/results/layers-<gpu>.json on a GPU)",
    )
    group.addoption(
        "--peer-seconds",
        type=float,
        default=0.0,
        metavar="S",
        help="seconds for all peers together (needs the extra `peer`); 0, the default: no peers",
    )


def pytest_collection_modifyitems(items):
    order = {shape.name: i for i, shape in enumerate([*SHAPES, *CPU_SHAPES])}

    def place(item):
        callspec = getattr(item, "callspec", None)
        shape = callspec.params.get("shape") if callspec else None
        return order.get(shape.name, len(order)) if isinstance(shape, Shape) else len(order)

    items.sort(key=place)  # stable: the order within a shape is the files'


class Cases:
    """The case at hand and its yardstick; asking for another shape lets go of the last one."""

    def __init__(self, results: Results):
        self._results, self._kept = results, None

    def __call__(self, shape: Shape) -> tuple[Case, Bare]:
        if self._kept is None or self._kept[0].shape is not shape:
            self._kept = None
            if DEVICE != "cpu":
                import cupy

                cupy.get_default_memory_pool().free_all_blocks()
            case = Case(shape, DEVICE)
            self._kept = case, Bare(case)
            self._results.add("bare", self._kept[1].row())
        return self._kept


@pytest.fixture(scope="session")
def results(pytestconfig) -> Results:
    head = environment()
    given = pytestconfig.getoption("--results")
    out = Results(Path(given) if given else default_path(head["gpu"]), head)
    if DEVICE != "cpu":
        from .timing import ceilings

        out.put("ceilings", ceilings())
    return out


@pytest.fixture(scope="session")
def cases(results) -> Cases:
    return Cases(results)
