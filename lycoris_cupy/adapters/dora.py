"""DoRA on top of LoCon, LoHa or LoKr: the direction of the adapted weight, with a magnitude trained
for each output or input.  Liu et al. 2024, arXiv 2402.09353.

    V = W + alpha / rank * change        c = dora_scale / (|V| + eps)        W' = c * V
    rule 'base'        W + strength * (W' - W)           strength 0 is the layer
    rule 'reference'   V * (1 + strength * (c - 1))      LyCORIS's: strength 0 is W + change

|V| runs over everything but the outputs (dora_scale (O, 1, *1) in a file) or the inputs (1, I, *1),
over all groups at once; its gradient is followed. W is never multiplied out: W' - W is a scale of
the columns (or channels) of the layer's own product, see `Share`, and the change with that scale in
its last factor. dora_scale is kept wide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..arrays import Array, module_of, to_device, wide_dtype
from ..errors import LycorisError, ShapeError
from ..layers import Layer, LayerShape
from ..ops.columns import expand_rows
from ..ops.elementwise import add, cast
from ..ops.elementwise import scale as scaled_by
from ..ops.magnitude import magnitude, shifted
from ..ops.product import product
from ..ops.scale_columns import scale_columns
from ..ops.shapes import reshape, transpose
from ..ops.squares import AXES, changed_square
from ..tape import value_of
from .base import RULES, Adapter, Parameters, Share
from .factor import Factor
from .stacked import Stacked
from .thin import by_columns

KEY = "dora_scale"


@dataclass(frozen=True)
class DoRA(Stacked):
    """on: the adapter whose change is decomposed; alpha / rank stands inside the norm, outside is
    the strength alone. axis: 'output' or 'input'. rule: see above. Made
    by `DoRA.over`.
    """

    axis: str = "output"
    rule: str = "base"  # pyright: ignore

    keys = (KEY,)

    @classmethod
    def over(cls, on: Adapter, axis: str = "output", rule: str = "base") -> DoRA:
        """DoRA on an adapter. Raises LycorisError for one that cannot carry it."""
        for what, value, known in (("dora", axis, AXES), ("rule", rule, RULES)):
            if value not in known:
                raise LycorisError(f"{what} is {value!r}, expected one of {', '.join(known)}")
        if not on.decomposable:
            raise LycorisError(
                f"dora_scale beside {on.algorithm}: DoRA stands on locon, loha and lokr"
            )
        return cls(on.shape, on.rank, on.alpha, on=on, axis=axis, rule=rule)

    @property
    def title(self) -> str:
        return f"{self.on.title} with dora per {self.axis}"

    @property
    def scale_reason(self) -> str:
        return f"{self.on.scale_reason}, inside the norm"

    @property
    def network_args(self) -> dict[str, object]:
        return {
            **self.on.network_args,
            "dora_wd": True,
            "wd_on_output": self.axis == "output",
        }

    def factors(self) -> dict[str, Factor]:
        rows, columns = (1, self.shape.outputs) if self.axis == "output" else (self.shape.inputs, 1)
        return {**self.on.factors(), KEY: Factor(KEY, rows, columns, wide=True)}

    def init(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """The factors, and magnitudes of one: `start` puts the norms of the weight there."""
        ones = np.ones(self.flame_shape(self.factors()[KEY]), np.float32)
        return {**self.on.init(rng), KEY: ones}

    def start(self, rng: np.random.Generator, weight: Array) -> dict[str, np.ndarray]:
        out = self.on.start(rng, weight)
        square = to_device(changed_square(weight, axis=self.axis), "cpu")
        return {**out, KEY: np.sqrt(square).reshape(self.flame_shape(self.factors()[KEY]))}

    def kept(self, weight: Array) -> dict[str, Array]:
        """|W|^2 of each output or input, and alpha / rank, on the device of the weight."""
        return {
            **self.on.kept(weight),
            "weight_square": changed_square(weight, axis=self.axis),
            "alpha_over_rank": self._alpha_over_rank(weight),
        }

    def _alpha_over_rank(self, weight: Array) -> Array:
        return module_of(weight).full(1, self.on.scale, wide_dtype(weight.dtype))

    def delta_weight(self, weight: Array, p: Parameters, scale: Array) -> Array:
        delta, total = self._built(weight, p)
        k, own = self._factors(p, total, scale)
        own_share = shifted(k, scale, nothing(k))
        base = _scaled(cast(weight, delta.dtype), own_share, self.axis)
        return add(_scaled(delta, own, self.axis), base)

    def contribute(
        self, change: Array | None, layer: Layer, x: Array, p: Parameters, scale: Array
    ) -> tuple[Array, Share | None]:
        weight, delta = layer.matrix, None
        p = p if "weight_square" in p else {**p, **self.kept(weight)}
        inner = p["alpha_over_rank"]
        if self.on.route == "delta":  # the change is built anyway: its norm is one more read
            delta, total = self._built(weight, p)
        else:
            total = self.on.square(weight, p, p["weight_square"], inner, self.axis)
        k, own = self._factors(p, total, scale)
        columns: Array | None = own
        if self.axis == "input":
            x, columns = scale_columns(x, over_groups(own, layer)), None
        elif delta is None:  # a scale beside the sum that the layer's own columns go into
            columns, inner = scaled_by(own, inner), None
        if delta is not None:
            change = product(x, by_columns(delta, columns), layer.window, add=change)
        else:
            change = self.on.apply(change, layer, x, p, inner, columns)
        return change, Share(self.axis, k, scale)

    def _built(self, weight: Array, p: Parameters) -> tuple[Array, Array]:
        """The change at alpha / rank, and the squared norms of W plus it."""
        inner = p["alpha_over_rank"] if "alpha_over_rank" in p else self._alpha_over_rank(weight)
        delta = self.on.delta_weight(weight, p, inner)
        return delta, changed_square(weight, delta, axis=self.axis)

    def _factors(self, p: Parameters, total: Array, strength: Array) -> tuple[Array, Array]:
        """(strength * c, what the change is multiplied by)."""
        m = reshape(cast(p[KEY], total.dtype), total.shape)
        k = magnitude(m, total, strength)
        return k, k if self.rule == "base" else shifted(k, strength)

    def load(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        factor = self.factors()[KEY]
        m = tensors[KEY].reshape(factor.in_file(self.shape))  # `axis_of` has seen its shape
        return {**self.on.load(tensors), KEY: factor.read(m, self.shape)}


def axis_of(given: tuple[int, ...], shape: LayerShape, told: str | None) -> str:
    """The axis that a dora_scale of this shape runs along; told: by metadata or the caller, for
    shapes that allow both.

    (O, 1, *1) is per output and (1, I, *1) per input. (O,) and (1, O, *1), as PEFT keeps them, are
    per output, unless they could be a layer's inputs too.
    """
    outputs, inputs = shape.outputs, shape.inputs
    tail = all(n == 1 for n in given[2:])
    first_two = given[:2]
    readings = {
        "output": tail and first_two in ((outputs, 1), (outputs,)),
        "input": tail and first_two in ((1, inputs), (inputs,)),
    }
    if len(given) > 2 and tail and first_two == (1, outputs):
        readings["output"] = True
    found = [axis for axis in AXES if readings[axis]]
    if not found:
        raise ShapeError(
            f"{KEY} has shape {tuple(given)}, expected {(outputs, 1, *given[2:])} per output or "
            f"{(1, inputs, *given[2:])} per input on {shape}"
        )
    if len(found) == 2:
        if told is None:
            raise ShapeError(
                f"{KEY} of shape {tuple(given)} on {shape} can mean {outputs} magnitudes per "
                f"output or {inputs} per input, and no metadata (wd_on_output) says which: give "
                "dora='output' or dora='input'"
            )
        return told
    return found[0]


def over_groups(c: Array, layer: Layer) -> Array:
    """(IN / groups,) as channels of all groups, (IN,)."""
    groups = layer.window.groups
    return c if groups == 1 else reshape(expand_rows(c, (groups, c.shape[0])), (-1,))


def nothing(c: Array) -> Array:
    """Zeros like c: where a sum of shares starts that leaves the layer's own product out."""
    return module_of(value_of(c)).zeros(c.shape, c.dtype)


def _scaled(w: Array, c: Array, axis: str) -> Array:
    """w (taps, IN, OUT) with its outputs or inputs multiplied by c."""
    if axis == "output":
        return by_columns(w, c)
    return transpose(by_columns(transpose(w, (0, 2, 1)), c), (0, 2, 1))
