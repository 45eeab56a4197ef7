"""The chart of a measurement: every layer and adapter, the project's time over the bare layer's
beside the best peer's.
"""

from __future__ import annotations

from pathlib import Path

from .table import CALLS, COLUMNS, peer_ratio

SHOWN = COLUMNS[:5]
OURS, PEERS, LINE = "#0b6e4f", "#b5651d", "#c8c8c8"
TITLES = {"forward": "forward", "step": "step: forward, dx, factor gradients"}


def draw(data: dict, path: Path) -> None:
    """A PNG: a line an adapter on a layer, a dot for the project and a ring for the peers' best."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in data["rows"] if row["adapter"] in SHOWN]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    rows.sort(key=lambda row: (shapes.index(row["shape"]), SHOWN.index(row["adapter"])))
    # A free line above each layer's first adapter holds the layer's name.
    places, names, y = [], [], 0.0
    for i, row in enumerate(rows):
        if i == 0 or row["shape"] != rows[i - 1]["shape"]:
            names.append((y, row["shape"]))
            y += 1
        places.append(y)
        y += 1
    height = 0.9 + 0.19 * y
    figure, panels = pyplot.subplots(1, 2, figsize=(11, height), sharey=True)
    for panel, call in zip(panels, CALLS, strict=True):
        for row, at in zip(rows, places, strict=True):
            ours, peer = row[f"{call}_ratio"], peer_ratio(data, row).get(call)
            if peer is not None:
                panel.plot([ours, peer], [at, at], color=LINE, linewidth=2, zorder=1)
                panel.plot(peer, at, "o", color=PEERS, markerfacecolor="white", zorder=2)
                panel.annotate(f"{peer:.2f}", (peer, at), (5, 0), **_LABEL, color=PEERS, ha="left")
            panel.plot(ours, at, "o", color=OURS, zorder=3)
            # In a column of their own, left of the bare layer's line.
            left = min(0.985, ours)
            panel.annotate(f"{ours:.2f}", (left, at), (-6, 0), **_LABEL, color=OURS, ha="right")
        panel.axvline(1.0, color="black", linewidth=0.8, zorder=1)
        panel.set_xscale("log")
        ends = panel.get_xlim()
        panel.set_xlim(min(0.75, ends[0]), ends[1] * 1.25)
        panel.set_ylim(-0.8, y - 0.2)
        wide = ends[1] > 5  # no room for the small steps
        steps = (1, 1.5, 2, 3, 5, 10, 20, 50, 100) if wide else (1, 1.1, 1.25, 1.5, 2, 3, 5)
        ticks = [t for t in steps if t < ends[1] * 1.25]
        panel.set_xticks(ticks, [f"{t:g}x" for t in ticks])
        panel.minorticks_off()
        panel.set_title(TITLES[call], fontsize=10, loc="left")
        panel.grid(axis="x", color="#ececec")
        panel.set_axisbelow(True)
        panel.tick_params(labelsize=8, length=0)
        for side in ("top", "right", "left"):
            panel.spines[side].set_visible(False)
    panels[0].set_yticks(places, [row["adapter"] for row in rows])
    panels[0].invert_yaxis()
    for at, name in names:
        panels[0].annotate(
            name, (0, at), xycoords=("axes fraction", "data"), xytext=(-4, 0),
            textcoords="offset points", ha="right", va="center", fontsize=8, fontweight="bold",
        )  # fmt: skip
    handles = [pyplot.Line2D([], [], marker="o", linestyle="", color=OURS, label="lycoris_cupy")]
    if data.get("peers"):
        handles.append(
            pyplot.Line2D(
                [],
                [],
                marker="o",
                linestyle="",
                color=PEERS,
                markerfacecolor="white",
                label="best of lycoris-lora and peft, any mode",
            )  # fmt: skip
        )
    figure.suptitle(
        f"Device time over the bare layer's, bf16, {data.get('gpu') or 'CPU'}", fontsize=11, x=0.02,
        ha="left", y=1 - 0.12 / height,
    )  # fmt: skip
    figure.legend(
        handles=handles, loc="upper right", ncols=2, fontsize=8, frameon=False,
        bbox_to_anchor=(0.99, 1 - 0.04 / height),
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.28 / height))
    figure.savefig(path, dpi=130, metadata={"Software": None})
    pyplot.close(figure)


_LABEL = {"textcoords": "offset points", "fontsize": 7, "va": "center"}
