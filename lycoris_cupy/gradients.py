"""The pullback of an engine: one forward on a tape, played back once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .arrays import Array, device_context, is_index, module_of, wide_dtype
from .attachment import Attachment
from .errors import LycorisError
from .inputs import cotangent_of
from .ops.elementwise import cast
from .tape import Tape, Var, value_of


def vjp(
    run: Callable[[Sequence[Var], Mapping], Any],
    inputs: Sequence[Array],
    attachments: Mapping[str, Attachment],
    device: str,
    dtype,
) -> tuple[Any, Callable[[Array], tuple[Any, dict]]]:
    """(y, pullback) of run(inputs, views), see `Engine.vjp`.

    run: the forward, on inputs, watched unless they are whole numbers or booleans, and on the
    watched factors of each attachment, as `Attachment.canonical` lays them out.
    """
    tape = Tape()
    watched = [x if is_index(x) else tape.watch(x) for x in inputs]
    views = {
        name: {
            layer: {factor: tape.watch(array) for factor, array in p.items()}
            for layer, p in attached.canonical().items()
        }
        for name, attached in attachments.items()
    }
    y = run(watched, views)
    if not isinstance(y, Var):
        raise LycorisError("vjp: the topology must return one array that depends on its inputs")

    def pullback(dy: Array):
        with device_context(device):
            dy = cotangent_of(dy, device, y.dtype)
            if dy.shape != y.shape:
                raise LycorisError(
                    f"dy has shape {tuple(dy.shape)}, expected that of y, {tuple(y.shape)}"
                )
            leaves = [v for p in views.values() for layer in p.values() for v in layer.values()]
            every = [*(v for v in watched if isinstance(v, Var)), *leaves]
            found = dict(zip(map(id, every), tape.gradients(y, dy, every), strict=True))
            dx = [_or_zeros(found[id(v)], v, dtype) if id(v) in found else None for v in watched]
            grads = {
                name: attachments[name].flame(
                    views[name], lambda v: _or_zeros(found[id(v)], v, wide_dtype(dtype))
                )
                for name in views
            }
        return (dx[0] if len(dx) == 1 else tuple(dx)), grads

    return y.value, pullback


def _or_zeros(g: Array | None, v: Var, dtype) -> Array:
    return module_of(value_of(v)).zeros(v.shape, dtype) if g is None else cast(g, dtype)
