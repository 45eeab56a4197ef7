"""The pullback of an engine: one forward on a tape, played back once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .arrays import Array, device_context, is_index, module_of, wide_dtype
from .attachment import Attachment
from .errors import LycorisError
from .inputs import cotangent_of
from .ops.elementwise import cast
from .tape import Node, Tape, Var


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
    # The pullback keeps no array of its own: what it needs, the tape's rules hold.
    end, sources = y.node, [v.node if isinstance(v, Var) else None for v in watched]
    leaves = {
        name: {layer: {factor: v.node for factor, v in p.items()} for layer, p in of.items()}
        for name, of in views.items()
    }

    def pullback(dy: Array):
        with device_context(device):
            dy = cotangent_of(dy, device, end.dtype)
            if tuple(dy.shape) != end.shape:
                raise LycorisError(
                    f"dy has shape {tuple(dy.shape)}, expected that of y, {end.shape}"
                )
            factors = [n for of in leaves.values() for layer in of.values() for n in layer.values()]
            every = [*(node for node in sources if node is not None), *factors]
            found = dict(zip(every, tape.gradients(end, dy, every), strict=True))

            def gradient(node: Node, dtype) -> Array:
                g = found.pop(node)
                zeros = module_of(dy).zeros
                return zeros(node.shape, dtype) if g is None else cast(g, dtype)

            dx = [None if node is None else gradient(node, dtype) for node in sources]
            grads = {
                name: attachments[name].flame(of, lambda node: gradient(node, wide_dtype(dtype)))
                for name, of in leaves.items()
            }
        return (dx[0] if len(dx) == 1 else tuple(dx)), grads

    return y.value, pullback
