"""Draws what was measured on a GPU: kernels, layers, and speed-ups beside their ceilings.

Knows rows and matplotlib; measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]

_COLOURS: Final = ("#1f5fa8", "#d1671f", "#3a8f5c", "#8a4fa3", "#666666")
_DOTS_PER_INCH: Final = 150


def draw(document: Mapping[str, Any], folder: Path) -> list[Path]:
    """One PNG for each part that has something to draw; returns those written."""
    drawn = []
    for name, draw_part in _DRAWINGS.items():
        rows = [row for row in document["parts"].get(name, {}).get("rows", []) if "left_out" not in row]
        if rows:
            figure = draw_part(rows)
            figure.suptitle(f"{document['hardware']['device']}: {_TITLES[name]}", fontsize=12)
            drawn.append(folder / f"{name}.png")
            figure.savefig(drawn[-1], dpi=_DOTS_PER_INCH)
    return drawn


def _panels(count: int) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(1 + 4.5 * count, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    return figure, panels


def _values(rows: Rows, key: str) -> list[Any]:
    """Different values, in the order in which they come."""
    return list(dict.fromkeys(row[key] for row in rows))


def _kernels(rows: Rows) -> Figure:
    counts = _values(rows, "queries")
    figure, panels = _panels(len(counts))
    for count, axes in zip(counts, panels, strict=True):
        for batch, colour in zip(_values(rows, "batch"), _COLOURS, strict=False):
            own = [row for row in rows if (row["queries"], row["batch"]) == (count, batch)]
            places, label = [row["context"] for row in own], f"{batch} rows"
            axes.plot(places, [row["graph_GB_per_s"] for row in own], "o-", color=colour, label=label)
            axes.plot(places, [row["GB_per_s"] for row in own], linestyle=":", color=colour)
        axes.set_title(f"{count} queries a row (dotted: as launched, caches cold)", fontsize=9)
        axes.set_xlabel("context")
    panels[0].set_ylabel("GB/s of keys and values")
    panels[0].legend(frameon=False)
    return figure


def _layers(rows: Rows) -> Figure:
    figure, panels = _panels(2)
    for shape, colour in zip(_values(rows, "shape"), _COLOURS, strict=False):
        own = [row for row in rows if row["shape"] == shape]
        places = [row["tokens"] for row in own]
        for axes, key in zip(panels, ("layer_ms", "head_ms"), strict=True):
            axes.plot(places, [row[key] for row in own], "o-", color=colour, label=shape)
    for axes, title in zip(panels, ("one layer", "final norm and head"), strict=True):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("tokens")
        axes.set_ylim(bottom=0)
    panels[0].set_ylabel("ms")
    panels[0].legend(frameon=False)
    return figure


def _speculation(rows: Rows) -> Figure:
    shapes = _values(rows, "shape")
    figure, panels = _panels(len(shapes))
    for shape, axes in zip(shapes, panels, strict=True):
        own = [row for row in rows if row["shape"] == shape]
        for asked, colour in zip(_values(own, "asked_acceptance"), _COLOURS, strict=False):
            _curves(axes, [row for row in own if row["asked_acceptance"] == asked], asked, colour)
        axes.axhline(1, color="black", linewidth=1)
        axes.set_title(shape, fontsize=10)
        axes.set_xlabel("rows")
    panels[0].set_ylabel("speed-up over plain decoding")
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def _curves(axes: Axes, rows: Rows, asked: float, colour: str) -> None:
    """The best setting of every batch, its ceiling, and what "auto" makes of it."""
    static = [row for row in rows if row["draft_length"] is not None]
    batches = _values(static, "batch") if static else []
    best = [
        max((row for row in static if row["batch"] == batch), key=lambda row: row["speed_up"])
        for batch in batches
    ]
    label = f"acceptance {asked:g}: best"
    axes.plot(batches, [row["speed_up"] for row in best], "o-", color=colour, label=label)
    axes.plot(batches, [row["ceiling"] for row in best], ":", color=colour, label="its ceiling")
    auto = [row for row in rows if row["draft_length"] is None]
    places, speed_ups = [row["batch"] for row in auto], [row["speed_up"] for row in auto]
    axes.plot(places, speed_ups, "x--", color=colour, label="auto")


_DRAWINGS: Final = {"kernels": _kernels, "layers": _layers, "speculation": _speculation}
_TITLES: Final = {
    "kernels": "paged attention",
    "layers": "time by number of tokens",
    "speculation": "drafts and their ceiling",
}
