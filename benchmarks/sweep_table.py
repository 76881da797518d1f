"""What a sweep gave at every exit layer and draft length, and the shape of speed-up over exit layers.

Knows numbers; measures nothing and writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from math import sqrt
from statistics import fmean, median, stdev
from typing import Final, Self

ALL_DOMAINS: Final = "all domains"
"""The name under which rows stand that are means over all domains."""

_NOISES: Final = 2
"""A fall counts from this many standard deviations between repeats."""


@dataclass(frozen=True, slots=True)
class Row:
    """One setting on one domain. `speed_ups` has one ratio for each repeat: plain time over its time.

    Rates, times and tokens per second are means or medians over all repeats; counts are sums.
    """

    domain: str
    exit_layer: int
    draft_length: int
    speed_ups: tuple[float, ...]
    tokens_per_s: float
    plain_tokens_per_s: float
    predicted_speed_up: float
    acceptance_rate: float
    tokens_per_cycle: float
    draft_step_ms: float
    verify_ms: float
    plain_step_ms: float
    drafted: int
    kept: int
    tokens_compared: int
    tokens_different: int

    @property
    def speed_up(self) -> float:
        return median(self.speed_ups)

    @property
    def deviation(self) -> float | None:
        """The standard deviation of the speed-up between repeats; None with a single repeat."""
        return stdev(self.speed_ups) if len(self.speed_ups) > 1 else None

    @classmethod
    def mean(cls, rows: Sequence[Row]) -> Row:
        """Rows of one setting, one for each domain, as one: every domain weighs the same; counts add up."""
        merged: dict[str, object] = {}
        for field in fields(cls):
            values = [getattr(row, field.name) for row in rows]
            if isinstance(values[0], float):
                merged[field.name] = fmean(values)
        repeats = zip(*(row.speed_ups for row in rows), strict=False)
        return replace(
            rows[0],
            domain=ALL_DOMAINS,
            speed_ups=tuple(fmean(ratios) for ratios in repeats),
            drafted=sum(row.drafted for row in rows),
            kept=sum(row.kept for row in rows),
            tokens_compared=sum(row.tokens_compared for row in rows),
            tokens_different=sum(row.tokens_different for row in rows),
            **merged,  # type: ignore[arg-type]
        )


@dataclass(frozen=True, slots=True)
class Table:
    """All rows of one checkpoint; `domains` are those asked for, though a sweep cut short may lack some."""

    checkpoint: str
    num_layers: int
    domains: tuple[str, ...]
    rows: tuple[Row, ...]

    def of(self, domain: str) -> tuple[Row, ...]:
        """The rows of a domain, or the means of those settings that every domain has seen."""
        if domain != ALL_DOMAINS:
            return tuple(row for row in self.rows if row.domain == domain)
        settings: dict[tuple[int, int], list[Row]] = {}
        for row in self.rows:
            settings.setdefault((row.exit_layer, row.draft_length), []).append(row)
        return tuple(Row.mean(rows) for rows in settings.values() if len(rows) == len(self.domains))

    def best(self, domain: str) -> Row | None:
        """The fastest setting of a domain; None where nothing was measured."""
        return max(self.of(domain), key=lambda row: row.speed_up, default=None)

    def first_acceptances(self) -> dict[int, float]:
        """Kept over drafted by exit layer, where single drafts were measured."""
        return {row.exit_layer: row.acceptance_rate for row in self.of(ALL_DOMAINS) if row.draft_length == 1}

    def curve(self, domain: str) -> tuple[Row, ...]:
        """The fastest draft length of every exit layer, by exit layer."""
        fastest: dict[int, Row] = {}
        for row in self.of(domain):
            rival = fastest.setdefault(row.exit_layer, row)
            if row.speed_up > rival.speed_up:
                fastest[row.exit_layer] = row
        return tuple(fastest[layer] for layer in sorted(fastest))


@dataclass(frozen=True, slots=True)
class Shape:
    """Best speed-up of each exit layer in order, and the noise between repeats; None where it is unknown.

    A hump, as the LayerSkip authors describe it, rises to a sweet spot and falls again. Here: both ends of
    the curve lie below its best exit layer by more than two standard deviations of a speed-up between repeats.
    """

    exit_layers: tuple[int, ...]
    speed_ups: tuple[float, ...]
    noise: float | None

    @classmethod
    def of(cls, curve: Sequence[Row]) -> Self:
        """The shape of a curve; its points' variances are pooled, for a few repeats say little of one point."""
        known = [row.deviation**2 for row in curve if row.deviation is not None]
        return cls(
            exit_layers=tuple(row.exit_layer for row in curve),
            speed_ups=tuple(row.speed_up for row in curve),
            noise=sqrt(fmean(known)) if known and len(known) == len(curve) else None,
        )

    @property
    def sweet_spot(self) -> int:
        """The exit layer with the highest speed-up."""
        return self.exit_layers[self.speed_ups.index(max(self.speed_ups))]

    @property
    def rises(self) -> bool:
        """Whether the curve starts clearly below its best."""
        return max(self.speed_ups) - self.speed_ups[0] > self.margin

    @property
    def falls(self) -> bool:
        """Whether the curve ends clearly below its best."""
        return max(self.speed_ups) - self.speed_ups[-1] > self.margin

    @property
    def is_hump(self) -> bool:
        return self.rises and self.falls

    @property
    def margin(self) -> float:
        """What a difference must exceed to be one; 0 where the noise is unknown."""
        return _NOISES * (self.noise or 0.0)

    def in_words(self) -> str:
        """Whether the hump is there, and which part of it is missing."""
        ends = f"{self.speed_ups[0]:.2f}x at exit layer {self.exit_layers[0]}"
        ends += f", {max(self.speed_ups):.2f}x at {self.sweet_spot}"
        ends += f", {self.speed_ups[-1]:.2f}x at {self.exit_layers[-1]}"
        return f"{self._verdict()} ({ends}; {self._noise_in_words()})."

    def _verdict(self) -> str:
        if len(self.exit_layers) < 3:
            return "Fewer than three exit layers, which cannot show a hump"
        if self.is_hump:
            below = "" if max(self.speed_ups) > 1 else ", all of it below break-even"
            return f"The hump appears: rise, sweet spot at exit layer {self.sweet_spot}, fall{below}"
        if self.rises:
            return "No hump: the speed-up rises, and its fall is missing"
        if self.falls:
            return "No hump: the speed-up falls, and its rise is missing"
        return "No hump: rise and fall are both missing, the ends lie within the noise of the best"

    def _noise_in_words(self) -> str:
        if self.noise is None:
            return "one repeat, so that noise is unknown"
        return f"a difference counts from {self.margin:.3f}, {_NOISES} standard deviations between repeats"
