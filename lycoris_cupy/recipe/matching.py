"""What a recipe makes of the layers of a network: an adapter on each layer that is taken, and why
the others are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ..adapters import Adapter, new_adapter, takes
from ..errors import LycorisError, MatchError
from ..layers import LayerShape
from ..norms import NormShape
from .recipe import Recipe
from .selectors import is_group, meant, nearest
from .statement import Statement

_LISTED = 8  # names in an error
_SITS_ON = {
    "norm": "it sits on norms",
    "tlora": "it sits on linear layers and 1x1 convolutions without groups",
}


class Selected(NamedTuple):
    """role: 'targets', 'exclude' or 'override'. matched: how many layers the selector means. acts:
    on how many of them it tells: those that it brought, kept away, or changed.
    """

    role: str
    selector: str
    matched: int
    acts: int


class Skipped(NamedTuple):
    """A layer that is meant, but that the algorithm cannot sit on."""

    layer: str
    shape: LayerShape
    reason: str


@dataclass
class Matching:
    """adapters: layer -> its new adapter, in the order of the layers."""

    adapters: dict[str, Adapter] = field(default_factory=dict)
    selected: tuple[Selected, ...] = ()
    skipped: list[Skipped] = field(default_factory=list)


def match(recipe: Recipe, shapes: Mapping[str, LayerShape]) -> Matching:
    """The adapters of a recipe on layers of these shapes.

    Raises MatchError for a selector that tells of no layer, LycorisError for an option that no
    layer can use or that does not fit a layer.
    """
    targets, exclude = recipe.selectors
    by_role = [("targets", targets), ("exclude", exclude), ("override", tuple(recipe.override))]
    found = {(role, s): meant(s, shapes) for role, selectors in by_role for s in selectors}
    for (role, selector), layers in found.items():
        _require_some(role, selector, layers, shapes, recipe)
    out = Matching()
    kept = set().union(*(found["targets", s] for s in targets))
    gone = set().union(*(found["exclude", s] for s in exclude))
    wanted = kept - gone
    for name in (name for name in shapes if name in wanted):
        said = recipe.statement(name, shapes[name])
        if takes(str(said.algorithm), shapes[name]):
            out.adapters[name] = _adapter(name, shapes[name], said)
        else:
            out.skipped.append(Skipped(name, shapes[name], _reason(said, shapes[name])))
    acts = {"targets": out.adapters.keys(), "exclude": kept, "override": out.adapters.keys()}
    out.selected = tuple(
        Selected(role, selector, len(layers), len(acts[role] & set(layers)))
        for (role, selector), layers in found.items()
    )
    _require_effects(recipe, found, out, gone)
    _require_space(recipe.said, out.adapters.values(), "")
    for selector, one in recipe.override.items():
        layers = [out.adapters[n] for n in found["override", selector] if n in out.adapters]
        _require_space(one, layers, f"override of {selector!r}: ")
    return out


def _adapter(name: str, shape: LayerShape, said: Statement) -> Adapter:
    try:
        made = said.settings(shape)
        return new_adapter(made.algorithm, shape, made.rank, made.alpha, **made.options)
    except LycorisError as error:
        raise type(error)(f"layer {name!r}: {error}") from error


def _reason(said: Statement, shape: LayerShape) -> str:
    reason = f"{said.algorithm} does not sit on {shape}"
    if isinstance(shape, NormShape):
        return f"{reason}: train_norm = true puts norm there"
    hint = _SITS_ON.get(str(said.algorithm))
    return f"{reason}: {hint}" if hint else reason


def _require_some(
    role: str, selector: str, layers: list[str], shapes: Mapping[str, LayerShape], recipe: Recipe
) -> None:
    """A selector of the caller's must mean a layer; to leave out a kind that is not there is no
    slip.
    """
    if layers or (role == "exclude" and is_group(selector)):
        return
    if recipe.preset is not None and role == "targets":
        return
    text = f"{role}: {selector!r} matches none of the layers"
    if not is_group(selector):
        close, names = nearest(selector, list(shapes)), list(shapes)
        told = ", ".join(map(repr, close or names[:_LISTED]))
        more = f" and {len(names) - _LISTED} more" if not close and len(names) > _LISTED else ""
        text += f"; {'nearest' if close else 'they are'}: {told}{more}"
    raise MatchError(text)


def _require_effects(recipe: Recipe, found, out: Matching, gone: set[str]) -> None:
    if not out.adapters and (recipe.preset is not None or not out.skipped):
        what = "targets" if recipe.preset is None else f"preset {recipe.preset!r}"
        why = f": {_told(out.skipped[0])}" if out.skipped else ""
        raise MatchError(f"{what}: no layer is left to put an adapter on{why}")
    skipped = {one.layer: one for one in out.skipped}
    for one in out.selected:
        if one.acts or one.role == "exclude" or (recipe.preset and one.role == "targets"):
            continue
        layers = found[one.role, one.selector]
        text = f"{one.role}: {one.selector!r} matches {', '.join(map(repr, layers[:3]))}"
        text += f" and {len(layers) - 3} more" if len(layers) > 3 else ""
        why = next((_told(skipped[name]) for name in layers if name in skipped), None)
        if why is None:
            why = "exclude leaves out all of them" if gone & set(layers) else "none is a target"
        raise MatchError(f"{text}, but {why}")


def _told(skipped: Skipped) -> str:
    return f"layer {skipped.layer!r}: {skipped.reason}"


def _require_space(said: Statement, adapters: Iterable[Adapter], where: str) -> None:
    words = list(said.needs_space)
    adapters = list(adapters)
    if words and all(adapter.shape.taps == 1 for adapter in adapters):
        of = f"the {len(adapters)} layers" if len(adapters) != 1 else "the one layer"
        raise MatchError(
            f"{where}{words[0]} acts on kernels over space alone (an extent above 1), and none of "
            f"{of} taken has one: leave it out"
        )
