"""What each factor's learning rate is multiplied by: name patterns, and LoRA+."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from ..errors import LycorisError, MatchError
from .nested import Nested, items


def rate_factors(
    parameters: Nested,
    patterns: Mapping[str, float] | None = None,
    plus: float = 1.0,
) -> dict[str, dict[str, float]]:
    """layer -> factor -> multiplier, for an optimizer's `rates`.

    patterns: fnmatch pattern -> multiplier, of a layer's name ('attn*') or of layer.factor
    ('*.w1'); what several match is multiplied by all. plus: the ratio of LoRA+, which multiplies
    the side of the outputs. Raises MatchError for a pattern or a ratio that meets nothing.
    """
    out = {layer: dict.fromkeys(factors, 1.0) for layer, factors in parameters.items()}
    for pattern, factor in (patterns or {}).items():
        _require(f"the rate of {pattern!r}", factor)
        found = [
            (layer, name)
            for layer, name, _ in items(parameters)
            if fnmatchcase(layer, pattern) or fnmatchcase(f"{layer}.{name}", pattern)
        ]
        if not found:
            some = ", ".join(f"{layer}.{name}" for layer, name, _ in items(parameters))
            raise MatchError(f"{pattern!r} matches no layer and no factor of: {some[:200]}")
        for layer, name in found:
            out[layer][name] *= factor
    _require("plus", plus)
    ups = [(layer, name) for layer, name, _ in items(parameters) if is_up(name)]
    if plus != 1 and not ups:
        raise MatchError("plus was given, but no factor is an up side: LoRA+ has nothing to raise")
    for layer, name in ups:
        out[layer][name] *= plus
    return out


def is_up(name: str) -> bool:
    """Whether a factor goes from the rank to the outputs: LoCon's up, both ups of LoHa, LoKr's w1_a
    and w2_up.

    Hayou et al. 2024, arXiv 2402.12354: a product moves as far as it can, at any width, if the rate
    of the side that reads the inputs falls with their number and that of the side that reads the
    rank does not. So the sum over how many values an output is decides. Both products of LoHa are
    of that kind, hence both ups. LoKr's w1 and w2 in one piece are no product of two sides and keep
    the plain rate, as do Tucker cores, magnitudes and biases.
    """
    return name in ("up", "w1_a") or name.endswith("_up")


def _require(name: str, value: float) -> None:
    if not 0 <= value < float("inf"):
        raise LycorisError(f"{name} is {value}, expected at least 0")
