"""An inspection as one HTML page: no network, no files beside it, light or dark as the reader is.

Everything that comes from a file is escaped: names in it may be anything.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from html import escape
from pathlib import Path

from .charts import bars, sparkline, spectra
from .inspection import Figures, Inspection
from .page_style import SCRIPT, STYLE
from .safetensors import replacing

_SHOWN = (  # metadata that says what a file is
    "modelspec.title",
    "modelspec.architecture",
    "ss_base_model_version",
    "ss_sd_model_name",
    "ss_network_module",
    "ss_network_args",
    "ss_steps",
    "ss_training_finished_at",
    "lycoris_cupy.converted",
)


def write_page(path: str | os.PathLike, inspection: Inspection) -> None:
    """Write the page, whole or not at all. Raises OSError where it cannot."""
    with replacing(path) as handle:
        handle.write(page(inspection).encode())


def page(inspection: Inspection) -> str:
    """The page's text."""
    report = inspection.report
    figures = sorted(inspection.figures, key=lambda one: _natural(_name(one)))
    title = escape(Path(report.path).name)
    body = [
        f"<h1>{title}</h1>",
        f"<p class='sub'>{escape(report.summary())}</p>",
        _tiles(inspection),
        _problems(inspection),
    ]
    known = [one for one in figures if one.norm is not None]
    if known:
        body += [*_charts(known), _table(figures)]
    body.append(_metadata(inspection))
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{title}</title>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<style>{STYLE}</style></head><body><main>{''.join(body)}</main>"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _tiles(inspection: Inspection) -> str:
    report = inspection.report
    kinds = Counter(one.layer.algorithm for one in inspection.figures)
    ranks = Counter(one.layer.rank for one in inspection.figures if one.layer.rank is not None)
    scales = sorted({f"{one.layer.scale:.4g}" for one in inspection.figures}, key=float)
    tiles = {
        "names": ", ".join(report.dialects) or "none known",
        "algorithm": ", ".join(f"{kind} ({n})" for kind, n in kinds.most_common()),
        "rank": _few([str(rank) for rank, _ in ranks.most_common()]),
        "scale": _few(scales),
        "dtype": ", ".join(sorted({one.layer.dtype for one in inspection.figures})),
        "parameters": f"{report.parameters:,}",
    }
    if inspection.base is not None:
        modules = len({one.layer.module for one in inspection.figures})
        tiles["matched"] = f"{modules} of {modules + len(report.unmatched)} modules"
    cells = (
        f"<div class='tile'><span>{escape(name)}</span><b>{escape(value)}</b></div>"
        for name, value in tiles.items()
        if value
    )
    return f"<section class='tiles'>{''.join(cells)}</section>"


def _problems(inspection: Inspection) -> str:
    rows = [(one.layer.module, "; ".join(one.notes)) for one in inspection.suspicious] + [
        (entry.name, str(entry).partition(": ")[2]) for entry in inspection.report.unmatched
    ]
    if not rows:
        return "<p class='good'>Nothing looks wrong.</p>"
    lines = "".join(f"<li><code>{escape(name)}</code> {escape(why)}</li>" for name, why in rows)
    opened = " open" if len(rows) <= 12 else ""
    return (
        f"<details class='bad'{opened}><summary>Looks wrong: {len(rows)}</summary>"
        f"<ul>{lines}</ul></details>"
    )


def _charts(known: list[Figures]) -> list[str]:
    names, marked = [_name(one) for one in known], [bool(one.notes) for one in known]
    out = ["<h2>Size of the change</h2>"]
    on_base = all(one.relative is not None for one in known)
    key = "<span class='key mark'></span> looks wrong" if any(marked) else ""
    if on_base:
        out.append(f"<p class='sub'>|dW| / |W| of each layer, Frobenius. {key}</p>")
        out.append(bars([one.relative or 0.0 for one in known], names, marked, "|dW|/|W|"))
    else:
        out.append(f"<p class='sub'>|dW| of each layer at strength 1, Frobenius. {key}</p>")
        out.append(bars([one.norm or 0.0 for one in known], names, marked, "|dW|"))
    out.append("<h2>Spectra</h2>")
    out.append(
        "<p class='sub'>Singular values over the layer's largest: the median over layers, and the "
        "band from the 10th to the 90th percentile. A line that falls early is rank that is not "
        "used.</p>"
    )
    out.append(spectra([one.spectrum for one in known]))
    return out


def _table(figures: list[Figures]) -> str:
    on_base = any(one.relative is not None for one in figures)
    largest = max((one.norm or 0.0 for one in figures), default=0.0) or 1.0
    heads = ["layer", "algorithm", "rank", "effective rank", "scale", "|dW|"]
    heads += ["|dW|/|W|"] if on_base else []
    heads += ["spectrum", "notes"]
    rows = []
    for one in figures:
        layer = one.layer
        share = 100 * (one.norm or 0.0) / largest
        cells = [
            f"<td title='{escape(layer.module)}'><code>{escape(_name(one))}</code>"
            f"<small>{escape(layer.shape)}</small></td>",
            f"<td>{escape(layer.algorithm)}</td>",
            _cell(layer.rank),
            _cell(one.effective_rank),
            f"<td class='n' data-v='{layer.scale}' title='{escape(layer.scale_from)}'>"
            f"{layer.scale:.4g}</td>",
            f"<td class='n meter' data-v='{one.norm or 0.0}' style='--share:{share:.1f}%'>"
            f"{_said(one.norm)}</td>",
        ]
        cells += [_cell(one.relative)] if on_base else []
        cells += [f"<td>{sparkline(one.spectrum)}</td>", f"<td>{escape('; '.join(one.notes))}</td>"]
        rows.append(f"<tr{' class=odd' if one.notes else ''}>{''.join(cells)}</tr>")
    words = ("layer", "algorithm", "spectrum", "notes")
    head = "".join(
        f"<th tabindex='0'{'' if name in words else ' class=n'}>{escape(name)}</th>"
        for name in heads
    )
    return (
        "<h2>Layers</h2><p class='sub'>Click a heading to sort. <input id='find' "
        "placeholder='find a layer' aria-label='find a layer'></p>"
        f"<div class='scroll'><table id='layers'><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _metadata(inspection: Inspection) -> str:
    shown = [(key, inspection.metadata[key]) for key in _SHOWN if key in inspection.metadata]
    if not shown:
        return ""
    rows = "".join(
        f"<tr><td><code>{escape(key)}</code></td><td>{escape(value[:300])}</td></tr>"
        for key, value in shown
    )
    return f"<h2>Metadata</h2><table class='plain'>{rows}</table>"


def _name(one: Figures) -> str:
    rows = f" rows {one.layer.rows}" if one.layer.rows else ""
    return (one.layer.layer or one.layer.module) + rows


def _cell(value: float | int | None) -> str:
    return f"<td class='n' data-v='{-1 if value is None else value}'>{_said(value)}</td>"


def _said(value: float | int | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _few(values: list[str]) -> str:
    return ", ".join(values[:4]) + (f" and {len(values) - 4} more" if len(values) > 4 else "")


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sorts block 2 before block 10."""
    return [
        (not p.isdigit(), int(p) if p.isdigit() else 0, p)
        for p in re.findall(r"[0-9]{1,18}|[^0-9]+", name)
    ]
