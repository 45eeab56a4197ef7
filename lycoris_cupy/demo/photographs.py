"""Photographs that scikit-image's wheel brings, and the damage that the network is taught to undo.

Pictures are (H, W, 3) f32 in [0, 1]. Low resolution is the mean of 2 x 2 pixels; then every second
row is darkened, as the scan lines of a screen are, and salt-and-pepper noise comes over it: each
pixel of low resolution is, with probability SPOTS, replaced in all channels by black or by white.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import FileFormatError
from .extra import file_of
from .upscaler import FACTOR

TRAINING = ("motorcycle_left.png", "rocket.jpg", "camera.png", "brick.png", "ihc.png")
# Name -> file, and the top and left of the square that is tested.
HELD_OUT = {
    "astronaut": ("astronaut.png", 0, 96),
    "coffee": ("coffee.png", 72, 172),
    "cat": ("chelsea.png", 20, 90),
}
SIZE = 256  # of that square
LINE = 0.75  # brightness of the darker rows
SPOTS = 0.06  # share of the pixels of low resolution that are lost, half of them to each colour
BORDER = 4  # pixels left out of a PSNR at each side


def read_picture(path: Path) -> np.ndarray:
    """Any file that Pillow reads, as RGB."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"), np.float32) / 255
    except (OSError, Image.DecompressionBombError) as error:
        raise FileFormatError(f"cannot read {path} as a picture: {error}") from error


def save_picture(path: Path, picture: np.ndarray) -> None:
    Image.fromarray(to_bytes(picture)).save(path)


def to_bytes(picture: np.ndarray) -> np.ndarray:
    return (picture.clip(0, 1) * 255).round().astype(np.uint8)


def training_photographs() -> list[np.ndarray]:
    return [read_picture(file_of("skimage", "data", name)) for name in TRAINING]


def held_out(seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Name -> (damaged, original) squares of photographs that are not trained on."""
    rng = np.random.default_rng([seed, 1])
    out = {}
    for name, (file, top, left) in HELD_OUT.items():
        photograph = read_picture(file_of("skimage", "data", file))
        original = photograph[top : top + SIZE, left : left + SIZE]
        out[name] = damaged(original, rng), original
    return out


def damaged(original: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(2H, 2W, 3) -> (H, W, 3): halved, the even or the odd rows darkened, with spots."""
    h, w = original.shape[0] // FACTOR, original.shape[1] // FACTOR
    low = original.reshape(h, FACTOR, w, FACTOR, 3).mean((1, 3))
    low[rng.integers(2) :: 2] *= LINE
    spots = rng.random((h, w), np.float32)
    low[spots < SPOTS] = 1
    low[spots < SPOTS / 2] = 0
    return low


def batch(
    photographs: list[np.ndarray], count: int, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(count, size, size, 3) damaged and (count, 2 size, 2 size, 3) original patches.

    From random places; half of them are mirrored.
    """
    pairs = []
    for _ in range(count):
        photograph = photographs[rng.integers(len(photographs))]
        room = (extent - FACTOR * size + 1 for extent in photograph.shape[:2])
        top, left = (rng.integers(places) for places in room)
        patch = photograph[top : top + FACTOR * size, left : left + FACTOR * size]
        patch = patch[:, ::-1] if rng.integers(2) else patch
        pairs.append((damaged(patch, rng), patch))
    low, original = zip(*pairs, strict=True)
    return np.stack(low), np.stack(original)


def bicubic(low: np.ndarray) -> np.ndarray:
    """Pillow's bicubic upscale, the yardstick: what one gets without a network."""
    size = (low.shape[1] * FACTOR, low.shape[0] * FACTOR)
    image = Image.fromarray(to_bytes(low)).resize(size, Image.Resampling.BICUBIC)
    return np.asarray(image, np.float32) / 255


def psnr(picture: np.ndarray, original: np.ndarray) -> float:
    """-10 log10 of the mean squared difference, dB, of RGB in [0, 1], without the BORDER."""
    inner = (slice(BORDER, -BORDER), slice(BORDER, -BORDER))
    difference = picture[inner].astype(np.float64) - original[inner]
    return float(-10 * np.log10(np.mean(difference**2)))
