"""A histogram that takes many equal observations at once, for times shared by the tokens of one run.

Knows bounds and counts; knows nothing of what is measured.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate


class WeightedHistogram:
    """Counts by upper bound, as Prometheus means it: a value equal to a bound lies below it."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, *, weight: int) -> None:
        """Add `weight` observations of `value`."""
        self._counts[bisect_left(self._bounds, value)] += weight
        self.total += value * weight

    @property
    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative counts by upper bound, in Prometheus' spelling."""
        names = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        return list(zip(names, map(float, accumulate(self._counts)), strict=True))
