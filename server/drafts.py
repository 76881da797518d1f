"""Counts drafts: how many were proposed, reached and kept, by exit layer and position.

The same tally serves one answer's statistics and the metrics of the whole server, so that they agree.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from decoding.messages import Drafter


@dataclass(frozen=True, slots=True)
class CycleDrafts:
    """What one cycle of one sequence drafted, kept ones first; a cycle may draft nothing."""

    drafted_ids: Sequence[int]
    kept: int
    exit_layer: int
    drafter: Drafter


@dataclass(frozen=True, slots=True)
class PositionCounts:
    """Drafts at one position of a run: proposed, reached (all before it were kept) and kept."""

    proposed: int
    reached: int
    kept: int


@dataclass(slots=True)
class DraftTally:
    """How often a cycle of one drafter drafted `drafted` tokens at an exit layer and kept `kept` of them.

    Everything else is derived from these counts. A cycle that drafted nothing is counted for its exit layer
    and for nothing else.
    """

    _cycles: Counter[tuple[int, Drafter, int, int]] = field(default_factory=Counter)

    def record(
        self, *, exit_layer: int, drafted: int, kept: int, drafter: Drafter = Drafter.EARLY_EXIT
    ) -> None:
        """Add one sequence's cycle."""
        self._cycles[exit_layer, drafter, drafted, kept] += 1

    def add(self, other: DraftTally) -> None:
        """Add everything `other` counted."""
        self._cycles.update(other._cycles)

    @property
    def num_drafts(self) -> int:
        """Cycles that drafted at least one token."""
        return sum(count for (_, _, drafted, _), count in self._cycles.items() if drafted)

    @property
    def num_draft_tokens(self) -> int:
        """Tokens proposed."""
        return sum(drafted * count for (_, _, drafted, _), count in self._cycles.items())

    @property
    def num_kept_tokens(self) -> int:
        """Tokens kept."""
        return sum(kept * count for (_, _, _, kept), count in self._cycles.items())

    @property
    def by_drafter(self) -> dict[str, int]:
        """Tokens proposed by each drafter that proposed any, early exit in any case."""
        counts = Counter({str(Drafter.EARLY_EXIT): 0})
        for (_, drafter, drafted, _), count in self._cycles.items():
            if drafted:
                counts[str(drafter)] += drafted * count
        return dict(counts)

    @property
    def main_exit_layer(self) -> int | None:
        """The exit layer of most cycles, None before the first."""
        layers: Counter[int] = Counter()
        for (exit_layer, _, _, _), count in self._cycles.items():
            layers[exit_layer] += count
        return layers.most_common(1)[0][0] if layers else None

    def kept_histogram(self, *, max_draft_length: int) -> list[int]:
        """How many drafting cycles kept 0, 1, … `max_draft_length` tokens."""
        histogram = [0] * (max_draft_length + 1)
        for (_, _, drafted, kept), count in self._cycles.items():
            if drafted:
                histogram[kept] += count
        return histogram

    @property
    def kept_by_drafter(self) -> dict[str, int]:
        """Tokens kept of each drafter in `by_drafter`."""
        counts = Counter(dict.fromkeys(self.by_drafter, 0))
        for (_, drafter, drafted, kept), count in self._cycles.items():
            if drafted:
                counts[str(drafter)] += kept * count
        return dict(counts)

    def by_position(self, *drafters: Drafter) -> dict[tuple[int, int], PositionCounts]:
        """Counts for every (exit layer, position) that these drafters ever proposed."""
        proposed: Counter[tuple[int, int]] = Counter()
        reached: Counter[tuple[int, int]] = Counter()
        kept_at: Counter[tuple[int, int]] = Counter()
        for (exit_layer, drafter, drafted, kept), count in self._cycles.items():
            for position in range(drafted if drafter in drafters else 0):
                key = exit_layer, position
                proposed[key] += count
                reached[key] += count if position <= kept else 0
                kept_at[key] += count if position < kept else 0
        return {key: PositionCounts(proposed[key], reached[key], kept_at[key]) for key in sorted(proposed)}


class AcceptanceWindow:
    """Kept over drafted for the latest `min_drafts` drafts of one exit layer, to whole cycles."""

    def __init__(self, *, min_drafts: int = 1000) -> None:
        self._min_drafts = min_drafts
        self._latest: deque[tuple[int, int]] = deque()
        self._drafted = 0
        self._kept = 0

    @property
    def rate(self) -> float:
        """Kept over drafted, 0 before the first draft."""
        return self._kept / self._drafted if self._drafted else 0.0

    def record(self, *, drafted: int, kept: int) -> None:
        """Add a cycle and forget those that the window no longer needs."""
        self._latest.append((drafted, kept))
        self._drafted += drafted
        self._kept += kept
        while self._drafted - self._latest[0][0] >= self._min_drafts:
            oldest_drafted, oldest_kept = self._latest.popleft()
            self._drafted -= oldest_drafted
            self._kept -= oldest_kept
