"""The singular values of an adapter's change, and the plain LoCon that has the largest of them.

The change of a layer is taken as the matrix (taps * IN, OUT): that is what a down product over the
kernel and one up for all taps can say. In f64 on the CPU; a dense change is built only where the
adapter stores one.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .adapters import Adapter, LoCon
from .errors import LycorisError
from .layers import LayerShape
from .svd import Svd


def spectrum_of(adapter: Adapter, params: Mapping[str, np.ndarray], vectors: bool = True) -> Svd:
    """The decomposition of the adapter's change at strength 1, scale included.

    params: factors in Flame layout, on the CPU. vectors: False for the values alone. Raises
    LycorisError for an algorithm whose change depends on the weight it is put on.
    """
    wide = {name: np.asarray(value).astype(np.float64) for name, value in params.items()}
    found = adapter.svd(adapter.canonical(wide), vectors)
    if found is None:
        raise LycorisError(
            f"{adapter.algorithm} on {adapter.shape} is no sum of factors of its own: its change "
            "depends on the weight it is put on"
        )
    return found.scaled(adapter.scale)


def locon_of(shape: LayerShape, svd: Svd, rank: int) -> tuple[LoCon, dict[str, np.ndarray]]:
    """The LoCon of this rank that is nearest to a change of the layer, f64, Flame layout; scale 1.

    Exact where `svd.error(rank)` is 0. Raises ShapeError if the decomposition is not the layer's.
    """
    down, up = svd.factors(rank)
    adapter = LoCon(shape, rank, float(rank))
    forms = {name: adapter.flame_shape(factor) for name, factor in adapter.factors().items()}
    return adapter, {"down": down.reshape(forms["down"]), "up": up.reshape(forms["up"])}
