"""Reduces what clients of a server saw to percentiles, a table and a drawing.

Knows exchanges; sends nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from benchmarks.load import Burst
from benchmarks.load_client import Exchange
from benchmarks.machine import aligned
from benchmarks.summaries import Percentiles, Ratio

_COLOURS: Final = {"auto": "#1f5fa8", "plain": "#d1671f"}


@dataclass(frozen=True, slots=True)
class Level:
    """How much load: `concurrency` requests at once, or `rate` arrivals a second."""

    kind: Literal["concurrency", "rate"]
    value: float

    @property
    def label(self) -> str:
        return f"{self.value:g} at once" if self.kind == "concurrency" else f"{self.value:g} a second"


@dataclass(slots=True)
class Side:
    """All rounds of one level with or without drafts."""

    speculation: str
    bursts: list[Burst] = field(default_factory=list)

    @property
    def exchanges(self) -> list[Exchange]:
        """Those that were answered whole."""
        return [each for burst in self.bursts for each in burst.exchanges if each.error is None]

    @property
    def errors(self) -> Counter[str]:
        """What went wrong, and how often."""
        return Counter(each.error for burst in self.bursts for each in burst.exchanges if each.error)

    @property
    def tokens_per_s(self) -> float:
        """Over all rounds."""
        wall_s = sum(burst.wall_s for burst in self.bursts)
        return sum(burst.tokens_per_s * burst.wall_s for burst in self.bursts) / wall_s

    @property
    def acceptance_rate(self) -> float | None:
        """Kept drafts over drafted ones; None where none was made."""
        drafted = sum(each.drafted for each in self.exchanges)
        return sum(each.kept for each in self.exchanges) / drafted if drafted else None

    def latencies(self) -> dict[str, Percentiles | None]:
        """In milliseconds. "itl" is from one run of tokens to the next, "tpot" a token's share after the first."""
        found = self.exchanges
        return {
            "ttft": _in_ms([each.ttft_s for each in found]),
            "itl": _in_ms([gap for each in found for gap in each.gaps_s]),
            "tpot": _in_ms([each.per_token_s for each in found]),
            "end_to_end": _in_ms([each.end_to_end_s for each in found]),
        }

    def as_json(self) -> dict[str, object]:
        latencies = {f"{name}_ms": found and found.as_json() for name, found in self.latencies().items()}
        return {
            "speculation": self.speculation,
            "requests": len(self.exchanges),
            "errors": dict(self.errors),
            "tokens": sum(each.num_tokens for each in self.exchanges),
            "cached_prompt_tokens": sum(each.num_cached_tokens for each in self.exchanges),
            "tokens_per_s": round(self.tokens_per_s, 2),
            "tokens_per_s_by_round": [round(burst.tokens_per_s, 2) for burst in self.bursts],
            "acceptance_rate": self.acceptance_rate,
            **latencies,
        }


@dataclass(frozen=True, slots=True)
class Pairing:
    """One level: rounds with drafts beside rounds without."""

    level: Level
    auto: Side
    plain: Side

    @property
    def speed_up(self) -> Ratio | None:
        """Tokens per second with drafts over those without, round by round; None where a round had no answer."""
        above, below = ([burst.tokens_per_s for burst in side.bursts] for side in (self.auto, self.plain))
        return Ratio.of(above, below) if all(below) else None

    def as_json(self) -> dict[str, object]:
        return {
            self.level.kind: self.level.value,
            "auto_over_plain": (found := self.speed_up) and found.as_json(),
            "sides": [self.auto.as_json(), self.plain.as_json()],
        }


def _in_ms(seconds: Sequence[float | None]) -> Percentiles | None:
    return Percentiles.of([1e3 * each for each in seconds if each is not None])


def as_text(pairings: Sequence[Pairing]) -> str:
    """One line for each level and side."""
    head = ["load", "drafts", "tokens/s", "x plain", "kept", "TTFT p50", "p95", "p99"]
    head += ["ITL p50", "p95", "p99", "TPOT p50", "end p50", "p99", "errors"]
    rows = [_cells(pairing, side) for pairing in pairings for side in (pairing.auto, pairing.plain)]
    return (
        f"Latencies in milliseconds over all rounds; x plain is the median of rounds.\n{aligned(head, rows)}"
    )


def _cells(pairing: Pairing, side: Side) -> list[str]:
    speed_up = pairing.speed_up
    ratio = f"{speed_up.median:.2f}" if speed_up and side is pairing.auto else ""
    kept = side.acceptance_rate
    latencies = side.latencies()
    shown = [
        ("ttft", "p50"),
        ("ttft", "p95"),
        ("ttft", "p99"),
        ("itl", "p50"),
        ("itl", "p95"),
        ("itl", "p99"),
    ]
    shown += [("tpot", "p50"), ("end_to_end", "p50"), ("end_to_end", "p99")]
    return [
        pairing.level.label,
        side.speculation,
        f"{side.tokens_per_s:.1f}",
        ratio,
        "" if kept is None else f"{kept:.2f}",
        *(f"{getattr(latencies[name], share):.1f}" if latencies[name] else "" for name, share in shown),
        str(side.errors.total()),
    ]


def draw(pairings: Sequence[Pairing], path: Path) -> None:
    """Tokens per second and the 95th percentile of inter-token latency over concurrency, of both sides."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    swept = [pairing for pairing in pairings if pairing.level.kind == "concurrency"]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    speed, latency = figure.subplots(1, 2)
    for name in ("auto", "plain"):
        sides: list[Side] = [getattr(pairing, name) for pairing in swept]
        places = [pairing.level.value for pairing in swept]
        p95s = [found.p95 if (found := side.latencies()["itl"]) else float("nan") for side in sides]
        look = {
            "color": _COLOURS[name],
            "marker": "o",
            "label": "drafts: auto" if name == "auto" else "no drafts",
        }
        speed.plot(places, [side.tokens_per_s for side in sides], **look)
        latency.plot(places, p95s, **look)
    speed.set_ylabel("tokens per second, all streams")
    latency.set_ylabel("inter-token latency, p95, ms")
    for axes in (speed, latency):
        axes.set_xscale("log", base=2)
        axes.set_xticks([pairing.level.value for pairing in swept])
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.minorticks_off()
        axes.set_xlabel("requests at once")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    speed.legend(frameon=False)
    figure.savefig(path, dpi=150)
