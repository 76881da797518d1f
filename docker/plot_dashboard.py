"""Draws every panel of the Grafana dashboard into one picture, from a Prometheus and without a Grafana.

Knows the dashboard's JSON and Prometheus' HTTP API; knows nothing of what the series mean.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, Formatter, PercentFormatter
from PIL import Image

DASHBOARD: Final = Path(__file__).parent / "grafana" / "dashboards" / "layerskip.json"
COLUMNS: Final = 24
# One cell of Grafana's grid and the space around panels, in inches.
CELL_WIDTH, CELL_HEIGHT, MARGIN = 0.72, 0.34, 0.12
TITLE_HEIGHT, TICKS_HEIGHT, TICKS_WIDTH = 0.3, 0.25, 0.5
LEGEND_WIDTH: Final = 1.9
DPI: Final = 80
NUM_COLORS: Final = 96

Panel = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Series:
    """One line: its legend, and values over seconds since the range began."""

    label: str
    times: Sequence[float]
    values: Sequence[float]

    @property
    def last(self) -> float:
        """The newest value that is a number, as Grafana's `lastNotNull`."""
        return next((value for value in reversed(self.values) if not math.isnan(value)), math.nan)


def reading_order(series: Series) -> list[str]:
    """Labels by their words, position 10 after position 9."""
    return [word.zfill(4) if word.isdigit() else word for word in re.findall(r"\d+|\D+", series.label)]


@dataclass(frozen=True, slots=True)
class Range:
    """The time shown, and what Grafana would fill in for its variables."""

    prometheus: str
    start_s: float
    end_s: float
    rate_s: int

    def ask(self, target: Panel) -> list[Series]:
        """All series of one query of a panel."""
        step_s = max(1.0, (self.end_s - self.start_s) / 300)
        parameters = {
            "query": self._fill_in(target["expr"]),
            "start": self.start_s,
            "end": self.end_s,
            "step": step_s,
        }
        url = f"{self.prometheus}/api/v1/query_range?{urllib.parse.urlencode(parameters)}"
        # A proxy for the world outside must not be asked for a Prometheus beside us.
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=30) as answer:
            results = json.load(answer)["data"]["result"]
        return sorted((self._series(result, target["legendFormat"]) for result in results), key=reading_order)

    def _fill_in(self, expression: str) -> str:
        span = f"{round(self.end_s - self.start_s)}s"
        values = {"$model_name": ".*", "$__rate_interval": f"{self.rate_s}s", "$__range": span}
        for name, value in values.items():
            expression = expression.replace(name, value)
        return expression

    def _series(self, result: Panel, legend: str) -> Series:
        label = re.sub(r"\{\{(\w+)\}\}", lambda found: result["metric"].get(found[1], ""), legend)
        times = [float(at) - self.start_s for at, _ in result["values"]]
        return Series(label, times, [float(value) for _, value in result["values"]])


def formatter(panel: Panel) -> Formatter:
    """How the panel's unit is written."""
    unit = panel["fieldConfig"]["defaults"].get("unit", "none")
    if unit == "percentunit":
        return PercentFormatter(1.0, decimals=0)
    return EngFormatter("s" if unit == "s" else "", sep="")


def shown(panel: Panel, value: float) -> str:
    """One value as a stat panel writes it."""
    defaults = panel["fieldConfig"]["defaults"]
    for mapping in defaults.get("mappings", []):
        if (option := mapping["options"].get(f"{value:g}")) is not None:
            return str(option["text"])
    if defaults.get("unit") == "percentunit":
        return f"{value:.1%}"
    return f"{value:.{defaults['decimals']}f}" if "decimals" in defaults else f"{value:.4g}"


def draw_stat(axes: Axes, panel: Panel, series: Sequence[Series]) -> None:
    """The newest value in large letters, over its own curve."""
    axes.set_axis_off()
    text = "\n".join(shown(panel, each.last) for each in series) or "no data"
    axes.text(0.5, 0.55, text, ha="center", va="center", fontsize=19, transform=axes.transAxes)
    if panel["options"]["graphMode"] == "area":
        for each in series:
            axes.fill_between(each.times, each.values, alpha=0.15, linewidth=0)
            axes.set_ylim(0, 2.5 * max(each.values) or 1)


def draw_bars(axes: Axes, panel: Panel, series: Sequence[Series]) -> None:
    """One bar for the newest value of each series."""
    bars = axes.barh([each.label for each in series], [each.last for each in series], color="tab:green")
    axes.bar_label(bars, [shown(panel, each.last) for each in series], fontsize=7, padding=2)
    axes.set_xlim(0, 1.1 * panel["fieldConfig"]["defaults"].get("max", 1))
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.tick_params(labelsize=7)


def draw_lines(axes: Axes, panel: Panel, series: Sequence[Series]) -> None:
    """All series over time, stacked where the panel says so."""
    defaults = panel["fieldConfig"]["defaults"]
    axes.set_prop_cycle(color=plt.get_cmap("tab10" if len(series) <= 10 else "tab20").colors)
    if "stacking" in defaults["custom"] and series:
        axes.stackplot(
            series[0].times, *(each.values for each in series), labels=[each.label for each in series]
        )
    else:
        for each in series:
            axes.plot(each.times, each.values, label=each.label, linewidth=1.3)
    axes.set_ylim(bottom=defaults.get("min"), top=defaults.get("max"))
    if defaults.get("max") == 1 and defaults.get("unit") == "none":
        axes.set_yticks([0, 1])
    axes.yaxis.set_major_formatter(formatter(panel))
    axes.xaxis.set_major_formatter(EngFormatter("s", sep=""))
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    if series:
        place_legend(axes, panel, num_series=len(series))


def place_legend(axes: Axes, panel: Panel, *, num_series: int) -> None:
    """Beside the lines where the panel has room set apart for it, else above them, beside the title."""
    style = {"fontsize": 7, "frameon": False, "labelspacing": 0.25, "handlelength": 1.2}
    if has_legend_beside(panel):
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.03), **style)
    else:
        axes.legend(
            loc="lower right", bbox_to_anchor=(1.03, 0.97), ncols=num_series, columnspacing=1, **style
        )


def has_legend_beside(panel: Panel) -> bool:
    """Whether the legend stands to the right of the lines."""
    return panel["type"] == "timeseries" and panel["options"]["legend"]["placement"] == "right"


DRAW: Final[Mapping[str, Callable[[Axes, Panel, Sequence[Series]], None]]] = {
    "stat": draw_stat,
    "bargauge": draw_bars,
    "timeseries": draw_lines,
}


class Canvas:
    """A figure with the dashboard's grid; positions are Grafana's, from the top left."""

    def __init__(self, panels: Sequence[Panel]) -> None:
        rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
        self._width, self._height = COLUMNS * CELL_WIDTH, rows * CELL_HEIGHT
        self.figure = plt.figure(figsize=(self._width, self._height), facecolor="#f4f5f5")

    def heading(self, panel: Panel) -> None:
        """The title of a row of panels."""
        at = panel["gridPos"]
        y = self._height - (at["y"] + 0.7) * CELL_HEIGHT
        self.figure.text(MARGIN / self._width, y / self._height, panel["title"], fontsize=12, weight="bold")

    def axes(self, panel: Panel) -> Axes:
        """An empty panel with its title, and room for ticks and a legend."""
        at = panel["gridPos"]
        left, width = at["x"] * CELL_WIDTH + MARGIN / 2, at["w"] * CELL_WIDTH - MARGIN
        height = at["h"] * CELL_HEIGHT - MARGIN
        bottom = self._height - at["y"] * CELL_HEIGHT - MARGIN / 2 - height
        self._box(left, bottom, width, height).set(xticks=[], yticks=[])
        self.figure.text(
            (left + 0.1) / self._width, (bottom + height - 0.2) / self._height, panel["title"], fontsize=9
        )
        if panel["type"] == "stat":
            return self._box(left, bottom, width, height - TITLE_HEIGHT)
        names = 1.4 if panel["type"] == "bargauge" else TICKS_WIDTH
        legend = LEGEND_WIDTH if has_legend_beside(panel) else 0.15
        inner = self._box(
            left + names, bottom + TICKS_HEIGHT, width - names - legend, height - TICKS_HEIGHT - TITLE_HEIGHT
        )
        inner.spines[["top", "right"]].set_visible(False)
        return inner

    def _box(self, left: float, bottom: float, width: float, height: float) -> Axes:
        inches = (left / self._width, bottom / self._height, width / self._width, height / self._height)
        return self.figure.add_axes(inches)


def draw(panels: Sequence[Panel], range_: Range) -> Figure:
    """The whole dashboard."""
    canvas = Canvas(panels)
    for panel in panels:
        if panel["type"] == "row":
            canvas.heading(panel)
        else:
            series = [each for target in panel["targets"] for each in range_.ask(target)]
            DRAW[panel["type"]](canvas.axes(panel), panel, series)
    return canvas.figure


def save(figure: Figure, path: Path) -> None:
    """A PNG of few colours, which is a fraction of the size."""
    full = io.BytesIO()
    figure.savefig(full, dpi=DPI, facecolor=figure.get_facecolor())
    Image.open(full).convert("RGB").quantize(NUM_COLORS).save(path, format="PNG", optimize=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prometheus", help="http://HOST:PORT of a Prometheus that scrapes the server")
    parser.add_argument("picture", type=Path, help="PNG to write")
    parser.add_argument("--seconds", type=float, default=900, help="how far back to look (default 900)")
    parser.add_argument("--rate-seconds", type=int, default=20, help="window of rates (default 20)")
    chosen = parser.parse_args()
    now_s = time.time()
    range_ = Range(chosen.prometheus.rstrip("/"), now_s - chosen.seconds, now_s, chosen.rate_seconds)
    save(draw(json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"], range_), chosen.picture)


if __name__ == "__main__":
    main()
