"""The before / after picture: a row for each held-out photograph, a column for each upscale."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from .photographs import FACTOR, to_bytes

CROP = 128  # pixels of the original, from the middle of the tested square
ZOOM = 2
LABEL = 18  # pixels above the crops
GAP = 4


def before_after(path: Path, columns: dict[str, list[np.ndarray]]) -> None:
    """columns: label -> a picture (H, W, 3) a row; the pixels of a smaller one are drawn larger."""
    rows = max(len(pictures) for pictures in columns.values())
    side = CROP * ZOOM
    size = (len(columns) * (side + GAP) - GAP, LABEL + rows * (side + GAP) - GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    full = max(picture.shape[0] for pictures in columns.values() for picture in pictures)
    for column, (label, pictures) in enumerate(columns.items()):
        x = column * (side + GAP)
        draw.text((x + 4, 3), label, fill="black")
        for row, picture in enumerate(pictures):
            if picture.shape[0] < full:
                picture = picture.repeat(FACTOR, 0).repeat(FACTOR, 1)
            top, left = ((extent - CROP) // 2 for extent in picture.shape[:2])
            crop = to_bytes(picture[top : top + CROP, left : left + CROP])
            crop = crop.repeat(ZOOM, 0).repeat(ZOOM, 1)
            sheet.paste(Image.fromarray(crop), (x, LABEL + row * (side + GAP)))
    sheet.save(path)
