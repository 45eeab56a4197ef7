"""Arrays by layer and factor, as an engine gives parameters and a pullback gives gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from ..arrays import Array
from ..errors import MatchError, ShapeError

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
    """Raise MatchError or ShapeError unless every array of `of` has a gradient of its shape."""
    for layer, name, p in items(of):
        g = grads.get(layer, {}).get(name)
        if g is None:
            raise MatchError(f"there is no {what} for factor {name!r} of layer {layer!r}")
        if g.shape != p.shape:
            raise ShapeError(
                f"the {what} of {layer}.{name} has shape {tuple(g.shape)}, "
                f"expected {tuple(p.shape)}"
            )
