"""Reduces passes that were run side by side to ratios with their bounds, a table and a drawing.

Knows passes; runs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Final

from benchmarks.closed_loop import Drafting, Pass
from benchmarks.machine import aligned
from benchmarks.summaries import Ratio
from benchmarks.timing import Sampled

MOST_LOST: Final = 0.02
"""Promised: drafts that nobody asked for cost no more than this share of plain decoding's speed."""

_COLOURS: Final = ("#1f5fa8", "#d1671f", "#3a8f5c")


@dataclass(frozen=True, slots=True)
class Scanned:
    """A setting of the scan, and its speed over plain decoding run beside it."""

    drafting: Drafting
    speed_up: float


@dataclass(frozen=True, slots=True)
class Contest:
    """One concurrency: who ran beside whom. Each tuple has a pass for every round; `peer` may have fewer."""

    sampled: Sampled
    concurrency: int
    static: Drafting
    scan: tuple[Scanned, ...]
    auto: tuple[Pass, ...]
    plain: tuple[Pass, ...]
    fixed: tuple[Pass, ...]
    peer: tuple[Pass, ...] = ()

    @property
    def over_plain(self) -> Ratio:
        return Ratio.of(_speeds(self.auto), _speeds(self.plain))

    @property
    def over_static(self) -> Ratio:
        return Ratio.of(_speeds(self.auto), _speeds(self.fixed))

    @property
    def keeps_its_promise(self) -> bool:
        """Whether "auto" lost no more than it may, with 95 % confidence."""
        return self.over_plain.lower_bound >= 1 - MOST_LOST

    @property
    def num_compared(self) -> int:
        """Tokens of "auto" and of the static setting that were held against plain decoding's."""
        return sum(each.num_tokens for each in (*self.auto, *self.fixed))

    @property
    def num_different_texts(self) -> int:
        """Texts that are not plain decoding's of the same round."""
        return sum(
            one != other
            for passes in (self.auto, self.fixed)
            for found, plain in zip(passes, self.plain, strict=True)
            for one, other in zip(found.token_ids, plain.token_ids, strict=True)
        )

    def as_json(self) -> dict[str, object]:
        named: Mapping[str, tuple[Pass, ...]] = {
            "auto": self.auto,
            "plain": self.plain,
            "static": self.fixed,
            "peer": self.peer,
        }
        return {
            "concurrency": self.concurrency,
            **asdict(self.sampled),
            "best_static": asdict(self.static),
            "tokens_per_s": {name: round(_speed(each), 2) for name, each in named.items() if each},
            "tokens_per_s_by_round": {
                name: [round(value, 2) for value in _speeds(each)] for name, each in named.items() if each
            },
            "auto_over_plain": self.over_plain.as_json(),
            "auto_over_best_static": self.over_static.as_json(),
            "first_round_auto_over_plain": round(_speeds(self.auto)[0] / _speeds(self.plain)[0], 4),
            "keeps_its_promise": self.keeps_its_promise,
            "acceptance_rate": {"auto": _acceptance(self.auto), "static": _acceptance(self.fixed)},
            "drafts_per_token": {"auto": _drafts(self.auto), "static": _drafts(self.fixed)},
            "tokens_compared": self.num_compared,
            "texts_different": self.num_different_texts,
            "scan": [{**asdict(each.drafting), "speed_up": round(each.speed_up, 4)} for each in self.scan],
        }


def _speeds(passes: Sequence[Pass]) -> list[float]:
    return [each.tokens_per_s for each in passes]


def _speed(passes: Sequence[Pass]) -> float:
    return median(_speeds(passes))


def _acceptance(passes: Sequence[Pass]) -> float | None:
    drafted = sum(each.drafted for each in passes)
    return round(sum(each.kept for each in passes) / drafted, 4) if drafted else None


def _drafts(passes: Sequence[Pass]) -> float:
    return round(sum(each.drafted for each in passes) / sum(each.num_tokens for each in passes), 4)


def as_text(contests: Sequence[Contest]) -> str:
    """One line for each concurrency and way of choosing tokens."""
    head = [
        "tokens by",
        "at once",
        "γ=0",
        "auto",
        "static",
        "tokens/s",
        "peer",
        "auto/γ=0",
        "at least",
        "lowest",
    ]
    head += ["auto/static", "at least", "kept", "promise", "compared", "differ"]
    return aligned(head, [_cells(contest) for contest in contests])


def _cells(contest: Contest) -> list[str]:
    plain, static = contest.over_plain, contest.over_static
    acceptance = _acceptance(contest.auto)
    return [
        contest.sampled.label,
        str(contest.concurrency),
        f"{_speed(contest.plain):.1f}",
        f"{_speed(contest.auto):.1f}",
        contest.static.name,
        f"{_speed(contest.fixed):.1f}",
        f"{_speed(contest.peer):.1f}" if contest.peer else "",
        f"{plain.median:.3f}",
        f"{plain.lower_bound:.3f}",
        f"{plain.lowest:.3f}",
        f"{static.median:.3f}",
        f"{static.lower_bound:.3f}",
        "" if acceptance is None else f"{acceptance:.2f}",
        "kept" if contest.keeps_its_promise else "BROKEN",
        str(contest.num_compared),
        str(contest.num_different_texts),
    ]


def draw(contests: Sequence[Contest], path: Path) -> None:
    """For each way of choosing tokens: tokens per second over concurrency, and what "auto" gains."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(contest.sampled.label for contest in contests))
    figure = Figure(figsize=(10, 4 * len(labels)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(labels), 2, squeeze=False)
    for label, (speed, gain) in zip(labels, grid, strict=True):
        drawn = [contest for contest in contests if contest.sampled.label == label]
        places = [contest.concurrency for contest in drawn]
        lines = {
            "auto": [contest.auto for contest in drawn],
            "γ = 0": [contest.plain for contest in drawn],
            "best static": [contest.fixed for contest in drawn],
        }
        for (name, passes), colour in zip(lines.items(), _COLOURS, strict=True):
            speed.plot(places, [_speed(each) for each in passes], marker="o", color=colour, label=name)
        for name, ratios, colour in (
            ("auto / γ = 0", [contest.over_plain for contest in drawn], _COLOURS[1]),
            ("auto / best static", [contest.over_static for contest in drawn], _COLOURS[2]),
        ):
            gain.plot(places, [each.median for each in ratios], marker="o", color=colour, label=name)
            gain.plot(places, [each.lower_bound for each in ratios], linestyle=":", color=colour)
        gain.axhline(1, color="black", linewidth=1, linestyle="--")
        speed.set_ylabel(f"tokens per second, {label}")
        gain.set_ylabel("ratio; dotted: 95 % lower bound")
        speed.set_ylim(bottom=0)
        for axes in (speed, gain):
            axes.set_xscale("log", base=2)
            axes.set_xticks(places)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.minorticks_off()
            axes.set_xlabel("requests at once")
            axes.grid(alpha=0.3)
            axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
