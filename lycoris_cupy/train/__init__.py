"""Training an adapter: a loop that logs, validates, keeps checkpoints and goes on where it stopped.

result = fit(engine, batches, loss, name="style", optimizer=optimizer, steps=1000, out="run")
"""

from .batches import Batches
from .checkpoint import Checkpoints, read_state
from .finite import NonFiniteError
from .fit import Result, fit
from .log import read_log
from .parallel import LostProcessError, launch
from .plot import plot_runs
from .step import Reducer, Step
from .validation import mean_loss

__all__ = [
    "Batches",
    "Checkpoints",
    "LostProcessError",
    "NonFiniteError",
    "Reducer",
    "Result",
    "Step",
    "fit",
    "launch",
    "mean_loss",
    "plot_runs",
    "read_log",
    "read_state",
]
