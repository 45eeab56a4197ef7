"""The files of `merge_large`, made and compared in a process of their own, so that the measuring
one stays small.

    python -m benchmarks.merge_files BASE STYLE DTYPE
    python -m benchmarks.merge_files compare A B
"""

from __future__ import annotations

import json
import sys
from functools import partial
from math import prod

import numpy as np

from benchmarks import sdxl
from lycoris_cupy import LayerShape, LoCon, LoKr, bf16
from lycoris_cupy.io.adapter_file import write_adapter
from lycoris_cupy.io.header import NUMPY
from lycoris_cupy.io.safetensors import Stored, open_file, write

KINDS = {"bf16": "BF16", "f16": "F16", "f8_e4m3": "F8_E4M3"}


def make(base: str, style: str, dtype: str) -> None:
    """A checkpoint of normal values (deviation 0.02) and an adapter whose changes are about a
    hundredth of that.
    """
    rng = np.random.default_rng(0)
    all_shapes = sdxl.shapes()
    pool = (0.02 * rng.standard_normal(1 << 25, np.float32)).astype(NUMPY[KINDS[dtype]])

    def values(shape: tuple[int, ...], at: int) -> np.ndarray:
        # Random at every place of one tensor, from a pool: normal numbers for all take minutes.
        rolled = np.roll(pool[: min(pool.size, max(prod(shape), 1))], at)
        return np.resize(rolled, shape)

    tensors = {
        name: Stored(KINDS[dtype], shape, partial(values, shape, 7919 * i))
        for i, (name, shape) in enumerate(all_shapes.items())
    }
    write(base, tensors, {"format": "pt"})
    linear, convolutions = sdxl.adapted(all_shapes)
    adapters = {}
    for names, build in ((linear, _lora), (convolutions, _lokr)):
        for name in names:
            shape = LayerShape.of_file(all_shapes[f"{name}.weight"])
            adapters[name.removeprefix(sdxl.UNET)] = build(shape, rng)
    write_adapter(style, adapters, prefix="lora_unet_")


def _lora(shape: LayerShape, rng: np.random.Generator):
    return _random(LoCon(shape, 16, 16.0), rng, 0.007)


def _lokr(shape: LayerShape, rng: np.random.Generator):
    return _random(LoKr.create(shape, 1, 1.0, factor=8, full_matrix=True), rng, 0.015)


def _random(adapter, rng, deviation):
    return adapter, {
        name: (deviation * rng.standard_normal(adapter.flame_shape(factor))).astype(bf16)
        for name, factor in adapter.factors().items()
    }


def compare(first: str, second: str) -> dict:
    """How many tensors and values of two files differ, and the largest difference in their ulps."""
    tensors = values = total = 0
    largest = 0.0
    with open_file(first) as a, open_file(second) as b:
        assert set(a) == set(b)
        for name in a:
            total += prod(a.shape(name))
            if np.array_equal(a.raw(name), b.raw(name)):
                continue
            x, y = a[name].astype(np.float32), b[name].astype(np.float32)
            tensors, values = tensors + 1, values + int((x != y).sum())
            largest = max(largest, float(np.abs(x - y).max() / np.abs(x).max()))
    return {"tensors": tensors, "values": values / total, "largest_over_largest": largest}


if __name__ == "__main__":
    if sys.argv[1] == "compare":
        print(json.dumps(compare(*sys.argv[2:])))
    else:
        make(*sys.argv[1:])
