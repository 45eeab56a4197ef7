"""Engine: layers, the adapters attached to them, and the plain function that joins the layers.

    engine = Engine({"conv_in": Conv2d(w, b, padding=1), ...}, topology)
    report = engine.attach("style.safetensors", strength=0.8)
    y = engine.forward(x)
    y, pullback = engine.vjp(x)
    dx, grads = pullback(dy)

A topology is `topology(call, *inputs)`: `call(name, x)` runs a layer with whatever is attached to
it, everything in between is made of `lycoris_cupy.ops`. It runs on arrays, and on watched ones when
gradients are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Any

from .adapters import Dropout, truncated
from .arrays import Array, bf16, device_context, dtype_of, resolve_device
from .attachment import Attachment, Attachments, Strengths
from .conditions import checked
from .errors import LycorisError
from .explain import explain, products
from .gradients import vjp
from .graph import capture, capture_step
from .inputs import inputs_of
from .io.adapter_file import read_adapter, write_adapter
from .io.report import LoadReport
from .kernels import compile_ahead
from .layers import Layer, LayerShape
from .merged import merged_layers
from .recipe import AddReport, Recipe
from .recipe.adding import new_attachment
from .topology import Topology, caller, chain, in_order


def _on_device(method):
    """Runs a method of Engine with the engine's GPU as the current one."""

    @wraps(method)
    def run(self, *args, **options):
        with device_context(self.device):
            return method(self, *args, **options)

    return run


class Engine:
    """A network whose layers can carry adapters.

    layers: name -> Layer. topology: see above; without one the layers run in their order. device:
    'auto', 'cpu', 'cuda' or 'cuda:<index>'. dtype: bf16, or f32 and f64 for checking; layers are
    cast to it.
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        topology: Topology | None = None,
        *,
        device: str = "auto",
        dtype=bf16,
    ):
        if not layers:
            raise LycorisError("an Engine needs at least one layer")
        self.device = resolve_device(device)
        self.dtype = dtype_of(dtype)
        self.layers = {name: layer.to(self.device, self.dtype) for name, layer in layers.items()}
        self.topology = topology or in_order(list(layers))
        self.attachments = Attachments()
        self.strength = Strengths(self.attachments)

    @classmethod
    def sequential(cls, steps: Sequence[Layer | Callable], **options) -> Engine:
        """A chain of layers, named '0', '1', ... by their place, and of functions of one array
        between them.
        """
        return cls(*chain(steps), **options)

    @property
    def shapes(self) -> dict[str, LayerShape]:
        return {name: layer.shape for name, layer in self.layers.items()}

    @_on_device
    def attach(
        self,
        path,
        *,
        strength: float = 1.0,
        name: str | None = None,
        strict: bool = True,
        alpha_from: str | None = None,
        rows: Mapping[str, tuple[str, int, int]] | None = None,
        dora: str | None = None,
        rule: str = "base",
        dialect: str | None = None,
        rank: int | None = None,
    ) -> LoadReport:
        """Load an adapter file of any dialect, or PEFT's folder, onto the layers it names, under
        `name` (by default the file's stem).

        Returns what was matched, at which scale, and what was not. strict: a module that fits no
        layer is an error; zero matches always are. Factors are rounded to the engine's dtype (the
        report says which), magnitudes kept wide. alpha_from: the one source of alpha to believe
        where several disagree. dora: 'output' or 'input', the axis of magnitudes whose shape allows
        both. rule: 'base', strength blends from the layer, or 'reference', as LyCORIS does, where
        the two differ (DoRA, rescale, BOFT). dialect: of rotations whose file allows several
        readings, such as 'oft:kohya'. rank: cut LoCon and DyLoRA to this rank. rows: for
        layers that are fused here and apart in the file, name there -> (layer, first output, end);
        those of Flux and CLIP-G are known.
        """
        name = name if name is not None else Path(path).stem
        self.attachments.require_new(name)
        found, report = read_adapter(
            path,
            self.shapes,
            strict=strict,
            dtype=self.dtype,
            alpha_from=alpha_from,
            rows=rows,
            dora=dora,
            rule=rule,
            dialect=dialect,
            rank=rank,
        )
        self.attachments[name] = Attachment(
            found, self.device, self.dtype, strength, report, self.layers
        )
        return report

    @_on_device
    def add(
        self,
        name: str,
        recipe: str | Recipe | Mapping[str, Any] | None = None,
        targets: str | Sequence[str] | None = None,
        *,
        rank: int | None = None,
        alpha: float | None = None,
        seed: int = 0,
        strength: float = 1.0,
        **options,
    ) -> AddReport:
        """New adapters that change nothing yet, on the layers that a recipe takes.

        recipe: one of ALGORITHMS, with what else a recipe says: targets, fnmatch patterns of names
        and groups such as ':attention', by default all layers; rank, by default 4; alpha, by
        default the rank, so that the scale is 1; options such as conv_rank, exclude, preset,
        override, tucker, factor, dora, or LyCORIS's names for them (see `Recipe`); those of
        `set_dropout`, with this seed. Or a Recipe or its table, which says all. The report is a
        sequence of the names of the layers that got an adapter; `text()` has the rest. A pattern
        that brings no layer is an error.
        """
        self.attachments.require_new(name)
        wanted = Recipe.of(recipe, targets, {"rank": rank, "alpha": alpha} | options)
        made = new_attachment(name, wanted, self.layers, self.device, self.dtype, seed, strength)
        self.attachments[name], report = made
        return report

    def detach(self, name: str) -> None:
        """Take an adapter off again; the layers were never changed."""
        del self.attachments[name]

    def parameters(self, name: str) -> dict[str, dict[str, Array]]:
        """The factors of an adapter: layer -> factor -> the array itself, in Flame layout."""
        return self.attachments[name].parameters

    def set_dropout(
        self,
        name: str,
        *,
        dropout: float = 0.0,
        rank_dropout: float = 0.0,
        rank_dropout_scale: bool = False,
        module_dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        """What an adapter drops in training, of all it drops: what is left out is 0.

        It acts in `forward` and `vjp` that are given a `step`, and in `capture_step`; a captured
        graph keeps what it was captured with. What each means: see adapters/dropout.py. Where
        layers have different algorithms, each drops what it has; LycorisError for what none has.
        """
        knobs = Dropout(dropout, rank_dropout, rank_dropout_scale, module_dropout, seed)
        self.attachments[name].dropout = knobs

    @_on_device
    def set_parameters(self, name: str, values: Mapping[str, Mapping[str, Array]]) -> None:
        """Copy new values into the factors of an adapter, rounded once.

        The arrays stay the same, so that captured graphs see the values.
        """
        self.attachments[name].set(values)

    def save_adapter(
        self,
        name: str,
        path,
        *,
        dtype=None,
        metadata: Mapping[str, str] | None = None,
        rank: int | None = None,
    ) -> None:
        """Write an adapter as LyCORIS does: `lycoris_<layer>.<key>`, torch's order.

        In the engine's dtype unless told otherwise. rank: cut LoCon and DyLoRA to this rank; alpha
        stays. Written beside the target and renamed.
        """
        adapters = self.attachments[name].on_host()
        if rank is not None:
            adapters = {layer: truncated(*pair, rank) for layer, pair in adapters.items()}
        write_adapter(path, adapters, dtype=dtype, metadata=metadata)

    @_on_device
    def forward(self, *inputs: Array, **conditions) -> Any:
        """The network's output, on the engine's device.

        Inputs: NumPy, CuPy, or anything with __dlpack__, in bf16, f32 or f64; whole numbers and
        booleans (tokens, masks) reach the topology as they are. conditions: what the attached
        algorithms read: noise_level (T-LoRA), an array (N,), one a sample, or (1,), from 0 to 1;
        ranks (DyLoRA), a pair as `draw_block` gives it. One that none reads is an error.
        step: the number of a training step, whole or (1,) uint32; only with it is anything dropped.
        """
        arrays = self._inputs(inputs)
        conditions = self._conditions(conditions)
        views = {name: attached.canonical() for name, attached in self.attachments.items()}
        return self._run(arrays, views, conditions)

    @_on_device
    def vjp(self, *inputs: Array, **conditions) -> tuple[Any, Callable[[Array], tuple[Any, dict]]]:
        """(y, pullback): pullback(dy) gives (dx, grads), the gradients of <dy, y>, once.

        dx has the engine's dtype, one array an input (a tuple if there are several), None for one
        of whole numbers or booleans. grads: adapter -> layer -> factor -> array in Flame layout,
        f32 (f64 in an f64 engine), unscaled by any loss: to sit inside somebody else's backward
        pass. conditions: as for `forward`.
        """
        run = partial(self._run, conditions=self._conditions(conditions))
        arrays = self._inputs(inputs)
        return vjp(run, arrays, dict(self.attachments), self.device, self.dtype)

    @_on_device
    def merged(self) -> Engine:
        """A new engine whose weights hold the adapters at their present strengths. For inference.

        f32 sums over all adapters, one rounding. This engine and its weights are untouched.
        """
        layers = merged_layers(self.layers, self.attachments.values())
        return Engine(layers, self.topology, device=self.device, dtype=self.dtype)

    @_on_device
    def capture(self, *inputs: Array, **conditions) -> Callable[..., Any]:
        """A callable that repeats this forward for inputs of the same shapes, and for conditions,
        which it takes by name: arrays are inputs like the others, `ranks` stay as they are.

        On a GPU it is a CUDA graph, replayed without Python, whose result the next call writes
        over. A change of strength or of an adapter's values is seen by the next call; attaching or
        detaching needs a new capture. On the CPU there is nothing to capture and the callable runs
        `forward`.
        """
        return capture(self, inputs, conditions)

    @_on_device
    def capture_step(
        self,
        name: str,
        loss: Callable[..., tuple[Any, Array]],
        optimizer,
        *inputs: Array,
        targets=(),
        **conditions,
    ) -> Callable[..., Any]:
        """A callable that repeats a training step of one adapter: forward, loss, backward, update.

        loss(y, *targets) -> (value, dy), arrays on the engine's device, dy the gradient of the
        value for y. optimizer: as AdamW, over `engine.parameters(name)`. The callable takes inputs
        and targets of the same shapes and returns the value, which the next call writes over. On a
        GPU it is one CUDA graph, without a synchronisation: a change of strength, of factors, of
        `lr` needs no new capture. Targets keep their dtype. Capturing takes no step. conditions: as
        for `capture`, but for `step`, which is the optimizer's.
        """
        return capture_step(self, name, loss, optimizer, inputs, targets, conditions)

    @_on_device
    def explain(self, *inputs: Array, **conditions) -> str:
        """A line a layer and a line an adapter on it: the route it takes, and what that costs.

        With inputs, a forward is run on them, and for each of its products follows which way the
        planner chose, by what estimates, its operations and its bytes.
        """
        text = explain(self.layers, self.attachments)
        if not inputs:
            return text
        return f"{text}\n{products(partial(self.forward, *inputs, **conditions), self.device)}"

    @_on_device
    def warmup(self, *inputs: Array, workers: int | None = None, **conditions) -> int:
        """Compile ahead what inputs of these shapes need, a kernel a thread; returns how many.

        Nothing is left to compile at the first forward, vjp or capture of the same shapes. The
        result of the run is thrown away. On the CPU there is nothing to compile.
        """
        if self.device == "cpu":
            return 0

        def run():
            y, pullback = self.vjp(*inputs, **conditions)
            pullback(y)

        return compile_ahead(run, workers)

    def _run(self, arrays: Sequence, views: Mapping[str, Mapping], conditions: Mapping) -> Any:
        return self.topology(caller(self.layers, self.attachments, views, conditions), *arrays)

    def _inputs(self, given: Sequence[Array]) -> list[Array]:
        return inputs_of(given, self.device, self.dtype)

    def _conditions(self, given: Mapping[str, Any]) -> dict[str, Any]:
        return checked(given, self.attachments, self.device, self.dtype)
