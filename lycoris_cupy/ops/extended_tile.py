"""The variants of the extended product's kernel on Hopper, and which of them a product takes: that
with the least time on the busiest multiprocessor.
"""

from __future__ import annotations

from math import isqrt
from typing import NamedTuple

from ..arrays import bf16
from ..kernels import Kernel, kernel
from ..tensor_map import ROW
from .conv_plan import ceil

# (TILE_M, TILE_N) of the variants, by B_ROWS. 128 rows are for results that have fewer tiles of 256
# than there are multiprocessors: they copy more for their products, but all have work. 144 is for w
# whose rows run along the inner axis: along the columns it was 18 % slower than its size says.
_BOTH = [*((256, n) for n in (64, 96, 128, 160)), (192, 192), *((128, n) for n in (64, 128, 160))]
TILES = {True: _BOTH, False: [*_BOTH, (256, 144)]}
# Of the variants that copy an x once which both sums read; the two sums have to fit the registers.
PAIRS = [(256, 64), (128, 64), (128, 128)]
_NARROW_BLOCKS = (40, 80)  # EXT_N of the variants whose tile of 160 holds several blocks
# Cycles that a step takes at least: the copying thread waits for a stage, and asks for two to four
# boxes, 50 each; a worker waits for the stage, starts four products and sees them end, 130 behind
# the last. Estimated, not measured; the least of today's tiles, 128 x 64, copies for 473.
_STEP = 300
# Bytes that a multiprocessor takes in a cycle, as measured: with tiles of 256 x 128, 128 x 128 and
# 128 x 160 it took 41 to 47, whether it had asked or the block beside it; 64 is the port's width.
_TAKEN = 45
_WASTE = 0.3  # of the columns that are fetched and not read, as time
# Cycles a value of a tile, to write it, or to hand it to the copy engine, and to begin the next.
_END, _STAGED_END = 30 / 256, 16 / 256
ALL = 1 << 30  # columns of a block where all columns share one


class Tile(NamedTuple):
    """A variant of the kernel, and the cycles that it was estimated to take. ext: columns that the
    second sum does at a time. pair: both sums are done at once. scaled: the first has factors.
    alone: each block copies all of its weights itself.
    """

    rows: int
    columns: int
    ext: int
    cycles: float
    pair: bool = False
    scaled: bool = False
    alone: bool = False

    @property
    def cluster(self) -> int:
        """Blocks that copy the weights of the same columns together.

        As measured (H100), pairs make 256 x 160 4 to 10 % faster, 256 x 128 up to 8 %, 128 x 160
        17 %, and 192 x 192 no faster. The scaled variant of 256 x 160 has no registers left for it.
        """
        if self.alone or self.pair or (self.scaled and self.rows * self.columns == 256 * 160):
            return 1
        return 2 if 128 <= self.columns == self.ext < 192 else 1

    def staged(self, b_rows: int) -> bool:
        """Whether a finished tile to which nothing is added is written by the copy engine: STAGED
        of extended_tile.cuh."""
        return self.columns != 144 and not (b_rows and (self.rows, self.columns) == (256, 160))

    def launch(self, b_rows: int) -> Kernel:
        defines = {"TILE_N": self.columns, "B_ROWS": b_rows}
        defines |= {"TILE_M": self.rows} if self.rows != 256 else {}
        defines |= {"EXT_N": self.ext} if self.ext != self.columns else {}
        defines |= {"PAIR": 1} if self.pair else {}
        defines |= {"SCALED": 1} if self.scaled else {}
        defines |= {"CLUSTER": self.cluster} if self.cluster != 1 else {}
        return kernel("extended.cu", "extended", bf16, **defines)

    def grid(self, positions: int, columns: int, count: int) -> tuple[int]:
        return (min(self.clusters(positions, columns), count // self.cluster) * self.cluster,)

    def clusters(self, positions: int, columns: int) -> int:
        """Tiles, each as many rows as a cluster's blocks have together."""
        return ceil(positions, self.rows * self.cluster) * ceil(columns, self.columns)

    def timed(self, b_rows, positions, columns, own: int, other: int, count: int) -> Tile:
        """The same with the cycles that it takes on the busiest multiprocessor. own, other: steps
        of the two sums, of the second for one block."""

        def step(width, weights=1):
            wide = ceil(width, ROW) * ROW if b_rows else width  # columns that are fetched
            waste = 1 + _WASTE * (wide / width - 1)
            products = weights * self.rows * width / 32
            copies = (self.rows + weights * wide) * ROW * 2 / _TAKEN
            return max(_STEP, max(products, copies) * waste)

        rounds = ceil(self.clusters(positions, columns), count // self.cluster)
        if self.pair:
            steps = own * step(self.columns, 2)
        else:
            more = self.columns // self.ext * other * step(self.ext)
            steps = own * step(self.columns) + more
        end = self.rows * self.columns * (_STAGED_END if self.staged(b_rows) else _END)
        return self._replace(cycles=rounds * (steps + end))

    def band(self, count: int) -> int:
        """As many rows as columns of operands are then in use at a time."""
        clusters, rows = count // self.cluster, self.rows * self.cluster
        return max(1, isqrt(clusters * self.columns // rows))

    def boxes(self, b_rows: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """What a block copies of w and w2 at a time: all, or its share for the cluster."""
        if b_rows:
            box = (1, ROW // self.cluster, ROW)
            return box, box
        return (1, self.columns // self.cluster, ROW), (1, self.ext // self.cluster, ROW)


def choose(
    b_rows, positions, columns, own: int, other: int, count, block, pair=False
) -> Tile | None:
    """The tile with the least time; None if the blocks fit none. own, other: as for `Tile.timed`.
    pair: whether both sums can be done at once.
    """
    choices = [(m, n, n, False) for m, n in TILES[b_rows] if block == ALL or block % n == 0]
    if block in _NARROW_BLOCKS:
        choices = [(256, 160, block, False)]
    choices += [(m, n, n, True) for m, n in PAIRS if pair]

    def timed(tile):
        return tile.timed(b_rows, positions, columns, own, other, count)

    tiles = (timed(Tile(*choice[:3], 0.0, choice[3])) for choice in choices)
    return min(tiles, key=lambda tile: tile.cycles, default=None)
