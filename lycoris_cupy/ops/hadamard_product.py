"""A linear layer and a LoHa in one product, and `PendingHadamard`, a LoHa's part of an output that
waits for the layer's.

    y = x @ w + x @ change + add + bias          one sum, rounded once
    change = scale * (down1 @ up1) * (down2 @ up2)          elementwise, rounded by itself

On Hopper neither the change nor its gradient is ever in memory, for few positions and up to 16
ranks: a launch each for y, dx and the factors (see `skinny_hadamard_gpu`, `few_hadamard_gpu`).
Hyeon-Woo et al. 2022, arXiv 2108.06098.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from .. import plan
from ..arrays import Array, like, on_gpu, require_same
from ..errors import ShapeError
from ..tape import Deferred, Primitive, Var, value_of
from . import product_gpu
from .columns import column_sum
from .conv_gpu import processors
from .elementwise import cast, require_factor
from .extended_plan import Second
from .few_hadamard_gpu import few_hadamard_gradients, few_hadamard_plan
from .hadamard import hadamard_gradients, hadamard_matrix
from .product import LINEAR, deferred_dx, finished, out_shape, product_dw, wide_product
from .product_ways import forward_ways
from .skinny_gpu import MOST
from .skinny_hadamard_gpu import RANKS, hadamard_dx, hadamard_forward, hadamard_plans
from .waiting import Waiting
from .window import Window

if TYPE_CHECKING:
    from .extended import Pending

Factors = tuple[Array, Array, Array, Array]  # down1, up1, down2, up2: (1, IN, R), (1, R, OUT)


@dataclass(frozen=True)
class PendingHadamard(Waiting):
    """add + x @ change, not computed yet.  factors: of x's dtype, or wide. factored: makes the same
    change of rank R^2, for where it stands alone or other kernels are faster.
    """

    x: Array
    factors: Factors
    add: Array | None
    scale: Array
    factored: Callable[[], Pending]

    def plain(self) -> Pending:
        return self.factored()

    def joined(self, x, w, window: Window, bias, c, spend: bool) -> Array | None:
        own = self.x is x and c is None and window.pointwise and window.groups == 1
        if not own or isinstance(w, Var):
            return None
        factors = tuple(cast(f, x.dtype) for f in self.factors)
        values = [value_of(a) for a in (x, w, *factors, self.add, bias)]
        planned = hadamard_plans(*values)
        if planned is None:
            return None
        ranks = factors[0].shape[2] ** 2
        shapes = tuple(x.shape), tuple(w.shape), window, Second((1, ranks, w.shape[2]), LINEAR)
        what, ways, operations, moved = forward_ways(*shapes, True, True, x.dtype, processors())
        inner = forward_ways(x.shape, (1, w.shape[1], ranks), LINEAR, None, True, True, x.dtype,
                             processors(), bare=True)[1]  # fmt: skip
        made = min(inner.values()) + 2 * plan.moving(w.shape[2] * ranks * x.dtype.itemsize)
        ways = {f"{name} of rank {ranks}": seconds + made for name, seconds in ways.items()}
        ways |= {"hadamard": planned[0].seconds(moved)}
        if plan.choose(f"{what}, of a LoHa", ways, operations, moved) != "hadamard":
            return None
        more = {"scale": self.scale, "add": self.add, "bias": bias, "spend": spend}
        return hadamard_product(x, w, factors, **more)


def waits(x: Array, rank: int, window: Window) -> bool:
    """Whether a `PendingHadamard` may be worth its while."""
    few = window.pointwise and window.groups == 1 and prod(x.shape[:-1]) <= MOST
    return few and rank in RANKS and on_gpu(value_of(x))


def hadamard_product(
    x: Array,
    w: Array,
    factors: Factors,
    *,
    scale: Array | None = None,
    add: Array | None = None,
    bias: Array | None = None,
    spend: bool = False,
) -> Array:
    """y as above.  x: (..., IN). w: (1, IN, OUT). factors: (1, IN, R), (1, R, OUT), (1, IN, R),
    (1, R, OUT). scale: (1,) wide, a constant of the tape. add: (..., OUT). bias: (OUT,). spend: add
    is read nowhere else, and may be where y is written. All of one dtype, that of y. Raises
    ShapeError, DtypeError.
    """
    shape = out_shape(x.shape, w.shape, LINEAR)
    down, up = (1, w.shape[1], factors[0].shape[-1]), (1, factors[0].shape[-1], w.shape[2])
    expected = (("down1", down), ("up1", up), ("down2", down), ("up2", up))
    arrays = (*factors, add, bias)
    for (name, wanted), array in zip(
        (*expected, ("add", shape), ("bias", shape[-1:])), arrays, strict=True
    ):
        if array is None:
            continue
        require_same("x", value_of(x), name, value_of(array))
        if tuple(array.shape) != wanted:
            raise ShapeError(f"{name} has shape {tuple(array.shape)}, expected {wanted}")
    if scale is not None:
        require_factor(scale, x)
    return _hadamard_product(x, w, bias, add, *factors, scale, spend=spend)


def _cpu(x, w, bias, add, d1, u1, d2, u2, scale, *, spend):
    change = like(hadamard_matrix(d1, u1, d2, u2, scale), x)
    total = wide_product(x, w, LINEAR)
    total += wide_product(x, change, LINEAR)
    return finished(total, None, add, bias, x)


def _gpu(x, w, bias, add, d1, u1, d2, u2, scale, *, spend):
    factors = d1, u1, d2, u2
    planned = hadamard_plans(x, w, *factors, add, bias)
    if planned is not None:
        more = {"scale": scale, "add": add, "bias": bias, "out": add if spend else None}
        return hadamard_forward(x, w, factors, planned[0], **more)
    change = cast(hadamard_matrix(*factors, scale), x.dtype)
    more = {"scale": None, "add": add, "bias": bias, "spend": spend}
    return product_gpu.forward(
        x, w, LINEAR, extra=product_gpu.Extra(x, change, LINEAR, None), **more
    )


def _vjp(needs, out, x, w, bias, add, d1, u1, d2, u2, scale, *, spend):
    factors = d1, u1, d2, u2

    def dx(g) -> Deferred:
        def run(add, term, spend):
            planned = hadamard_plans(x, w, *factors, g, add) if on_gpu(g) else None
            if planned is not None:
                out = add if spend else None
                return hadamard_dx(g, w, factors, planned[1], scale=scale, add=add, out=out)
            change = cast(hadamard_matrix(*factors, scale), g.dtype)
            both = (g, change, LINEAR, None)
            return deferred_dx(g, w, None, LINEAR, x.shape[:-1]).run(add, both, spend)

        return Deferred(run)

    def dfactors(g) -> tuple:
        planned = few_hadamard_plan(x, g, *factors) if on_gpu(g) else None
        if planned is not None:
            return few_hadamard_gradients(x, g, factors, planned, scale=scale)
        return hadamard_gradients(needs[4:8], product_dw(x, g, LINEAR), *factors, scale)

    def pull(g):
        return (
            dx(g) if needs[0] else None,
            product_dw(x, g, LINEAR) if needs[1] else None,
            column_sum(g) if needs[2] else None,
            g if needs[3] else None,
            *(dfactors(g) if any(needs[4:8]) else (None,) * 4),
            None,
        )

    return pull


_hadamard_product = Primitive("hadamard_product", _cpu, _gpu, _vjp)
