"""Names: a module of an adapter file to the layers it means.

Dots that became underscores cannot be told from underscores, so names are compared folded, whole,
never by a prefix. A module may mean one of several layers: the caller takes the one that its
factors fit, and refuses to choose where several do.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches

from ..errors import MatchError
from ..layers import LayerShape
from .aliases import Share, aliases
from .dialects import Parts
from .keys import Key

# Where checkpoints keep the parts of a model: adapter files leave this much of a tensor's name out.
# None: may be any part.
CONTAINERS: dict[str, str | None] = {
    "model.diffusion_model.": "unet",
    "diffusion_model.": "unet",
    "unet.": "unet",
    "transformer.": "unet",
    "model.": None,
    "cond_stage_model.transformer.": "te1",
    "cond_stage_model.model.": "te1",
    "conditioner.embedders.0.transformer.": "te1",
    "conditioner.embedders.1.model.": "te2",
    "text_encoder.": "te1",
    "text_encoder_2.": "te2",
    "text_encoder_3.": "te3",
    "text_encoders.clip_l.transformer.": "te1",
    "text_encoders.clip_g.transformer.": "te2",
    "text_encoders.t5xxl.transformer.": "te3",
}

# The same at the front of a folded path: LyCORIS writes them when it wraps a whole pipeline.
_FOLDED_CONTAINERS = {name.replace(".", "_"): part for name, part in CONTAINERS.items() if part}

# The container that stands for a part where a dialect has no prefix for it.
HOMES = {
    "unet": "unet.",
    "te1": "text_encoder.",
    "te2": "text_encoder_2.",
    "te3": "text_encoder_3.",
}


def fold(name: str) -> str:
    """The name of a layer or of its weight as it stands in a module name: without `.weight`, dots
    made underscores.
    """
    return name.removesuffix(".weight").replace(".", "_")


# torch's MultiheadAttention, and OpenCLIP with it, keeps q, k and v in a parameter of its own name.
FUSED = ".in_proj_weight"


def tensors_of(layer: str) -> tuple[str, str]:
    """The names of a layer's weight and bias in a checkpoint."""
    if layer.endswith(FUSED):
        return layer, layer.removesuffix("weight") + "bias"
    return f"{layer}.weight", f"{layer}.bias"


def container_of(name: str) -> str:
    """The longest entry of CONTAINERS that the name starts with; empty if none."""
    return max((c for c in CONTAINERS if name.startswith(c)), key=len, default="")


def part_of(name: str) -> str | None:
    """The part of a model that a layer's name tells, None if it tells none."""
    return CONTAINERS.get(container_of(name))


def split_folded(path: str) -> tuple[str | None, str]:
    """(part, rest) of a folded path that starts with a container; (None, path) of any other."""
    found = max((c for c in _FOLDED_CONTAINERS if path.startswith(c)), key=len, default="")
    return _FOLDED_CONTAINERS.get(found), path[len(found) :]


class BaseNames:
    """The layers of an engine or a checkpoint, by folded name.

    shapes: layer -> LayerShape. Names alone serve too, but for the rows of fused layers. rows:
    what no table knows, name in the file -> (layer, first output, end). Raises MatchError for rows
    of no layer.
    """

    def __init__(
        self,
        shapes: Mapping[str, LayerShape] | Iterable[str],
        rows: Mapping[str, tuple[str, int, int]] | None = None,
    ):
        known = shapes if isinstance(shapes, Mapping) else {}
        self._whole: dict[str, list[str]] = {}
        self._inner: dict[str, list[str]] = {}
        by_part: dict[str | None, dict[str, str]] = {}
        for name in shapes:
            self._whole.setdefault(fold(name), []).append(name)
            container = container_of(name)
            inner = fold(name[len(container) :])
            by_part.setdefault(CONTAINERS.get(container), {})[inner] = name
            if container:
                self._inner.setdefault(inner, []).append(name)
        self._aliases = {part: aliases(layers, known) for part, layers in by_part.items()}
        self._told = {fold(name): _share(known, *told) for name, told in (rows or {}).items()}
        self._folded = self._inner | self._whole
        self._sorted = {
            False: sorted(self._folded),
            True: sorted(name[::-1] for name in self._folded),
        }
        self._lookups = 200  # of `nearest`: about 1 ms each, and nobody reads more

    def candidates(self, key: Key) -> list[list[list[Share]]]:
        """What a module could mean, the better guesses first: the rows that the caller told, a name
        in full, one without its container, another program's name. Each guess is a list of
        readings, each reading the layers that it changes.
        """
        if fold(key.path) in self._told:
            return [[[self._told[fold(key.path)]]]]
        out = []
        for parts, path in self._readings(key):
            for table in (self._whole, self._inner):
                found = [name for name in table.get(path, ()) if _speaks_of(parts, name)]
                out.append([[Share(name)] for name in found])
            out.append(
                [
                    shares[path]
                    for part, shares in self._aliases.items()
                    if path in shares and (parts is None or part is None or part in parts)
                ]
            )
        return [readings for readings in out if readings]

    def nearest(self, key: Key) -> str | None:
        """The layer whose name is most like the module's, to show beside an unmatched one; None if
        none is.
        """
        self._lookups -= 1
        if self._lookups < 0:
            return None
        path = fold(key.path)
        # difflib against thousands of names takes seconds: look at those that share its beginning
        # or its end.
        near = set()
        for turned, names in self._sorted.items():
            at = bisect_left(names, path[::-1] if turned else path)
            near |= {name[::-1] if turned else name for name in names[max(at - 8, 0) : at + 8]}
        close = get_close_matches(path, sorted(near), n=1, cutoff=0.5)
        return self._folded[close[0]][0] if close else None

    @staticmethod
    def _readings(key: Key) -> Iterator[tuple[Parts, str]]:
        """(parts, folded path): with a prefix that is a path itself, as it stands, and with a
        container at the front of the path left out.
        """
        path = fold(key.path)
        if key.dialect.dotted and key.prefix:
            yield None, fold(key.module)
        yield key.parts, path
        part, rest = split_folded(path)
        if part and rest and (key.parts is None or part in key.parts):
            yield (part,), rest


def _share(shapes: Mapping[str, LayerShape], layer: str, begin: int, end: int) -> Share:
    if layer not in shapes or not 0 <= begin < end <= shapes[layer].outputs:
        what = f"it is {shapes[layer]}" if layer in shapes else "there is no such layer"
        raise MatchError(f"rows {begin}:{end} of layer {layer!r}: {what}")
    return Share(layer, ((begin, end),))


def _speaks_of(parts: Parts, name: str) -> bool:
    part = part_of(name)
    return parts is None or part is None or part in parts
