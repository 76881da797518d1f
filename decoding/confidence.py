"""How sure drafts are: the margin by which each was chosen, and how often drafts of such a margin were kept.

The margin of a draft is its score above the next best one's, noise included; it comes with the choice for nothing.
Margins are told apart by grades. A row may stop drafting behind a draft with which the chance that all of its
drafts are kept falls below a bound (the draft itself is verified: it may be right).

Knows counts that fade; knows no costs, no tokens, no tensors.

Shapes: G grades, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from decoding.step_costs import Floats

EDGES: Final = (0.1, 0.2, 0.35, 0.5, 0.7, 0.9, 1.2, 1.5, 1.9, 2.4, 3.0, 3.7, 4.5, 5.5, 7.0)
"""A margin's grade is how many of these it reaches."""

NUM_GRADES: Final = len(EDGES) + 1

_SUREST: Final = 0.99
"""No draft is surer than this."""

_FADING: Final = 0.998
"""What a count is worth after one more cycle of its kind: grades share what cycles say, so more are remembered."""

LONG_AGO: Final = 0.7
"""What a count is worth that is believed less."""

COUNTED_TOGETHER: Final = 256
"""Rows' cycles that are counted at once: counting takes time of the step."""

_PRIOR: Final = 6.0
"""What a guess counts in each grade against drafts that were seen."""

_RATE_PRIOR: Final = 16.0
"""The same of drafts of all grades together."""

_PRIOR_REFUSALS: Final = 4.0
"""So many refusals as foretold are thought to have been seen before any was."""

_TRIED: Final = 64.0
"""Drafts after which an exit layer tells how margins of others are to be read."""

_SLOWNESS: Final = 1.25
_TIED: Final = 0.37
"""Before anything is seen: the chance of a draft that was chosen by no margin, and how fast it rises with one."""

_MIDDLES: Final = np.array([0.05, *(0.5 * (low + high) for low, high in pairwise(EDGES)), 9.0])
_FIRST_CHANCES: Final = 1 - (1 - _TIED) * np.exp(-_MIDDLES / _SLOWNESS)
_FIRST_SHARES: Final = np.full(NUM_GRADES, 1 / NUM_GRADES)


@dataclass(frozen=True, slots=True)
class Stopping:
    """When rows stop drafting by themselves: behind a draft with which the chance that all are kept is below
    `least`. `chances_2G` are float32, of greedy rows and of sampled ones.
    """

    chances_2G: NDArray[np.float32]
    least: float


@dataclass(frozen=True, slots=True)
class Grades:
    """How often drafts are of each grade, and how likely such are kept if all before them were, both [G]."""

    shares_G: Floats
    chances_G: Floats

    @property
    def mean(self) -> float:
        """How likely a draft is kept of whose margin nothing is known."""
        return float(self.shares_G @ self.chances_G)

    def with_refusals(self, factor: float) -> Grades:
        """The same if drafts were refused so many times as often."""
        refused_G = np.minimum((1 - self.chances_G) * factor, _SUREST)
        return Grades(self.shares_G, np.minimum(1 - refused_G, _SUREST))


class ConfidenceRecord:
    """Grades of drafts by early exit and their fates, by exit layer, of greedy rows and of sampled ones apart.

    `versions_2L` grow where something was learned, or forgotten.
    """

    def __init__(self, num_layers: int) -> None:
        self._reached_2LG = np.zeros((2, num_layers, NUM_GRADES))
        self._kept_2LG = np.zeros_like(self._reached_2LG)
        self._pending: dict[tuple[int, int], list[tuple[Sequence[int], int]]] = {}
        self.versions_2L = np.zeros((2, num_layers), dtype=np.int64)

    def record(self, exit_layer: int, grades: Sequence[int], *, kept: int, is_sampled: bool) -> None:
        """Count one row's cycle, now or with later ones: of drafts of these grades the first `kept` stood."""
        pending = self._pending.setdefault((int(is_sampled), exit_layer), [])
        pending.append((grades, kept))
        if len(pending) >= COUNTED_TOGETHER:
            self.refresh()

    def refresh(self) -> None:
        """Count what was recorded."""
        for place, cycles in self._pending.items():
            fading = _FADING ** len(cycles)
            self.versions_2L[place] += 1
            kept = [grade for grades, count in cycles for grade in grades[:count]]
            # A draft behind one that was refused says nothing.
            reached = [grade for grades, count in cycles for grade in grades[: count + 1]]
            for counts_2LG, seen in ((self._reached_2LG, reached), (self._kept_2LG, kept)):
                counts_2LG[place] *= fading
                counts_2LG[place] += np.bincount(np.array(seen, dtype=np.int64), minlength=NUM_GRADES)
        self._pending.clear()

    def means(self, both_L: Floats, *, is_sampled: bool) -> Floats:
        """How likely drafts of one kind of row are kept at each exit layer, where those of both kinds are with
        these probabilities: refused everywhere so many times as often as where they were seen, [L].
        """
        reached_L, kept_L = (
            each[int(is_sampled)].sum(axis=1) for each in (self._reached_2LG, self._kept_2LG)
        )
        means_L: Floats = np.clip(refused_alike(both_L, reached_L, kept_L), 0.0, _SUREST)
        return means_L

    def rates(self, *, is_sampled: bool, means_L: Floats) -> Floats:
        """How likely drafts are kept at each exit layer whatever their margins; where few were seen, as `means_L`
        says, [L].
        """
        reached_L, kept_L = (
            each[int(is_sampled)].sum(axis=1) for each in (self._reached_2LG, self._kept_2LG)
        )
        rates_L: Floats = np.minimum((kept_L + _RATE_PRIOR * means_L) / (reached_L + _RATE_PRIOR), _SUREST)
        return rates_L

    def fade(self, *, but: int | None = None) -> None:
        """Believe what was counted less, of all exit layers but one: it was long ago."""
        is_old_L = np.arange(self._reached_2LG.shape[1]) != but
        self._reached_2LG[:, is_old_L] *= LONG_AGO
        self._kept_2LG[:, is_old_L] *= LONG_AGO
        self.versions_2L[:, is_old_L] += 1

    def grades(self, exit_layer: int, *, is_sampled: bool, mean: float) -> Grades:
        """What is expected of drafts there; where few were seen, they are kept with probability `mean`, as margins
        elsewhere tell them apart.
        """
        reached_LG, kept_LG = self._reached_2LG[int(is_sampled)], self._kept_2LG[int(is_sampled)]
        guess = self._guess(reached_LG, kept_LG, exit_layer)
        guess = guess.with_refusals((1 - mean) / max(1 - guess.mean, 1 - _SUREST))
        reached_G = reached_LG[exit_layer]
        seen = _joined(reached_G, kept_LG[exit_layer], guess)
        chances_G = _rising(seen.chances_G.tolist(), (reached_G + _PRIOR).tolist())
        return Grades(seen.shares_G, np.minimum(chances_G, _SUREST))

    @staticmethod
    def _guess(reached_LG: Floats, kept_LG: Floats, exit_layer: int) -> Grades:
        """What the nearest other exit layer that was tried says of margins."""
        first = Grades(_FIRST_SHARES, _FIRST_CHANCES)
        tried = np.flatnonzero(reached_LG.sum(axis=1) > _TRIED)
        tried = tried[tried != exit_layer]
        if not len(tried):
            return first
        nearest = int(tried[np.abs(tried - exit_layer).argmin()])
        return _joined(reached_LG[nearest], kept_LG[nearest], first)


def refused_alike(foretold_L: Floats, reached_L: Floats, kept_L: Floats) -> Floats:
    """Probabilities with which drafts are kept at each exit layer if they are refused everywhere so many times as
    often as was foretold, as where they were seen; below 0 where that is too often, [L].
    """
    refused, foretold = float((reached_L - kept_L).sum()), float(reached_L @ (1 - foretold_L))
    factor = (refused + _PRIOR_REFUSALS) / (foretold + _PRIOR_REFUSALS)
    return 1 - (1 - foretold_L) * factor


def _rising(chances: Sequence[float], weights: Sequence[float]) -> Floats:
    """The chances nearest to these that never fall, where neighbours that would fall are taken together."""
    pooled: list[tuple[float, float, int]] = []
    for single in zip(chances, weights, (1,) * len(chances), strict=True):
        pool = single
        while pooled and pooled[-1][0] > pool[0]:
            before = pooled.pop()
            weight = before[1] + pool[1]
            pool = (before[0] * before[1] + pool[0] * pool[1]) / weight, weight, before[2] + pool[2]
        pooled.append(pool)
    return np.repeat([chance for chance, _, _ in pooled], [size for _, _, size in pooled])


def _joined(reached_G: Floats, kept_G: Floats, guess: Grades) -> Grades:
    """What was seen, beside a guess that counts like a few drafts of each grade."""
    guessed_G = _PRIOR * NUM_GRADES * guess.shares_G
    shares_G = (reached_G + guessed_G) / (reached_G.sum() + guessed_G.sum())
    return Grades(shares_G, (kept_G + _PRIOR * guess.chances_G) / (reached_G + _PRIOR))
