"""Which value was the first that is not finite: the failing step is made again, and looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..arrays import Array, module_of, to_device, wide_dtype
from ..engine import Engine
from ..errors import LycorisError
from ..optim.nested import Nested, items
from .batches import Batches
from .step import Step


class NonFiniteError(LycorisError, ArithmeticError):
    """A NaN or an infinity came up in training. step: the first, counted from 0. tensor: what held
    it, such as 'the gradient of layer.factor'. elsewhere: in another process.
    """

    def __init__(self, step: int, tensor: str, advice: str, elsewhere: bool = False):
        self.step, self.tensor, self.elsewhere = step, tensor, elsewhere
        super().__init__(f"step {step}: {tensor} is not finite: {advice}")


def error_of_factors(done: int, masters: Nested) -> NonFiniteError | None:
    """Of the first factor that holds a NaN or an infinity, if one does.

    done: steps, of which the last has written the factors.
    """
    # Of the sum of all values the device is asked once; what is finite may still sum to infinity.
    total = sum(p.astype(wide_dtype(p.dtype), copy=False).sum() for _, _, p in items(masters))
    if _finite(total):
        return None
    advice = "lower the learning rate, or raise the optimizer's eps"
    for layer, name, p in items(masters):
        if not _finite(p):
            return NonFiniteError(done - 1, f"factor {layer}.{name} after the update", advice)
    return None


def require_finite_step(
    step: Step,
    number: int,
    inputs: Sequence[Array],
    targets: Sequence[Array],
    conditions: Mapping[str, Any],
) -> None:
    """Raise NonFiniteError for what is not finite first: a factor that is there already, the batch,
    the output, the loss, a gradient. The engine stands before the step, which changes nothing here.
    """
    known = error_of_factors(number, step.optimizer.masters)
    if known is not None:
        raise known
    arrays = [("input", i, x) for i, x in enumerate(inputs)]
    arrays += [("target", i, x) for i, x in enumerate(targets)]
    for what, i, x in arrays:
        if not _finite(x):
            raise NonFiniteError(number, f"{what} {i} of the batch", "repair the data")
    engine = step.engine
    for i, piece in enumerate(step.pieces(inputs, targets, conditions)):
        piece_inputs, piece_targets, told = piece
        drawn = {**told, "step": step.draw(i)}  # so that the same is dropped
        _require_finite_outputs(engine, number, piece_inputs, drawn)
        y, pullback = engine.vjp(*piece_inputs, **drawn)
        moved = [to_device(t, engine.device) for t in piece_targets]
        value, dy = step.loss(y, *moved)
        for what, array in (("the loss", value), ("the gradient of the loss", dy)):
            if not _finite(array):
                raise NonFiniteError(number, what, "look for a division or a root in the loss")
        _, grads = pullback(dy)
        for layer, name, g in items(grads[step.name]):
            if not _finite(g):
                raise NonFiniteError(
                    number,
                    f"the gradient of {layer}.{name}",
                    "lower the learning rate, or train in f32",
                )
    elsewhere = step.processes > 1
    raise NonFiniteError(
        number,
        "the loss or a gradient of another process" if elsewhere else "the norm of the gradient",
        "see what that process says" if elsewhere else "its square is beyond f32: scale the loss",
        elsewhere,
    )


def raise_cause(
    step: Step,
    source: Batches,
    begin: int,
    kept: tuple,
    bad: int,
    known: NonFiniteError | None = None,
) -> None:
    """Raise NonFiniteError for step `bad`, counted from 0, or the error that is known of it, with
    the engine as it was before that step: from the snapshot of `begin` steps on all is done again.
    """
    step.restore(kept)
    source.back()
    for number in range(begin, bad):
        step(*source(number))
    if known is not None:
        raise known
    require_finite_step(step, bad, *source(bad))


def _require_finite_outputs(
    engine: Engine, number: int, inputs: Sequence[Array], drawn: dict[str, Any]
) -> None:
    topology, advice = engine.topology, "lower the learning rate, or clip the gradient"

    def watched(call, *arrays):
        def run(name, x):
            y = call(name, x)
            if not _finite(y):
                raise NonFiniteError(number, f"the output of layer {name}", advice)
            return y

        y = topology(run, *arrays)
        if not _finite(y):
            raise NonFiniteError(number, "the network's output", advice)
        return y

    engine.topology = watched
    try:
        engine.forward(*inputs, **drawn)
    finally:
        engine.topology = topology


def _finite(x: Any) -> bool:
    xp = module_of(x)
    if not hasattr(x, "dtype") or x.dtype.kind in "iub":
        return True if hasattr(x, "dtype") else bool(abs(float(x)) < float("inf"))
    wide = x.astype("float64") if x.dtype.kind not in "fc" else x  # bf16 is of kind V
    return bool(xp.isfinite(wide).all())
