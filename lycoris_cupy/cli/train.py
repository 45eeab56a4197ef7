"""`lycoris-cupy train`: an adapter from a TOML file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..arrays import Array, resolve_device
from ..engine import Engine
from ..errors import LycorisError
from ..io.atomic import replacing
from ..optim import Average, Optimizer
from ..recipe import AddReport, activation_bytes
from ..train import Reducer, Result, fit, launch, mean_loss
from ..train.batches import Batches
from ..train.plot import plot_runs, require_plot
from ..train.step import Loss, split
from .train_config import EXAMPLE, Configuration, read_configuration
from .train_parts import batches_of, engine_of, loss_of, optimizer_of

_EXAMPLES = """examples:
  lycoris-cupy train --example train.toml
      writes a commented configuration: network, adapter, data, optimizer, loop
  lycoris-cupy train train.toml --dry-run
      which layers are matched, parameters, memory; one forward, nothing is written
  lycoris-cupy train train.toml
  lycoris-cupy train train.toml --resume
      goes on from the newest checkpoint, bit for bit as if there had been no break
  lycoris-cupy train train.toml --gpus 2
      each GPU takes its share of every batch
"""


def add(commands) -> None:
    """The command's parser."""
    parser = commands.add_parser(
        "train",
        help="train an adapter as a TOML file says",
        description="Train an adapter of a network on pictures or on batches of your own.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG", nargs="?", type=Path, help="the TOML file")
    parser.add_argument(
        "--example", metavar="FILE", type=Path, help="write a commented configuration, and stop"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint, if there is one"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be trained; write nothing"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="instead of the file's")
    parser.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:1 or auto (default), a GPU if there is one",
    )
    parser.add_argument(
        "--gpus", type=int, metavar="N", help="train on the first N GPUs of this machine together"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0 when the adapter is written."""
    if args.example is not None:
        return _write_example(args)
    if args.config is None:
        raise LycorisError("CONFIG is missing: --example FILE writes one to begin with")
    if args.gpus is not None and args.device != "auto":
        raise LycorisError("--gpus and --device both say where to train: keep one")
    config = read_configuration(args.config)
    if args.steps is not None:
        if args.steps < 1:
            raise LycorisError(f"--steps is {args.steps}, expected at least 1")
        config["train"]["steps"] = args.steps
    if args.dry_run:
        device = "cuda:0" if args.gpus else args.device
        print("\n".join(_Training(config, device).told()))
        print("nothing was written")
        return 0
    if args.gpus is None:
        result = train(None, config, args.resume, args.device)
    else:
        result = launch(train, args.gpus, config, args.resume)
    return _tell(config, result)


def train(
    reducer: Reducer | None, config: Configuration, resume: bool, device: str = "auto"
) -> Result:
    """The run of one process; reducer: of several."""
    training = _Training(config, device if reducer is None else reducer.device)
    first = reducer is None or reducer.rank == 0
    if first:
        print(training.report.summary(), flush=True)
    table = config["train"]
    validate = None
    if training.validation and (table["validate_every"] or table["checkpoint_every"]):
        validate = mean_loss(training.loss, training.validation)
    return fit(
        training.engine,
        training.batches,
        training.loss,
        name=config[""]["name"],
        optimizer=training.optimizer,
        steps=table["steps"],
        out=config.output,
        resume=resume,
        validate=validate,
        accumulate=table["accumulate"],
        average=training.average,
        max_norm=table["max_norm"],
        configuration=config.decisive(),
        reducer=reducer,
        **{key: table[key] for key in ("log_every", "checkpoint_every", "keep", "patience")},
        validate_every=table["validate_every"] if validate else None,
    )


class _Training:
    """All that a configuration stands for, on a device."""

    def __init__(self, config: Configuration, device: str):
        table, name = config["train"], config[""]["name"]
        self.config = config
        self.loss: Loss = loss_of(config)
        self.engine: Engine = engine_of(config, resolve_device(device))
        self.batches, self.validation = batches_of(config, self.engine.dtype)
        self.report: AddReport = self.engine.add(name, config.adapter, seed=config[""]["seed"])
        parameters = self.engine.parameters(name)
        self.optimizer: Optimizer = optimizer_of(config, parameters, table["steps"])
        self.average = None
        if table["average"] is not None:
            self.average = Average(self.optimizer.masters, table["average"], warmup=True)

    def told(self) -> list[str]:
        """For --dry-run."""
        table = self.config["train"]
        inputs, targets, conditions = Batches(self.batches)(0)
        piece, _, told = split(inputs, targets, table["accumulate"], conditions)[0]
        kind = type(self.optimizer).__name__
        validated = len(self.validation or ())
        return [
            self.report.text(activations=activation_bytes(self.engine, *piece, **told)),
            "",
            f"{table['steps']} steps of {kind} on {self.engine.device}, {table['loss']}",
            f"a batch: {_shapes(inputs)} -> {_shapes(targets)}, in {table['accumulate']} piece(s)",
            f"validation: {validated} batches" if validated else "validation: none",
            f"output: {self.config.output}",
        ]


def _tell(config: Configuration, result: Result) -> int:
    early = ", stopped early" if result.stopped == "early" else ""
    print(f"{result.steps} steps{early}, loss {result.loss:.5g}")
    if result.best is not None:
        print(f"best validation {result.best[0]:.5g} after step {result.best[1]}")
    print(f"wrote {result.path}")
    try:
        require_plot()
    except LycorisError as error:
        print(f"no loss.png: {error}")
    else:
        plot_runs({config[""]["name"]: result.lines}, config.output / "loss.png")
    return 0


def _write_example(args: argparse.Namespace) -> int:
    if args.config is not None:
        raise LycorisError("--example writes a configuration and reads none: leave CONFIG out")
    if args.example.exists():
        raise LycorisError(f"{args.example}: is there already: choose another name")
    with replacing(args.example) as handle:
        handle.write(EXAMPLE.read_bytes())
    print(f"wrote {args.example}")
    return 0


def _shapes(arrays: Sequence[Array]) -> str:
    return ", ".join(str(tuple(x.shape)) for x in arrays)
