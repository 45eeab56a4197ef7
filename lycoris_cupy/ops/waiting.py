"""What an adapter adds to a layer's output, not carried out yet: it waits for the layer's own
product, which may take it in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..arrays import Array
from .window import Window

if TYPE_CHECKING:
    from .extended import Pending


class Waiting:
    def joined(self, x, w, window: Window, bias, c, spend: bool) -> Array | None:
        """c * (x * w) + this + bias, where kernels of its own are the better way; else None."""
        return None

    def plain(self) -> Pending:
        """The same as a product of two arrays."""
        raise NotImplementedError
