"""Reduces samples to percentiles, and ratios of pairs to a median with a lower bound.

Knows numbers; knows nothing of what was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Final, Self

import numpy as np

_RESAMPLES: Final = 4000
_CONFIDENCE: Final = 0.95


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of `count` samples, in the samples' unit, interpolated between neighbours."""

    count: int
    p50: float
    p95: float
    p99: float
    longest: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Self | None:
        """None where there are no samples."""
        if not samples:
            return None
        p50, p95, p99 = (float(value) for value in np.percentile(samples, (50, 95, 99)))
        return cls(len(samples), p50, p95, p99, max(samples))

    def as_json(self, *, digits: int = 3) -> dict[str, float]:
        return {name: round(value, digits) for name, value in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class Ratio:
    """Ratios of pairs that were measured side by side: their median, and what it exceeds with 95 % confidence."""

    num_pairs: int
    median: float
    lower_bound: float
    lowest: float

    @classmethod
    def of(cls, above: Sequence[float], below: Sequence[float], *, seed: int = 0) -> Self:
        """`above` over `below`, pair by pair; both are as long and not empty."""
        ratios = np.divide(above, below, dtype=np.float64)
        bound = bootstrap_lower_bound(ratios.tolist(), seed=seed)
        return cls(len(ratios), float(np.median(ratios)), bound, float(ratios.min()))

    def as_json(self) -> dict[str, float]:
        return {name: round(value, 4) for name, value in asdict(self).items()}


def bootstrap_lower_bound(
    samples: Sequence[float], *, confidence: float = _CONFIDENCE, seed: int = 0
) -> float:
    """One-sided lower bound of the samples' median, by the percentile bootstrap (Efron 1979)."""
    values = np.asarray(samples, dtype=np.float64)
    chosen = np.random.default_rng(seed).integers(len(values), size=(_RESAMPLES, len(values)))
    return float(np.quantile(np.median(values[chosen], axis=1), 1 - confidence))
