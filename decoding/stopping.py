"""What drafts that stop by themselves promise a batch: expected tokens over expected seconds.

Where rows draft until they are unsure, what is chosen is an exit layer and the bound at which they stop; or, what
costs least of all to verify, a length that all of them draft however sure they are.

Knows expected costs and how sure drafts are; knows neither tokens nor what was chosen before.

Shapes: L exit layers that are weighed, W kinds of row, T bounds, J levels of chance, G grades, K draft positions,
C candidates: the bounds, then the lengths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Self

import numpy as np

from decoding.acceptance_record import AcceptanceRecord
from decoding.confidence import Grades, Stopping
from decoding.step_costs import Counts, Floats, StepCosts
from decoding.weighing import Batch, Candidate, Weigher

_BOUNDS: Final = (0.35, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Chances at which rows may stop."""

_RATIO: Final = 0.93
_NUM_LEVELS: Final = 24
_LEVELS: Final = _RATIO ** np.arange(_NUM_LEVELS)
"""Chances that all drafts of a row are kept, as far as they are told apart: the last is below all bounds."""

_DISTANCES_JJ: Final = (np.arange(_NUM_LEVELS) - np.arange(_NUM_LEVELS)[:, None]) % (2 * _NUM_LEVELS)
"""How many levels lie between two, modulo twice as many as there are."""

_ALIKE: Final = 0.96
"""What bounds promise is worth so much: a row's drafts are sure or unsure together, more than walks know."""

_LONGEST_FIXED: Final = 6
"""Rows that draft more stop where they are unsure: a small error in one's chance is a large one in all of them."""

_PLAYED: Final = 3
"""Bounds are tried at so many exit layers, those that promise most with a length."""

_GONE: Final = 0.02
"""Where so small a share of rows would draft still, none does."""


@dataclass(frozen=True, slots=True)
class Walks:
    """Drafts a row is expected to make at each position, [W, T, K], and to keep, [W, T]: of W kinds of row."""

    made_WTK: Floats
    kept_WT: Floats

    @classmethod
    def of(cls, kinds: Sequence[Grades], bounds: Sequence[float], longest: int) -> Self:
        """As if the grades of a row's drafts had nothing to do with each other."""
        moves_WJJ = _moves(kinds)
        means_W1 = np.array([[grades.mean] for grades in kinds])
        goes_on_TJ = np.array(bounds)[:, None] <= _LEVELS
        rows_WTJ = np.zeros((len(kinds), len(bounds), _NUM_LEVELS))
        rows_WTJ[:, :, 0] = 1.0
        made_WTK, kept_WT = np.zeros((*rows_WTJ.shape[:2], longest)), np.zeros(rows_WTJ.shape[:2])
        for ahead in range(longest):
            made_WT = rows_WTJ.sum(axis=2)
            is_seldom_WT = made_WT < _GONE
            if is_seldom_WT.any():
                rows_WTJ[is_seldom_WT] = 0.0
                made_WT[is_seldom_WT] = 0.0
                if is_seldom_WT.all():
                    break
            made_WTK[:, :, ahead] = made_WT
            kept_WT += rows_WTJ @ _LEVELS * means_W1
            rows_WTJ = rows_WTJ @ moves_WJJ
            rows_WTJ *= goes_on_TJ
        return cls(made_WTK, kept_WT)


def _moves(kinds: Sequence[Grades]) -> Floats:
    """How rows move from level to level with one more draft, [W, J, J]; below the last level they are gone."""
    shares_WG = np.stack([grades.shares_G for grades in kinds])
    down_WG = np.log(np.stack([grades.chances_G for grades in kinds])) / math.log(_RATIO)
    whole_WG = down_WG.astype(np.int64)
    part_WG = down_WG - whole_WG
    farthest = 2 * _NUM_LEVELS
    size = len(kinds) * farthest
    firsts_W1 = farthest * np.arange(len(kinds))[:, None]
    by_distance_N = np.zeros(size)
    for steps_WG, weights_WG in ((whole_WG, shares_WG * (1 - part_WG)), (whole_WG + 1, shares_WG * part_WG)):
        places_WG = firsts_W1 + np.minimum(steps_WG, farthest - 1)
        by_distance_N += np.bincount(places_WG.ravel(), weights_WG.ravel(), minlength=size)
    # What would go up is taken from the far end, where nothing that counts is.
    by_distance_WD = by_distance_N.reshape(len(kinds), farthest)
    by_distance_WD[:, _NUM_LEVELS:] = 0.0
    moves_WJJ: Floats = by_distance_WD[:, _DISTANCES_JJ]
    return moves_WJJ


class StoppingWeigher(Weigher):
    """Rates exit layers and bounds by what is known now; every row may draft as far as any."""

    def __init__(self, costs: StepCosts, record: AcceptanceRecord) -> None:
        super().__init__(costs, record)
        self._known: dict[tuple[int, bool, int], tuple[tuple[int, float], tuple[Floats, Floats]]] = {}

    def best_at(self, exit_layers: Sequence[int], batch: Batch, *, hopes: bool = False) -> list[Candidate]:
        """For each exit layer the best length, or the best bound where lengths promise most; if drafts are kept as
        expected or, with `hopes`, might be.
        """
        lengths = range(1, min(batch.longest, _LONGEST_FIXED) + 1)
        fixed = self._of_length(exit_layers, batch, lengths, hopes=hopes)
        if hopes:
            return fixed
        promising = sorted(fixed, key=lambda each: -each.rate)[:_PLAYED]
        layers = [each.exit_layer for each in promising]
        walks = self._walks(layers, _kinds(batch), batch.longest)
        stopping = zip(layers, self._with_bounds(layers, batch, _BOUNDS, walks), strict=True)
        better = {layer: each for layer, each in stopping}
        return [max(each, better.get(each.exit_layer, each), key=_rate) for each in fixed]

    def rated(self, like: Candidate, batch: Batch) -> Candidate:
        """The same for another batch, or by what is known since."""
        if not like.drafts:
            return self.plain(like.exit_layer, batch)
        layers, longest = [like.exit_layer], min(batch.longest, max(like.lengths))
        if not like.least:
            return self._of_length(layers, batch, [longest])[0]
        grades = [self._grades(like.exit_layer, is_sampled) for is_sampled in _kinds(batch)]
        walks = Walks.of(grades, (like.least,), longest)
        return self._with_bounds(layers, batch, (like.least,), walks)[0]

    def stopping(self, candidate: Candidate) -> Stopping | None:
        """When rows stop that draft so; None where none does."""
        if not candidate.least:
            return None
        chances = [self._grades(candidate.exit_layer, is_sampled).chances_G for is_sampled in (False, True)]
        return Stopping(np.array(chances, dtype=np.float32), candidate.least)

    def _walks(self, exit_layers: Sequence[int], kinds: Sequence[bool], longest: int) -> Walks:
        """Those of each kind at each exit layer, worked out anew only where something was learned since."""
        versions_2L = self._record.confidence.versions_2L
        places = [(layer, is_sampled, longest) for layer in exit_layers for is_sampled in kinds]
        # What is expected of an exit layer may rest on what was seen at others.
        means = {is_sampled: self._means(is_sampled) for is_sampled in kinds}
        known = {
            (layer, is_sampled, longest): (
                int(versions_2L[int(is_sampled), layer]),
                round(float(means[is_sampled][layer]), 2),
            )
            for layer, is_sampled, _ in places
        }
        new = [place for place in places if self._known.get(place, (None, None))[0] != known[place]]
        if new:
            walks = Walks.of([self._grades(*place[:2]) for place in new], _BOUNDS, longest)
            for place, made_TK, kept_T in zip(new, walks.made_WTK, walks.kept_WT, strict=True):
                self._known[place] = known[place], (made_TK, kept_T)
        made, kept = zip(*(self._known[place][1] for place in places), strict=True)
        return Walks(np.array(made), np.array(kept))

    def _of_length(
        self, exit_layers: Sequence[int], batch: Batch, lengths: Sequence[int], *, hopes: bool = False
    ) -> list[Candidate]:
        """For each exit layer the best of these lengths."""
        firsts_L = self._record.firsts()[list(exit_layers)]
        confidence, positions_K = self._record.confidence, np.arange(max(lengths))
        is_made_CK = positions_K < np.array(lengths)[:, None]
        kept_LK = np.zeros((len(exit_layers), len(positions_K)))
        for is_sampled, num_rows in zip(_kinds(batch), _counts(batch), strict=True):
            means_L = self._means(is_sampled)
            rates_L = confidence.rates(is_sampled=is_sampled, means_L=means_L)[list(exit_layers)]
            if hopes:
                rates_L = 1 - (1 - rates_L) * self._luck(exit_layers, firsts_L)
            kept_LK += num_rows * rates_L[:, None] ** (1 + positions_K)
        made_LCK = np.broadcast_to(is_made_CK * sum(_counts(batch)), (len(exit_layers), *is_made_CK.shape))
        return self._best(exit_layers, batch, [0.0] * len(lengths), made_LCK, kept_LK @ is_made_CK.T)

    def _with_bounds(
        self, exit_layers: Sequence[int], batch: Batch, bounds: Sequence[float], walks: Walks
    ) -> list[Candidate]:
        """For each exit layer the best of these bounds. Walks are those of each kind of row, layer by layer."""
        counts_S = np.array(_counts(batch), dtype=np.float64)
        by_kind = (len(exit_layers), len(counts_S), len(bounds))
        made_LTK = np.einsum("s,lstk->ltk", counts_S, walks.made_WTK.reshape(*by_kind, -1))
        kept_LT = np.einsum("s,lst->lt", counts_S, walks.kept_WT.reshape(by_kind))
        found = self._best(exit_layers, batch, bounds, made_LTK, kept_LT)
        return [replace(each, rate=_ALIKE * each.rate) for each in found]

    def _best(
        self,
        exit_layers: Sequence[int],
        batch: Batch,
        least_C: Sequence[float],
        made_LCK: Floats,
        kept_LC: Floats,
    ) -> list[Candidate]:
        seconds_LC = self._seconds(np.array(exit_layers), batch, made_LCK)
        rates_LC = self._rates(batch.num_rows + kept_LC, seconds_LC, batch)
        bests_L = rates_LC.argmax(axis=1)
        layers_L = np.arange(len(exit_layers))
        made_LK = made_LCK[layers_L, bests_L]
        found = zip(
            *(exit_layers, bests_L.tolist(), rates_LC[layers_L, bests_L].tolist()),
            *((made_LK > 0).sum(axis=1).tolist(), (made_LK.sum(axis=1) / sum(_counts(batch))).tolist()),
            strict=True,
        )
        return [
            Candidate(layer, (longest,) * len(batch.advantages), rate, least_C[best], expected)
            for layer, best, rate, longest, expected in found
        ]

    def _seconds(self, exit_layers_L: Counts, batch: Batch, made_LTK: Floats) -> Floats:
        """Of steps that make so many drafts at each position, [L, T]."""
        # A step of less than one row is one that is taken so often.
        drafting_LTK = np.maximum(made_LTK, 1.0)
        steps_s_LTK = self._costs.draft_s(exit_layers_L[:, None, None], drafting_LTK)
        draft_s_LT = (steps_s_LTK * (made_LTK / drafting_LTK)).sum(axis=2)
        verify_s_LT = self._verify_s(exit_layers_L, batch, made_LTK)
        other_s = self._costs.start_s(batch.num_rows) + self._costs.host_s(batch.num_rows, drafts=True)
        seconds_LT: Floats = draft_s_LT + verify_s_LT + other_s
        return seconds_LT

    def _verify_s(self, exit_layers_L: Counts, batch: Batch, made_LTK: Floats) -> Floats:
        """Of passes over as many drafts as steps happen to make: few and many cost more than always as many.

        Of one row their number is as it comes; the more rows there are, the nearer it is to what is expected.
        """
        num_drafting = batch.num_rows - batch.num_others
        reached_LTK = made_LTK / num_drafting
        mean_LT1 = reached_LTK.sum(axis=2, keepdims=True)
        share_LTK = reached_LTK.copy()
        share_LTK[:, :, :-1] -= reached_LTK[:, :, 1:]
        lengths_K = np.arange(1, reached_LTK.shape[2] + 1)
        length_LTK = mean_LT1 + (lengths_K - mean_LT1) / math.sqrt(num_drafting)
        num_tokens_LTK = batch.num_rows + num_drafting * np.maximum(length_LTK, 0.0)
        each_s_LTK = self._costs.verify_s(exit_layers_L[:, None, None], batch.num_rows, num_tokens_LTK)
        verify_s_LT: Floats = (share_LTK * each_s_LTK).sum(axis=2)
        return verify_s_LT

    def _grades(self, exit_layer: int, is_sampled: bool) -> Grades:
        mean = float(self._means(is_sampled)[exit_layer])
        return self._record.confidence.grades(exit_layer, is_sampled=is_sampled, mean=mean)

    def _means(self, is_sampled: bool) -> Floats:
        """How likely drafts of such rows are kept at each exit layer, as far as others tell, [L]."""
        return self._record.confidence.means(self._record.firsts(), is_sampled=is_sampled)

    def _luck(self, exit_layers: Sequence[int], firsts_L: Floats) -> Floats:
        """How much less often drafts might be refused, for all that was seen of them, [L]."""
        luck_L: Floats = np.minimum((1 - self._record.hopes(exit_layers)[:, 0]) / (1 - firsts_L), 1.0)
        return luck_L


def _kinds(batch: Batch) -> list[bool]:
    """Whether rows are sampled, of each kind that there is."""
    return [is_sampled for is_sampled, num in ((False, batch.num_greedy), (True, batch.num_sampled)) if num]


def _counts(batch: Batch) -> list[int]:
    """Rows of each kind that there is."""
    return [num for num in (batch.num_greedy, batch.num_sampled) if num]


def _rate(candidate: Candidate) -> float:
    return candidate.rate
