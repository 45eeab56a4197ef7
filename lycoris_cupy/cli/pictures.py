"""Pictures as batches: damaged on the fly, or in pairs.  (N, H, W, 3) f32 in [0, 1]."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..demo.extra import require_extra
from ..errors import FileFormatError, LycorisError, MatchError

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
Draw = Callable[[list, int, int, np.random.Generator], tuple[np.ndarray, np.ndarray]]


def damaged_pictures(folder: Path | None, patch: int) -> tuple[Draw, list[Any]]:
    """(draw, pictures) of a folder, or of the demo's photographs: draw(pictures, count, patch, rng)
    gives damaged patches and twice as large ones as they should be, see demo/photographs.py.
    """
    require_extra()
    from ..demo.photographs import batch, read_picture, training_photographs

    if folder is None:
        return batch, training_photographs()
    pictures = []
    for path in _files(folder):
        pictures.append(read_picture(path))
        _require_room(path, pictures[-1], 2 * patch, f"a damaged patch of {patch}")
    return batch, pictures


def picture_pairs(folder: Path, patch: int) -> tuple[Draw, list[Any]]:
    """(draw, pairs) of the pictures of the same names in input/ and target/. A target is as large
    as its input, or a whole number of times larger, the same for all.
    """
    require_extra()
    from ..demo.photographs import read_picture

    inputs, targets = ({p.name: p for p in _files(folder / n)} for n in ("input", "target"))
    alone = sorted(inputs.keys() ^ targets.keys())
    if alone:
        side = "input" if alone[0] in inputs else "target"
        raise MatchError(f"{folder}: {alone[0]} is in {side}/ alone, expected pairs of one name")
    out = []
    for name, path in inputs.items():
        x, target = read_picture(path), read_picture(targets[name])
        factor = target.shape[0] // x.shape[0]
        if not factor or target.shape != (factor * x.shape[0], factor * x.shape[1], 3):
            raise FileFormatError(
                f"{targets[name]}: has {_size(target)} pixels, expected a multiple of its input's "
                f"{_size(x)}"
            )
        if out and factor != out[0][2]:
            raise FileFormatError(
                f"{targets[name]}: is {factor} times its input, others are {out[0][2]} times"
            )
        _require_room(path, x, patch, "a patch")
        out.append((x, target, factor))
    return _pair_batch, out


def _pair_batch(
    pairs: list, count: int, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Patches of the same place in input and target; half of them are mirrored."""
    found = []
    for _ in range(count):
        x, target, factor = pairs[rng.integers(len(pairs))]
        top, left = (rng.integers(extent - size + 1) for extent in x.shape[:2])
        low = x[top : top + size, left : left + size]
        high = target[factor * top :, factor * left :][: factor * size, : factor * size]
        turn = slice(None, None, -1 if rng.integers(2) else 1)
        found.append((low[:, turn], high[:, turn]))
    low, high = zip(*found, strict=True)
    return np.stack(low), np.stack(high)


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise LycorisError(f"{folder}: there is no such folder of pictures")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS)
    if not found:
        raise LycorisError(f"{folder}: holds no picture ({', '.join(ENDINGS)})")
    return found


def _require_room(path: Path, picture: np.ndarray, size: int, what: str) -> None:
    if min(picture.shape[:2]) < size:
        raise LycorisError(f"{path}: has {_size(picture)} pixels, {what} needs {size} x {size}")


def _size(picture: np.ndarray) -> str:
    return f"{picture.shape[0]} x {picture.shape[1]}"
