"""Arrays by layer and factor, as an engine gives parameters and a pullback gives gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from ..arrays import Array, f32, on_gpu, require_float, wide_dtype
from ..errors import DeviceError, DtypeError, MatchError, ShapeError

Nested = Mapping[str, Mapping[str, Array]]  # layer -> factor -> array
Own = dict[str, dict[str, Array]]  # the same, made here


def items(nested: Mapping[str, Mapping]) -> Iterator[tuple[str, str, Array]]:
    """(layer, factor, array) in the order of the mappings."""
    for layer, factors in nested.items():
        for name, array in factors.items():
            yield layer, name, array


def mapped(function: Callable[[Array], Array], nested: Nested) -> Own:
    """function of every array."""
    return {
        layer: {name: function(array) for name, array in factors.items()}
        for layer, factors in nested.items()
    }


def require_gradients(grads: Nested, of: Nested, what: str = "gradient") -> None:
    """Raise MatchError, ShapeError or DeviceError unless every array of `of` has a gradient of its
    shape, where it lies.
    """
    for layer, name, p in items(of):
        g = grads.get(layer, {}).get(name)
        if g is None:
            raise MatchError(f"there is no {what} for factor {name!r} of layer {layer!r}")
        if g.shape != p.shape:
            raise ShapeError(
                f"the {what} of {layer}.{name} has shape {tuple(g.shape)}, "
                f"expected {tuple(p.shape)}"
            )
        if type(g) is not type(p) and on_gpu(g) != on_gpu(p):
            where = {True: "on the GPU", False: "on the CPU"}
            raise DeviceError(
                f"the {what} of {layer}.{name} lies {where[on_gpu(g)]}, the factor "
                f"{where[on_gpu(p)]}: move it with lycoris_cupy.to_device"
            )


def common_dtype(nested: Nested) -> np.dtype:
    """The wide dtype of all; raises DtypeError or DeviceError where they have not one in common."""
    found = [(f"{layer}.{name}", p) for layer, name, p in items(nested)]
    for name, p in found:
        require_float(p, name)
        first, other = found[0]
        if wide_dtype(p.dtype) != wide_dtype(other.dtype):
            raise DtypeError(
                f"{first} is {other.dtype} and {name} is {p.dtype}: f64 stands alone, give each "
                "dtype an optimizer of its own"
            )
        if on_gpu(p) != on_gpu(other):
            raise DeviceError(f"{first} and {name} lie on different devices: move one of them")
    return wide_dtype(found[0][1].dtype) if found else f32
