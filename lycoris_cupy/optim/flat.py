"""Arrays by layer and factor as views of flat buffers: work on all of them is a call or a few."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from ..arrays import Array
from ..philox import random_words
from .nested import Nested, Own

BLOCK = 1 << 14  # elements: what NumPy works on at a time stays in the cache of a core


class Spot(NamedTuple):
    """Where a factor lies. row: of its numbers. place: of its random bits."""

    layer: str
    name: str
    shape: tuple[int, ...]
    begin: int
    end: int
    row: int
    place: int

    @property
    def size(self) -> int:
        return self.end - self.begin

    def of(self, buffer: Array) -> Array:
        """The factor's view."""
        return buffer[self.begin : self.end].reshape(self.shape)


class Piece(NamedTuple):
    """Elements `first` to `last` of a factor."""

    spot: Spot
    first: int
    last: int

    @property
    def begin(self) -> int:
        return self.spot.begin + self.first

    @property
    def end(self) -> int:
        return self.spot.begin + self.last

    def of(self, nested: Nested, dtype: np.dtype) -> Array:
        """They of an array, flat, in this dtype; itself where it can be."""
        array = nested[self.spot.layer][self.spot.name].reshape(-1)[self.first : self.last]
        return array.astype(dtype, copy=False)


class Block:
    """What NumPy works on at a time: neighbours of one row, `own` in a buffer."""

    def __init__(self, pieces: list[Piece]):
        self.own = slice(pieces[0].begin, pieces[-1].end)
        self.row = pieces[0].spot.row
        self._pieces = pieces

    def gathered(self, nested: Nested, dtype: np.dtype) -> Array:
        """The elements of separate arrays, to be read only."""
        found = [piece.of(nested, dtype) for piece in self._pieces]
        return found[0] if len(found) == 1 else np.concatenate(found)

    def bits(self, seed: int, step: np.ndarray) -> np.ndarray:
        """Random bits of the elements: for each factor those of `random_bits` for its place."""
        quads = [np.arange(p.first // 4, (p.last + 3) // 4, dtype=np.uint32) for p in self._pieces]
        places = np.array([piece.spot.place for piece in self._pieces], np.uint32)
        tensors = np.repeat(places, [len(own) for own in quads])
        words = random_words(np.concatenate(quads), tensors, seed, step).reshape(-1)
        if words.size == self.own.stop - self.own.start:
            return words
        # What fills a factor's last quad up is left out.
        ends = np.cumsum([4 * len(own) for own in quads])
        parts = zip(np.split(words, ends[:-1]), self._pieces, strict=True)
        return np.concatenate([part[: piece.last - piece.first] for part, piece in parts])


class Layout:
    """The spots of factors, one behind the other, in buffers of `length` elements.

    Factors of whole quads come first: all of them then begin at a multiple of four, and a kernel
    moves four values at once. Those of one row stand together, so that a block of NumPy's has one
    row. like: arrays of the shapes. rows: layer -> factor -> row, 0 by default. chosen: which of
    the arrays are in it; a factor's place is its number among all.
    """

    def __init__(
        self,
        like: Nested,
        rows: Mapping[str, Mapping[str, int]] | None = None,
        chosen: Callable[[Array], bool] = lambda array: True,
    ):
        named = [(layer, name, p) for layer, factors in like.items() for name, p in factors.items()]
        found = [
            (p.size % 4 > 0, rows[layer][name] if rows else 0, place, layer, name, tuple(p.shape))
            for place, (layer, name, p) in enumerate(named)
            if chosen(p)
        ]
        self.spots: list[Spot] = []
        self.length = 0
        for _, row, place, layer, name, shape in sorted(found):
            end = self.length + int(np.prod(shape, dtype=np.int64))
            self.spots.append(Spot(layer, name, shape, self.length, end, row, place))
            self.length = end
        self.blocks = list(self.cut(BLOCK))

    def cut(self, size: int) -> Iterator[Block]:
        """Blocks of at most so many elements; a multiple of four, for the sake of `Block.bits`."""
        pieces: list[Piece] = []  # of the block that is being filled
        for spot in self.spots:
            for first in range(0, spot.size, size):
                piece = Piece(spot, first, min(first + size, spot.size))
                full = pieces and piece.end - pieces[0].begin > size
                if full or (pieces and pieces[0].spot.row != spot.row):
                    yield Block(pieces)
                    pieces = []
                pieces.append(piece)
        if pieces:
            yield Block(pieces)

    def listed(self, nested: Nested) -> list[Array]:
        """The arrays in the order of the spots."""
        return [nested[spot.layer][spot.name] for spot in self.spots]

    def fill(self, buffer: Array, nested: Nested) -> Array:
        """Copy arrays into a buffer of any dtype; returns it."""
        for spot, array in zip(self.spots, self.listed(nested), strict=True):
            spot.of(buffer)[...] = array.astype(buffer.dtype, copy=False)
        return buffer

    def nested(self, buffer: Array) -> Own:
        """layer -> factor -> view."""
        out: Own = {}
        for spot in sorted(self.spots, key=lambda spot: spot.place):
            out.setdefault(spot.layer, {})[spot.name] = spot.of(buffer)
        return out
