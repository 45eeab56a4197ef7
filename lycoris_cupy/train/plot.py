"""A picture of logs: loss and gradient norm over the steps, several runs in one. Extra `plot`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FileFormatError, LycorisError
from ..io.atomic import replacing

_WINDOW = 0.05  # of a run: the share of its lines that the smooth curve looks over
FORMATS = ("png", "svg", "pdf")


def plot_runs(logs: Mapping[str, Sequence[Mapping[str, Any]]], path: str | Path) -> None:
    """Draw the lines of logs, by label, as `read_log` gives them, into a file whose ending says the
    kind. Values as they were logged are pale, their running mean is not; validations are dots.

    Raises LycorisError without matplotlib, FileFormatError for a log without a line to draw.
    """
    kind = Path(path).suffix[1:].lower()
    if kind not in FORMATS:
        raise LycorisError(f"{path}: expected a name that ends in .{', .'.join(FORMATS)}")
    require_plot()
    # No window and no global state: what draws is asked for by name.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    FigureCanvasAgg(figure)
    loss, norm = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for i, (label, lines) in enumerate(logs.items()):
        _draw(loss, norm, label, lines, f"C{i % 10}")
    for axes, title in ((loss, "loss"), (norm, "gradient norm")):
        values = [v for line in axes.get_lines() for v in np.asarray(line.get_ydata(), float)]
        axes.set_yscale("log" if values and min(values) > 0 else "linear")
        axes.set_ylabel(title)
        axes.grid(alpha=0.3, which="both", linewidth=0.5)
    norm.set_xlabel("step")
    loss.legend(frameon=False)
    with replacing(path) as handle:
        figure.savefig(handle, format=kind, dpi=120)


def require_plot() -> None:
    """Raise LycorisError, saying how to get it, unless matplotlib is there."""
    if find_spec("matplotlib") is None:
        raise LycorisError(
            "a plot needs matplotlib: install the extra with "
            'python -m pip install "lycoris_cupy[plot]"'
        )


def smoothed(values: np.ndarray) -> np.ndarray:
    """The mean over a window around each value, narrower at the ends."""
    half = int(len(values) * _WINDOW / 2)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    reach = np.minimum(half, np.minimum(at, len(values) - 1 - at))
    return (sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1)


def _draw(loss, norm, label: str, lines: Sequence[Mapping[str, Any]], colour: str) -> None:
    trained = [line for line in lines if "loss" in line]
    validated = [line for line in lines if line.get("validation") is not None]
    if not trained:
        raise FileFormatError(f"{label}: its log has no line with a loss yet")
    steps = [line["step"] for line in trained]
    for axes, key in ((loss, "loss"), (norm, "grad_norm")):
        values = np.array([line.get(key, np.nan) for line in trained], float)
        marker = "o" if len(values) == 1 else ""
        axes.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8)
        named = label if axes is loss else None
        axes.plot(steps, smoothed(values), marker=marker, color=colour, lw=1.6, label=named)
    if validated:
        points = [(line["step"], line["validation"]) for line in validated]
        loss.plot(*zip(*points, strict=True), "o", color=colour, ms=4, label=f"{label}, validation")
