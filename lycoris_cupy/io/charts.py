"""Inline SVG: bars of a value by layer, a band of spectra, and a small line for a table's cell.

Colours are CSS classes of the page, so that they follow its light or dark scheme.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

WIDTH, HEIGHT = 1000, 230
LEFT, BOTTOM, TOP = 58, 26, 10  # room for the axes
DECADES = 4  # of a spectrum


def bars(values: Sequence[float], names: Sequence[str], marked: Sequence[bool], unit: str) -> str:
    """A bar a layer in the order given. names: shown at the bar. marked: in the warning colour.

    The axis is logarithmic where the largest value would flatten all others.
    """
    place, ticks = _scale(values)
    step = (WIDTH - LEFT) / max(len(values), 1)
    width = step * 0.8 if step > 4 else max(step - 0.4, 0.6)
    out = [_axis(place, ticks, unit)]
    for i, (value, name, mark) in enumerate(zip(values, names, marked, strict=True)):
        height = max(_span() * place(value), 1.5)
        out.append(
            f'<rect class="bar{" mark" if mark else ""}" x="{LEFT + i * step:.2f}" '
            f'y="{HEIGHT - BOTTOM - height:.2f}" width="{width:.2f}" height="{height:.2f}">'
            f"<title>{escape(name)}: {value:.4g}</title></rect>"
        )
    label = f"{len(values)} layers, in the order of their names"
    out.append(f'<text class="label" x="{WIDTH / 2}" y="{HEIGHT - 6}">{label}</text>')
    return _svg(out, f"{unit} by layer")


def spectra(curves: Sequence[Sequence[float]]) -> str:
    """Singular values as shares of each layer's largest: the median, and the band from the tenth to
    the ninetieth percentile, over layers.
    """
    shares = [[v / curve[0] for v in curve] for curve in curves if len(curve) and curve[0] > 0]
    count = max(map(len, shares), default=0)
    columns = [sorted(s[i] for s in shares if len(s) > i) for i in range(count)]
    # Where few layers go on, a percentile would be one layer's value.
    columns = [column for column in columns if len(column) >= max(len(shares) / 10, 1)]
    out = []
    for decade in range(DECADES + 1):
        y = _log_y(10.0**-decade)
        text = "1" if decade == 0 else f"1e-{decade}"
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}">{text}</text>')
    xs = [LEFT + (WIDTH - LEFT) * (i + 0.5) / max(len(columns), 1) for i in range(len(columns))]
    low, middle, high = ([_percentile(c, q) for c in columns] for q in (0.1, 0.5, 0.9))
    band = [*zip(xs, high, strict=True), *reversed(list(zip(xs, low, strict=True)))]
    if len(columns) > 1:
        out.append(f'<polygon class="band" points="{_points(band)}"/>')
        line = _points(list(zip(xs, middle, strict=True)))
        out.append(f'<polyline class="line" points="{line}"/>')
    for i, x in enumerate(xs):
        out.append(
            f'<circle class="dot" cx="{x:.1f}" cy="{_log_y(middle[i]):.1f}" r="3"><title>value '
            f"{i + 1}: median {middle[i]:.3g}, {low[i]:.3g} to {high[i]:.3g}</title></circle>"
        )
    label = f"singular value 1 to {len(columns)}"
    out.append(f'<text class="label" x="{WIDTH / 2}" y="{HEIGHT - 6}">{label}</text>')
    return _svg(out, "singular values over the largest")


def sparkline(values: Sequence[float]) -> str:
    """The spectrum of one layer, on the scale of `spectra`, for a cell."""
    if not values or values[0] <= 0:
        return ""
    width, height = 96, 20
    shares = [max(math.log10(max(v / values[0], 1e-300)), -DECADES) for v in values]
    step = width / max(len(shares), 1)
    dots = " ".join(
        f"{(i + 0.5) * step:.1f},{1 - share / DECADES * (height - 2):.1f}"
        for i, share in enumerate(shares)
    )
    shape = "polyline" if len(shares) > 1 else "circle"
    where = f'points="{dots}"' if len(shares) > 1 else f'cx="{step / 2}" cy="3" r="2"'
    return (
        f'<svg class="spark" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'aria-hidden="true"><{shape} class="line" {where}/></svg>'
    )


def _svg(parts: list[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )


def _span() -> float:
    return HEIGHT - BOTTOM - TOP


def _axis(place: Callable[[float], float], ticks: list[float], unit: str) -> str:
    out = [f'<text class="tick" x="{LEFT - 8}" y="{TOP + 2}">{escape(unit)}</text>']
    for tick in ticks:
        y = HEIGHT - BOTTOM - _span() * place(tick)
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        if y > TOP + 14:
            out.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}">{tick:g}</text>')
    return "".join(out)


def _scale(values: Sequence[float]) -> tuple[Callable[[float], float], list[float]]:
    """(value -> its share of the axis, the axis's ticks)."""
    positive = sorted(v for v in values if v > 0 and math.isfinite(v))
    if not positive:
        return lambda value: 0.0, [0.0]
    largest, median = positive[-1], positive[len(positive) // 2]
    if largest > 15 * median:
        low = math.floor(math.log10(positive[len(positive) // 20]))
        high = math.ceil(math.log10(largest))

        def place(value: float) -> float:
            return max(math.log10(value) - low, 0.0) / (high - low) if value > 0 else 0.0

        return place, [10.0**power for power in range(low, high + 1)]
    # Steps of 1, 2 or 5 times a power of ten.
    power = 10.0 ** math.floor(math.log10(largest / 4))
    step = next(m * power for m in (1, 2, 5, 10) if largest / (m * power) <= 5)
    ticks = [round(i * step, 12) for i in range(6) if i * step <= largest]
    return lambda value: value / (largest * 1.02), ticks


def _log_y(share: float) -> float:
    down = min(-math.log10(max(share, 1e-300)), DECADES) / DECADES
    return TOP + _span() * down


def _points(pairs: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{_log_y(share):.1f}" for x, share in pairs)


def _percentile(column: Sequence[float], share: float) -> float:
    return column[min(int(share * len(column)), len(column) - 1)]
