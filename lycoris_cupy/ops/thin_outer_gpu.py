"""The gradients of thin factors on Hopper, one or two in a launch: x^T @ g, where one side is up to
64 wide, from one read of the other. See cuda_src/thin_outer.cu.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from .. import plan
from ..arrays import Array, bf16, f32
from ..kernels import Kernel, kernel
from ..tensor_map import NOTHING, ROW, matrix_map
from .conv_gpu import processors
from .conv_plan import ceil
from .extended_gpu import takes
from .skinny_gpu import THREADS

# By the columns of the thin side, at most: 64 columns of the wide side times so many that a cluster
# has, and its blocks.
_VARIANTS = {16: [(2, 4), (1, 8)], ROW: [(1, 4), (2, 4), (1, 8)]}
_SHARED = 112 * 1024  # two blocks share a multiprocessor's 228 KiB
# Seconds that the library takes for such a product beside those of its bytes, all of them read: it
# splits the rows and adds up the parts by a second kernel. 7 to 9 as measured, of 1.5 to 235 MB.
_LIBRARY = 7.5e-6
_ROUND = 1.5e-6  # that one more round of blocks takes, as measured


class Outer(NamedTuple):
    """scale * x^T @ g, summed over rows.  x, g: (rows, columns). scale: (1,) f32, or None for 1."""

    x: Array
    g: Array
    scale: Array | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.x.shape[1], self.g.shape[1]


class Plan(NamedTuple):
    """A launch but for its arrays. thin: columns of a box of the thin side."""

    launch: Kernel
    grid: tuple[int]
    thin: int
    ways: tuple  # what `plan.choose` takes

    @property
    def better(self) -> bool:
        """Whether this launch is estimated to be the best way."""
        return min(self.ways[1], key=self.ways[1].__getitem__) == "thin outer"


def thin_outers(*products: Outer) -> list[Array] | None:
    """Each product in f32, (1, x's columns, g's columns), of one or two of as many rows; None where
    launches of their own are better, or all there is.
    """
    import cupy

    if not takes(*(a for product in products for a in product[:2])):
        return None
    rows = products[0].x.shape[0]
    planned = plan_thin_outers(rows, tuple(p.shape for p in products), processors())
    if planned is None or plan.choose(*planned.ways) != "thin outer":
        return None
    outs = [cupy.empty((1, *p.shape), f32) for p in products]
    maps, columns, across = [], [], 0
    for k, (x, g, _) in enumerate(products):
        turned = x.shape[1] < g.shape[1]
        wide, thin = (g, x) if turned else (x, g)
        boxes = ((wide, ROW), (thin, planned.thin))
        maps += [matrix_map(a.data.ptr, tuple(a.shape), (ROW, n)) for a, n in boxes]
        columns, across = [*columns, wide.shape[1]], across | turned << k
    missing = 2 - len(products)
    args = [*maps, *[NOTHING] * 2 * missing]
    for of in ([p.scale for p in products], outs):
        args += [*of, *[None] * missing]
    args += [rows, *columns, *[0] * missing, min(products[0].shape), across]
    planned.launch(planned.grid, (THREADS,), *args, shared=_SHARED)
    return outs


def thin_outers_seconds(rows: int, *shapes: tuple[int, int]) -> float:
    """Estimated of the best way, for shapes that there is a plan for, and arrays that Hopper's
    kernels take."""
    planned = plan_thin_outers(rows, shapes, processors())
    assert planned is not None, shapes
    return min(planned.ways[1].values())


@functools.lru_cache(maxsize=4096)
def plan_thin_outers(rows: int, shapes: tuple[tuple[int, int], ...], count: int) -> Plan | None:
    """The plan for products of these shapes, summed over so many rows; None where both sides of one
    are wide, or thin sides differ, or rows are no multiples of 16 bytes. count: multiprocessors.
    """
    ranks, columns = min(shapes[0]), [max(shape) for shape in shapes]
    if not 0 < ranks <= ROW or not rows or any(min(shape) != ranks for shape in shapes):
        return None
    if any(n % 8 for shape in shapes for n in shape):
        return None
    read = [rows * (n + ranks) * bf16.itemsize for n in columns]
    moved = sum(read) + sum(columns) * ranks * f32.itemsize
    thin = next(n for n in _VARIANTS if ranks <= n)

    def timed(boxes: int, cluster: int) -> tuple[float, int, int, int]:
        blocks = cluster * sum(ceil(n, ROW * boxes) for n in columns)
        share = ceil(ceil(rows, ROW), cluster) * ROW * (ROW * boxes + thin) * bf16.itemsize
        added = (cluster - 1) * ROW * boxes * thin * f32.itemsize // cluster
        seconds = plan.skinny(moved, ceil(blocks, count) * share, added)
        return seconds + (ceil(blocks, 2 * count) - 1) * _ROUND, blocks, boxes, cluster

    seconds, blocks, boxes, cluster = min(timed(*variant) for variant in _VARIANTS[thin])
    if len(shapes) > 1:
        apart = [plan_thin_outers(rows, (shape,), count) for shape in shapes]
        other = "one by one", sum(min(p.ways[1].values()) for p in apart if p)
    else:
        other = "library", _LIBRARY + read[0] / plan.READ
    operations = 2 * rows * sum(columns) * ranks
    what = " and ".join(f"x ({rows}, {a})^T * g ({rows}, {b})" for a, b in shapes)
    launch = kernel("thin_outer.cu", "thin_outer", bf16, THIN=thin, BOXES=boxes, CLUSTER=cluster)
    ways = what, dict([("thin outer", seconds), other]), operations, moved
    return Plan(launch, (blocks,), thin, ways)
