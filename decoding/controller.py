"""Chooses exit layer and draft lengths where a request leaves them open: what gives most tokens a second.

Knows expected costs and acceptance; knows no tokens. No output depends on what it chooses.

Shapes: B rows, K draft positions, M candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from decoding.acceptance_record import AcceptanceRecord, RowRecord
from decoding.messages import Drafter
from decoding.step_costs import Counts, Floats, StepCosts

_KEPT_STEPS: Final = 8
"""A choice is used for so many steps; only the rows' own records still change its draft lengths."""

_PROBE_STEPS: Final = 256
"""How often something else than the best is tried: a neighbouring exit layer, a draft, or none."""

_SOON_STEPS: Final = 16
_PROBED_STEPS: Final = 4
_HOPELESS_STEPS: Final = 4096
_HOPELESS_DRAFTS: Final = 60
"""After so many drafts without an exit layer that pays for a row alone, trying again is rare."""

_WORTH_TRYING: Final = 0.9
"""A neighbouring exit layer that promises less than this share of the best rate is not tried."""

_MARGIN: Final = 1.01
"""Drafting must promise so much more than plain decoding: its costs are less certain."""


@dataclass(frozen=True, slots=True)
class DraftingRow:
    """A row that may draft up to `limit` ≥ 1 tokens, and how its drafts fared."""

    limit: int
    record: RowRecord


@dataclass(frozen=True, slots=True)
class Choice:
    """One exit layer for all rows, and a draft length for each, 0 or more."""

    exit_layer: int
    draft_lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What a step of rows that only decoded took, each with so many drafts made at one exit layer."""

    exit_layer: int
    draft_lengths: tuple[int, ...]
    draft_s: float
    verify_s: float


class DraftChooser(Protocol):
    """Who chooses what requests leave open."""

    def choose(self, rows: Sequence[DraftingRow], *, exit_layer: int | None = None) -> Choice:
        """Exit layer and draft lengths of rows that draft together, at `exit_layer` if that is asked for."""

    def lookup_length(self, num_rows: int, limit: int) -> int:
        """How many looked-up drafts to verify in a step of so many rows."""

    def drafted(self, row: RowRecord, exit_layer: int, drafter: Drafter, *, drafted: int, kept: int) -> None:
        """Learn how a row's drafts fared."""

    def took(self, outcome: StepOutcome) -> None:
        """Learn what a step took."""

    @property
    def exit_layer(self) -> int:
        """The exit layer chosen last."""

    @property
    def pays(self) -> bool:
        """Whether any drafting is worth its cost on this checkpoint, as far as is known."""


class FixedChoice:
    """Always the same exit layer and draft length."""

    pays = True

    def __init__(self, *, exit_layer: int, draft_length: int) -> None:
        self.exit_layer = exit_layer
        self._draft_length = draft_length

    def choose(self, rows: Sequence[DraftingRow], *, exit_layer: int | None = None) -> Choice:
        """The one choice, as far as each row may draft."""
        lengths = tuple(min(self._draft_length, row.limit) for row in rows)
        return Choice(self.exit_layer if exit_layer is None else exit_layer, lengths)

    def lookup_length(self, num_rows: int, limit: int) -> int:
        """The one draft length."""
        return min(self._draft_length, limit)

    def drafted(self, row: RowRecord, exit_layer: int, drafter: Drafter, *, drafted: int, kept: int) -> None:
        """Learn nothing."""

    def took(self, outcome: StepOutcome) -> None:
        """Learn nothing."""


@dataclass(slots=True)
class _Standing:
    """A choice in use: drafts are made where all of a run are kept with at least this probability."""

    exit_layer: int
    least: float
    num_rows: int
    steps_left: int


@dataclass(frozen=True, slots=True)
class _Candidate:
    exit_layer: int
    least: float
    rate: float


class Controller:
    """Maximises expected tokens over expected seconds, from costs and acceptance that it keeps current.

    For one exit layer the drafts worth making are those likeliest to be kept: all possible drafts of all rows are
    put in the order of that probability, and every prefix of the order is a candidate.
    """

    def __init__(
        self,
        costs: StepCosts,
        record: AcceptanceRecord,
        *,
        exit_layers: Sequence[int],
        first_exit_layer: int,
        max_draft_length: int,
    ) -> None:
        self._costs = costs
        self._record = record
        self._exit_layers = tuple(exit_layers)
        self._max_draft_length = max_draft_length
        self._standing: dict[int | None, _Standing] = {}
        self._lookups = RowRecord()
        self._num_steps = 0
        self._probe_steps = _SOON_STEPS
        self._next_probe = _SOON_STEPS
        self._is_plains_turn = False
        self._num_drafts = 0
        self.exit_layer = first_exit_layer
        self.pays = True

    def choose(self, rows: Sequence[DraftingRow], *, exit_layer: int | None = None) -> Choice:
        """What promises most tokens a second; now and then something else, to learn whether it would."""
        self._num_steps += 1
        standing = self._standing.get(exit_layer)
        if standing is None or standing.num_rows != len(rows) or standing.steps_left <= 0:
            standing = self._standing[exit_layer] = self._decide(rows, exit_layer)
        standing.steps_left -= 1
        if exit_layer is None:
            self.exit_layer = standing.exit_layer
        curve_K = self._record.curve(standing.exit_layer)
        lengths = tuple(self._length(row, curve_K, standing.least) for row in rows)
        return Choice(standing.exit_layer, lengths)

    def lookup_length(self, num_rows: int, limit: int) -> int:
        """Drafts that were looked up cost no layers before they are verified."""
        rate = min(max(0.5 * self._lookups.advantage, 0.05), 0.98)
        lengths = np.arange(min(limit, self._max_draft_length) + 1)
        expected = np.cumsum(np.power(rate, lengths))
        seconds = self._costs.verify_s(1, num_rows, num_rows * (1 + lengths))
        return int((expected / seconds).argmax())

    def drafted(self, row: RowRecord, exit_layer: int, drafter: Drafter, *, drafted: int, kept: int) -> None:
        """Count a cycle for its row and for all."""
        if drafter is Drafter.EARLY_EXIT:
            row.record(self._record.curve(exit_layer), drafted=drafted, kept=kept)
            self._record.record(exit_layer, drafted=drafted, kept=kept)
            self._num_drafts += drafted
        elif drafter is Drafter.LOOKUP:
            self._lookups.record(np.full(drafted, 0.5), drafted=drafted, kept=kept)

    def took(self, outcome: StepOutcome) -> None:
        """Keep the costs current."""
        self._costs.observe(
            outcome.exit_layer, outcome.draft_lengths, draft_s=outcome.draft_s, verify_s=outcome.verify_s
        )

    def _decide(self, rows: Sequence[DraftingRow], asked: int | None) -> _Standing:
        layers = self._exit_layers if asked is None else (asked,)
        candidates = {layer: self._best_at(layer, rows) for layer in layers}
        best = max(candidates.values(), key=lambda candidate: candidate.rate)
        plain = len(rows) / self._costs.plain_s(len(rows))
        drafts = best.rate > _MARGIN * plain
        if asked is None and len(rows) == 1:
            self.pays = drafts or self._num_drafts < _HOPELESS_DRAFTS
        chosen, steps = best, _KEPT_STEPS
        if not drafts:
            chosen = _Candidate(best.exit_layer, np.inf, plain)
        if self._num_steps >= self._next_probe:
            self._plan_probe(drafts=drafts)
            chosen, steps = self._other(chosen, candidates, drafts=drafts), _PROBED_STEPS
        return _Standing(chosen.exit_layer, chosen.least, len(rows), steps)

    def _plan_probe(self, *, drafts: bool) -> None:
        """Soon after drafting was given up, then ever more seldom."""
        most = _PROBE_STEPS if self.pays else _HOPELESS_STEPS
        self._probe_steps = most if drafts else min(2 * self._probe_steps, most)
        self._next_probe = self._num_steps + self._probe_steps
        if drafts:
            self._probe_steps = _SOON_STEPS

    def _other(self, chosen: _Candidate, candidates: dict[int, _Candidate], *, drafts: bool) -> _Candidate:
        """Something else than the best, worth learning about."""
        if not drafts:
            # One draft for each row says whether they would be kept by now; what was once seen tells less of that.
            self._record.fade()
            return _Candidate(chosen.exit_layer, 0.0, 0.0)
        layers = sorted(candidates)
        place = layers.index(chosen.exit_layer)
        beside = [
            candidates[layer] for layer in layers[max(0, place - 1) : place + 2] if layer != chosen.exit_layer
        ]
        hopeful = [other for other in beside if other.rate > _WORTH_TRYING * chosen.rate]
        least_known = min(hopeful, key=lambda other: self._record.weight(other.exit_layer), default=None)
        self._is_plains_turn = not self._is_plains_turn
        if least_known is None or self._is_plains_turn:
            return _Candidate(chosen.exit_layer, np.inf, 0.0)
        return least_known

    def _best_at(self, exit_layer: int, rows: Sequence[DraftingRow]) -> _Candidate:
        """The best prefix of all drafts at this exit layer, in the order of the probability that they are kept."""
        kept_BK = self._kept_probabilities(exit_layer, rows)
        order_M = np.argsort(-kept_BK, axis=None, kind="stable")
        probabilities_M = kept_BK.ravel()[order_M]
        order_M = order_M[probabilities_M > 0]
        probabilities_M = probabilities_M[probabilities_M > 0]
        if not len(order_M):
            return _Candidate(exit_layer, np.inf, 0.0)
        positions_M = order_M % kept_BK.shape[1]
        is_at_MK = positions_M[:, None] == np.arange(kept_BK.shape[1])
        drafting_MK: Counts = is_at_MK.astype(np.int64).cumsum(axis=0)
        num_M = np.arange(1, len(order_M) + 1)
        seconds_M = self._costs.draft_s(exit_layer, drafting_MK).sum(axis=1) + self._costs.verify_s(
            exit_layer, len(rows), len(rows) + num_M
        )
        rates_M = (len(rows) + np.cumsum(probabilities_M)) / seconds_M
        best = int(rates_M.argmax())
        return _Candidate(exit_layer, float(probabilities_M[best]), float(rates_M[best]))

    def _kept_probabilities(self, exit_layer: int, rows: Sequence[DraftingRow]) -> Floats:
        """Probability that each row's run of drafts is kept up to each position; 0 beyond what it may draft."""
        longest = min(max(row.limit for row in rows), self._max_draft_length)
        curve_K = self._record.curve(exit_layer)[:longest]
        advantages_B = np.array([row.record.advantage for row in rows])
        each_BK = np.minimum(advantages_B[:, None] * curve_K, 0.98)
        limits_B = np.array([row.limit for row in rows])
        may_draft_BK = np.arange(longest) < limits_B[:, None]
        kept_BK: Floats = np.where(may_draft_BK, np.cumprod(each_BK, axis=1), 0.0)
        return kept_BK

    def _length(self, row: DraftingRow, curve_K: Floats, least: float) -> int:
        """How far a row's run is kept with at least the standing choice's probability."""
        advantage, probability, length = row.record.advantage, 1.0, 0
        most = 1 if least == 0.0 else min(row.limit, self._max_draft_length)
        for each in curve_K[:most].tolist():
            probability *= min(advantage * each, 0.98)
            if probability < least:
                break
            length += 1
        return length
