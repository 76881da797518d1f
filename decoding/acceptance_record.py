"""How drafts have fared lately: by exit layer and position over all rows, and row by row.

Knows counts that fade; knows no costs.

Shapes: L exit layers, K draft positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from decoding.confidence import COUNTED_TOGETHER, LONG_AGO, ConfidenceRecord, refused_alike
from decoding.step_costs import Counts, Floats

_FADING: Final = 0.995
"""What a count is worth after one more cycle of its kind: some two hundred cycles are remembered."""

_TRIED: Final = 8.0
"""First drafts after which an exit layer says something of others."""

_ROW_FADING: Final = 0.97
_ROW_PRIOR: Final = 16.0
"""A row's own drafts count fully once there are well more than these."""

_ADVANTAGES: Final = (0.6, 1.0, 1.15)
"""Rows are told apart no finer than this: rows that draft alike are computed together, which costs less."""

_PRIOR: Final = 4.0
_FIRST_PRIOR: Final = 8.0
"""What a guess counts against drafts that were seen; the first position should not be swayed by a few."""

_MEASURED_PRIOR: Final = 64.0
"""The same at the first position where acceptance was measured elsewhere, and most that differs is common to all
exit layers: other texts, other temperatures.
"""

_HOPED: Final = 6.0
"""With hope, so many drafts more were made and kept at each position than were seen."""

SUREST: Final = 0.98
"""No draft is surer than this."""

_LEAST_EXPECTED: Final = 0.001
"""Drafts of a row that are expected to be kept at least, of those that were reached: a ratio needs some."""


@dataclass(slots=True, eq=False)
class RowRecord:
    """How one row's drafts fared, against what all rows' records had expected of them."""

    reached: float = 0.0
    kept: float = 0.0
    expected: float = 0.0

    def record(self, expected: Sequence[float], *, drafted: int, kept: int) -> None:
        """Count a cycle; `expected[n]` of n drafts that are reached were expected to be kept."""
        reached = min(kept + 1, drafted)
        self.reached = _ROW_FADING * self.reached + reached
        self.kept = _ROW_FADING * self.kept + kept
        self.expected = _ROW_FADING * self.expected + expected[min(reached, len(expected) - 1)]

    @property
    def ratio(self) -> float:
        """Drafts kept to drafts expected to be, drawn towards 1 while little is known."""
        usual = max(self.expected / self.reached, _LEAST_EXPECTED) if self.reached else 1.0
        return (self.kept + _ROW_PRIOR * usual) / (self.expected + _ROW_PRIOR * usual)

    @property
    def advantage(self) -> float:
        """How much likelier than others' this row's drafts are kept, 1 if nothing is known."""
        seen = self.ratio
        return min(_ADVANTAGES, key=lambda advantage: abs(advantage - seen))


class AcceptanceRecord:
    """Per-position acceptance by exit layer.

    `first` says at the beginning what share of first drafts is kept, by exit layer. One alone is a guess: what was
    never tried is guessed from the nearest layer that was. Several were measured: others lie between them, and
    drafts are refused everywhere so many times as often as where they were tried. `confidence` says how sure
    drafts were, where choices tell.
    """

    def __init__(self, *, num_layers: int, max_draft_length: int, first: Mapping[int, float]) -> None:
        self._num_layers = num_layers
        self._first_L = _between(first, num_layers)
        self._is_measured = len(first) > 1
        self._first_prior = _MEASURED_PRIOR if self._is_measured else _FIRST_PRIOR
        self._reached_LK = np.zeros((num_layers, max(1, max_draft_length)))
        self._kept_LK = np.zeros_like(self._reached_LK)
        self.confidence = ConfidenceRecord(num_layers)
        self._pending: dict[int, list[tuple[int, int]]] = {}
        self._firsts_L: Floats | None = None
        self._curves: dict[int, Floats] = {}
        self._expected: dict[int, list[float]] = {}

    def record(self, exit_layer: int, fates: Sequence[tuple[int, int]]) -> None:
        """Count the drafted and kept tokens of rows that drafted in one cycle, now or with later ones."""
        pending = self._pending.setdefault(exit_layer, [])
        pending += fates
        if len(pending) >= COUNTED_TOGETHER:
            self.refresh()

    def refresh(self) -> None:
        """Count what was recorded."""
        self.confidence.refresh()
        for exit_layer, fates in self._pending.items():
            fading = _FADING ** len(fates)
            self._reached_LK[exit_layer] *= fading
            self._kept_LK[exit_layer] *= fading
            reached = [min(kept + 1, drafted) for drafted, kept in fates]
            self._reached_LK[exit_layer] += self._reaching(reached)
            self._kept_LK[exit_layer] += self._reaching([kept for _, kept in fates])
        if self._pending:
            self._pending.clear()
            self._forget()

    def _reaching(self, counts: list[int]) -> Floats:
        """How many of these counts reach each position, [K]."""
        num_positions = self._reached_LK.shape[1]
        exactly = np.bincount(counts, minlength=num_positions + 1)
        at_least: Floats = exactly[::-1].cumsum()[::-1][1 : num_positions + 1].astype(np.float64)
        return at_least

    def fade(self, *, but: int | None = None) -> None:
        """Believe what was counted less, of all exit layers but one: it was long ago."""
        is_old_L = np.arange(self._num_layers) != but
        self._reached_LK[is_old_L] *= LONG_AGO
        self._kept_LK[is_old_L] *= LONG_AGO
        self.confidence.fade(but=but)
        self._forget()

    def _forget(self) -> None:
        """What was worked out from counts that have changed."""
        self._firsts_L = None
        self._curves.clear()
        self._expected.clear()

    def is_tried(self, exit_layer: int) -> bool:
        """Whether what is expected of an exit layer was seen rather than guessed."""
        return self.weight(exit_layer) > _TRIED

    def is_known(self, exit_layer: int) -> bool:
        """Whether what is expected of an exit layer was seen, or measured elsewhere."""
        return self._is_measured or self.is_tried(exit_layer)

    def weight(self, exit_layer: int) -> float:
        """How many first drafts of this exit layer are remembered."""
        return float(self._reached_LK[exit_layer, 0])

    def curve(self, exit_layer: int) -> Floats:
        """Probability that the draft at each position is kept if all before it were, [K]."""
        if exit_layer not in self._curves:
            self._curves[exit_layer] = self._estimate(exit_layer)
        return self._curves[exit_layer]

    def curves(self, exit_layers: Sequence[int]) -> Floats:
        """The curves of several exit layers, [L, K]."""
        return np.stack([self.curve(layer) for layer in exit_layers])

    def hopes(self, exit_layers: Sequence[int]) -> Floats:
        """The curves as they might be where few drafts were seen, [L, K]; no layer's is above a deeper one's."""
        kept_LK, reached_LK = self._kept_LK + _HOPED, self._reached_LK + _HOPED
        if self._is_measured:
            kept_LK += self._first_prior * self._guess()[:, None]
            reached_LK += self._first_prior
        might_LK = kept_LK / reached_LK
        falling_LK: Floats = np.minimum.accumulate(might_LK[::-1], axis=0)[::-1]
        return falling_LK[list(exit_layers)]

    def expected(self, exit_layer: int) -> Sequence[float]:
        """How many of the first 0 … K drafts are kept, if all of them are reached."""
        if exit_layer not in self._expected:
            self._expected[exit_layer] = [0.0, *self.curve(exit_layer).cumsum().tolist()]
        return self._expected[exit_layer]

    def firsts(self) -> Floats:
        """Probability that a first draft is kept, of all exit layers, [L]."""
        if self._firsts_L is None:
            guess_L, reached_L = self._guess(), self._reached_LK[:, 0]
            seen_L = (self._kept_LK[:, 0] + self._first_prior * guess_L) / (reached_L + self._first_prior)
            self._firsts_L = np.minimum(seen_L, SUREST)
        return self._firsts_L

    def _estimate(self, exit_layer: int) -> Floats:
        # In Python's numbers: a handful of them, one after the other.
        reached_K, kept_K = self._reached_LK[exit_layer].tolist(), self._kept_LK[exit_layer].tolist()
        guess = float(self.firsts()[exit_layer])
        curve = [guess]
        # A position that few drafts reached is taken to be like the one before it.
        for reached, kept in zip(reached_K[1:], kept_K[1:], strict=True):
            guess = min((kept + _PRIOR * guess) / (reached + _PRIOR), SUREST)
            curve.append(guess)
        return np.array(curve)

    def _guess(self) -> Floats:
        """First-draft acceptance of each exit layer, from others, [L]."""
        reached_L, kept_L = self._reached_LK[:, 0], self._kept_LK[:, 0]
        if self._is_measured:
            measured_L: Floats = np.clip(refused_alike(self._first_L, reached_L, kept_L), 0.0, SUREST)
            return measured_L
        tried_N = np.flatnonzero(reached_L > _TRIED)
        if not len(tried_N):
            return self._first_L
        layers_L = np.arange(self._num_layers)
        distances_LN = np.abs(layers_L[:, None] - tried_N).astype(np.float64)
        distances_LN[distances_LN == 0] = np.inf
        nearest_L = tried_N[distances_LN.argmin(axis=1)]
        like_nearest_L = _like(nearest_L, kept_L[nearest_L] / reached_L[nearest_L], self._num_layers)
        guess_L: Floats = np.where(np.isfinite(distances_LN.min(axis=1)), like_nearest_L, self._first_L)
        return guess_L


def _between(first: Mapping[int, float], num_layers: int) -> Floats:
    """Acceptance at every exit layer: between the known ones, beyond them like the nearest, [L]."""
    known, layers_L = sorted(first), np.arange(num_layers)
    rates = [first[layer] for layer in known]
    nearest_L = np.clip(layers_L, known[0], known[-1])
    return _like(nearest_L, np.interp(nearest_L, known, rates), num_layers)


def _like(nearest_L: Counts, rates_L: Floats, num_layers: int) -> Floats:
    """Acceptance at every exit layer, as it is at another one, [L].

    Towards the last layer refusals fade like the root of what is left; towards the first, where a head sees
    least, acceptance falls like the root of the depth.
    """
    layers_L = np.arange(num_layers)
    shallow_L = rates_L * np.sqrt(layers_L / nearest_L)
    left_L = (num_layers - layers_L) / (num_layers - nearest_L)
    refused_L = (1 - rates_L) * np.sqrt(left_L)
    like_L: Floats = np.where(layers_L < nearest_L, shallow_L, np.minimum(1 - refused_L, SUREST))
    return like_L
