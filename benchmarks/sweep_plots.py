"""Draws a sweep: speed-up and acceptance over exit layers, and speed-up over the whole grid.

Knows tables and matplotlib; measures nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final, TypedDict

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, PercentFormatter

from benchmarks.sweep_table import ALL_DOMAINS, Row, Table

_COLOURS: Final = ("#1f5fa8", "#d1671f")
_DASHES: Final = ("-", "--")
_FAINT: Final = 0.3
_GREY: Final = "#666666"
_DOTS_PER_INCH: Final = 150
_LEAST_RANGE: Final = 0.1
_MOST_RANGE: Final = 0.8
"""Colours end this far from break-even, so that one very slow cell does not wash out the rest."""


class _Style(TypedDict):
    """How a checkpoint's bold line looks, in matplotlib's words; no label: none in the legend."""

    color: str
    linestyle: str
    label: str


def draw_curves(tables: Sequence[Table], path: Path) -> None:
    """The best speed-up of each exit layer above its acceptance rate, at the shortest draft length.

    Single domains are faint, means over all domains bold.
    """
    figure = Figure(figsize=(8, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    speed, acceptance = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    shortest = min(row.draft_length for table in tables for row in table.rows)
    for table, colour, dash in zip(tables, _COLOURS, _DASHES, strict=False):
        for domain in (*table.domains, ALL_DOMAINS):
            drafts = [row for row in table.of(domain) if row.draft_length == shortest]
            label = f"{table.checkpoint}, mean of {len(table.domains)} domains"
            _line(speed, table.curve(domain), "speed_up", _Style(color=colour, linestyle=dash, label=label))
            _line(acceptance, drafts, "acceptance_rate", _Style(color=colour, linestyle=dash, label=""))
        _mark_sweet_spot(speed, table, colour)
    speed.plot([], [], color=_GREY, alpha=2 * _FAINT, linewidth=1, label="single domains")
    speed.axhline(1, color="black", linewidth=1.4, linestyle=":", label="plain decoding")
    speed.set_ylabel("speed-up over plain decoding")
    speed.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2f}×"))
    speed.set_title("Best draft length at each exit layer")
    speed.margins(y=0.12)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    acceptance.set_ylabel(f"drafts kept (draft length {shortest})")
    acceptance.set_ylim(0, 1)
    acceptance.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    acceptance.set_xlabel("exit layer (decoder layers that draft)")
    layers = sorted({row.exit_layer for table in tables for row in table.rows})
    acceptance.xaxis.set_major_locator(FixedLocator(layers))
    # Room at both ends for the words at a sweet spot that lies there.
    room = 0.12 * max(1, layers[-1] - layers[0])
    acceptance.set_xlim(layers[0] - room, layers[-1] + room)
    for axes in (speed, acceptance):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    figure.savefig(path, dpi=_DOTS_PER_INCH)


def draw_grids(tables: Sequence[Table], path: Path) -> None:
    """Speed-up of every exit layer and draft length, mean over all domains: blue wins, red loses.

    Raises ValueError where no setting was measured on all domains.
    """
    means = [(table, rows) for table in tables if (rows := table.of(ALL_DOMAINS))]
    layers = sorted({row.exit_layer for _, rows in means for row in rows})
    lengths = sorted({row.draft_length for _, rows in means for row in rows})
    furthest = max(abs(row.speed_up - 1) for _, rows in means for row in rows)
    reach = min(max(furthest, _LEAST_RANGE), _MOST_RANGE)
    size = (1.6 + max(5.0, 0.75 * len(layers)), (1.2 + 0.55 * max(3, len(lengths))) * len(means) + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(means), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (table, rows) in zip(panels, means, strict=True):
        image = _grid(axes, rows, layers, lengths, Normalize(1 - reach, 1 + reach))
        axes.set_title(table.checkpoint, fontsize=11)
    panels[-1].set_xlabel("exit layer (decoder layers that draft)")
    extend = "both" if furthest > _MOST_RANGE else "neither"
    bar = figure.colorbar(image, ax=list(panels), extend=extend, pad=0.02)
    bar.ax.axhline(1, color="black", linewidth=1.5)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2f}×"))
    domains = len(tables[0].domains)
    figure.suptitle(f"Speed-up over plain decoding, mean of {domains} domains (box: the best)", fontsize=12)
    figure.savefig(path, dpi=_DOTS_PER_INCH)


def _line(axes: Axes, rows: Sequence[Row], figure: str, style: _Style) -> None:
    if not rows:
        return
    rows = sorted(rows, key=lambda row: row.exit_layer)
    layers, figures = [row.exit_layer for row in rows], [getattr(row, figure) for row in rows]
    if rows[0].domain == ALL_DOMAINS:
        axes.plot(layers, figures, linewidth=2.6, marker="o", markersize=5, zorder=3, **style)
    else:
        axes.plot(layers, figures, linewidth=1, alpha=_FAINT, zorder=2, color=style["color"])


def _mark_sweet_spot(axes: Axes, table: Table, colour: str) -> None:
    best = table.best(ALL_DOMAINS)
    if best is None:
        return
    axes.annotate(
        f"E={best.exit_layer}, γ={best.draft_length}: {best.speed_up:.2f}×",
        (best.exit_layer, best.speed_up),
        xytext=(0, 12),
        textcoords="offset points",
        ha="center",
        color=colour,
        fontweight="bold",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        zorder=4,
    )


def _grid(
    axes: Axes, rows: Sequence[Row], layers: Sequence[int], lengths: Sequence[int], norm: Normalize
) -> AxesImage:
    cells = {(row.draft_length, row.exit_layer): row.speed_up for row in rows}
    missing = float("nan")
    values = [[cells.get((length, layer), missing) for layer in layers] for length in lengths]
    image = axes.imshow(values, cmap="RdBu", norm=norm, aspect="auto", origin="lower")
    best = max(cells, key=lambda cell: cells[cell])
    for (length, layer), speed_up in cells.items():
        x, y = layers.index(layer), lengths.index(length)
        shade = abs(float(norm(speed_up)) - 0.5)
        weight = "bold" if (length, layer) == best else "normal"
        colour = "white" if shade > 0.27 else "black"
        axes.text(
            x, y, f"{speed_up:.2f}", ha="center", va="center", fontsize=9, fontweight=weight, color=colour
        )
    corner = (layers.index(best[1]) - 0.5, lengths.index(best[0]) - 0.5)
    axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="black", linewidth=2.5, clip_on=False))
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_yticks(range(len(lengths)), [str(length) for length in lengths])
    axes.set_ylabel("draft length")
    return image
