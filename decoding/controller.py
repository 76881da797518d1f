"""Chooses exit layer and draft lengths where a request leaves them open: what gives most tokens a second.

Knows expected costs and acceptance; knows no tokens. No output depends on what it chooses.

Shapes: C kinds of rows, K draft positions, M candidates.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_high
from typing import Final, NamedTuple, Protocol, Self

import numpy as np

from decoding.acceptance_record import AcceptanceRecord, RowRecord
from decoding.messages import Drafter
from decoding.step_costs import Counts, Floats, StepCosts

_KEPT_STEPS: Final = 8
"""A choice is used for so many steps; only the rows' own records still change its draft lengths."""

_SEARCH_STEPS: Final = 64
"""How often all exit layers are weighed; in between, the last and its neighbours."""

_PROBE_STEPS: Final = 256
"""How often something else than the best is tried: a neighbouring exit layer, a draft, or none."""

_SOON_STEPS: Final = 16
_PROBED_STEPS: Final = 4
_HOPELESS_STEPS: Final = 4096
_HOPELESS_DRAFTS: Final = 60
"""After so many drafts without an exit layer that pays for a row alone, trying again is rare."""

_WORTH_TRYING: Final = 0.9
"""A neighbouring exit layer that promises less than this share of the best rate is not tried."""

_MOST: Final = 0.98
"""No draft is surer than this."""

_MARGIN: Final = 1.01
"""Drafting must promise so much more than plain decoding: its costs are less certain."""


ExitLayers = tuple[int, ...]
"""Sorted; where it says which may be chosen, none means any."""


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

    @property
    def mean_draft_length(self) -> float:
        """Drafts a row makes on average, 0 without rows."""
        return sum(self.draft_lengths) / max(1, len(self.draft_lengths))


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What a step of rows that only decoded took, each with so many drafts made at one exit layer."""

    exit_layer: int
    draft_lengths: tuple[int, ...]
    draft_s: float
    verify_s: float


class DraftChooser(Protocol):
    """Who chooses what requests leave open."""

    def choose(self, rows: Sequence[DraftingRow], *, among: ExitLayers = ()) -> Choice:
        """Exit layer, one of these, and draft lengths of rows that draft together."""

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

    def choose(self, rows: Sequence[DraftingRow], *, among: ExitLayers = ()) -> Choice:
        """The one choice, as far as each row may draft; of several exit layers the deepest, which drafts best."""
        lengths = tuple(min(self._draft_length, row.limit) for row in rows)
        return Choice(among[-1] if among else self.exit_layer, lengths)

    def lookup_length(self, num_rows: int, limit: int) -> int:
        """The one draft length."""
        return min(self._draft_length, limit)

    def drafted(self, row: RowRecord, exit_layer: int, drafter: Drafter, *, drafted: int, kept: int) -> None:
        """Learn nothing."""

    def took(self, outcome: StepOutcome) -> None:
        """Learn nothing."""


class _Kind(NamedTuple):
    """Rows that are alike: how much likelier than others' their drafts are kept, and how many they may make."""

    advantage: float
    limit: int


@dataclass(frozen=True, slots=True)
class _Batch:
    """The kinds of row in a batch, and how many rows are of each: C kinds."""

    kinds: tuple[_Kind, ...]
    counts_C: Counts

    @classmethod
    def of(cls, kinds: Sequence[_Kind]) -> Self:
        """Rows by their kind; those that are alike draft alike, which also computes faster than odd lengths do."""
        counts = Counter(kinds)
        return cls(tuple(counts), np.array(list(counts.values()), dtype=np.int64))

    @property
    def num_rows(self) -> int:
        """Rows of all kinds."""
        return int(self.counts_C.sum())

    def kept_probabilities(self, curve_K: Floats) -> Floats:
        """Probability that a run of drafts is kept up to each position, [C, K]; 0 beyond what a row may draft."""
        limits_C = np.array([kind.limit for kind in self.kinds])
        advantages_C = np.array([kind.advantage for kind in self.kinds])
        longest = int(limits_C.max())
        each_CK = np.minimum(advantages_C[:, None] * curve_K[:longest], _MOST)
        may_draft_CK = np.arange(longest) < limits_C[:, None]
        kept_CK: Floats = np.where(may_draft_CK, each_CK.cumprod(axis=1), 0.0)
        return kept_CK


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

    For one exit layer the drafts worth making are those likeliest to be kept: the candidates are all drafts of all
    rows that are kept with at least some probability.
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
        self._standing: dict[ExitLayers, _Standing] = {}
        self._lookups = RowRecord()
        self._num_steps = 0
        self._probe_steps = _SOON_STEPS
        self._next_probe = _SOON_STEPS
        self._next_search = 0
        self._is_plains_turn = False
        self._num_drafts = 0
        self.exit_layer = first_exit_layer
        self.pays = True

    def choose(self, rows: Sequence[DraftingRow], *, among: ExitLayers = ()) -> Choice:
        """What promises most tokens a second; now and then something else, to learn whether it would."""
        self._num_steps += 1
        advantages = [row.record.advantage for row in rows]
        # Rows that run ahead of most others end early, and leave these to a smaller batch.
        usual = median_high(advantages)
        kinds = [
            _Kind(min(advantage, usual), min(row.limit, self._max_draft_length))
            for advantage, row in zip(advantages, rows, strict=True)
        ]
        standing = self._standing.get(among)
        if standing is None or standing.num_rows != len(rows) or standing.steps_left <= 0:
            standing = self._standing[among] = self._decide(_Batch.of(kinds), among)
        standing.steps_left -= 1
        if not among:
            self.exit_layer = standing.exit_layer
        curve = self._record.curve(standing.exit_layer).tolist()
        lengths = {kind: _length(kind, curve, standing.least) for kind in set(kinds)}
        return Choice(standing.exit_layer, tuple(lengths[kind] for kind in kinds))

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

    def _decide(self, batch: _Batch, among: ExitLayers) -> _Standing:
        layers = among or self._layers_to_weigh()
        candidates = {layer: self._best_at(layer, batch) for layer in layers}
        best = max(candidates.values(), key=lambda candidate: candidate.rate)
        plain = batch.num_rows / self._costs.plain_s(batch.num_rows)
        drafts = best.rate > _MARGIN * plain
        if not among and batch.num_rows == 1:
            self.pays = drafts or self._num_drafts < _HOPELESS_DRAFTS
        chosen, steps = best, _KEPT_STEPS
        if not drafts:
            chosen = _Candidate(best.exit_layer, np.inf, plain)
        if self._num_steps >= self._next_probe:
            self._plan_probe(drafts=drafts)
            chosen, steps = self._other(best, candidates, drafts=drafts), _PROBED_STEPS
        return _Standing(chosen.exit_layer, chosen.least, batch.num_rows, steps)

    def _layers_to_weigh(self) -> Sequence[int]:
        """Now and then all exit layers, else those beside the last: weighing takes time of the step."""
        if self._num_steps >= self._next_search:
            self._next_search = self._num_steps + _SEARCH_STEPS
            return self._exit_layers
        place = bisect_left(self._exit_layers, self.exit_layer)
        return self._exit_layers[max(0, place - 1) : place + 2]

    def _plan_probe(self, *, drafts: bool) -> None:
        """Soon after drafting was given up, then ever more seldom."""
        most = _PROBE_STEPS if self.pays else _HOPELESS_STEPS
        self._probe_steps = most if drafts else min(2 * self._probe_steps, most)
        self._next_probe = self._num_steps + self._probe_steps
        if drafts:
            self._probe_steps = _SOON_STEPS

    def _other(self, best: _Candidate, candidates: dict[int, _Candidate], *, drafts: bool) -> _Candidate:
        """Something else than what is chosen, worth learning about."""
        if not drafts:
            # Are they kept by now, and cost what they did? What was seen long ago says less of that.
            self._record.fade()
            return best if self.pays else _Candidate(best.exit_layer, 0.0, 0.0)
        layers = sorted(candidates)
        place = layers.index(best.exit_layer)
        beside = [
            candidates[layer] for layer in layers[max(0, place - 1) : place + 2] if layer != best.exit_layer
        ]
        hopeful = [other for other in beside if other.rate > _WORTH_TRYING * best.rate]
        least_known = min(hopeful, key=lambda other: self._record.weight(other.exit_layer), default=None)
        self._is_plains_turn = not self._is_plains_turn
        if least_known is None or self._is_plains_turn:
            return _Candidate(best.exit_layer, np.inf, 0.0)
        return least_known

    def _best_at(self, exit_layer: int, batch: _Batch) -> _Candidate:
        """The best least probability, among those of all drafts at this exit layer, of the drafts to make."""
        kept_CK = batch.kept_probabilities(self._record.curve(exit_layer))
        order_M = np.argsort(-kept_CK, axis=None, kind="stable")[: np.count_nonzero(kept_CK)]
        if not len(order_M):
            return _Candidate(exit_layer, np.inf, 0.0)
        longest = kept_CK.shape[1]
        probabilities_M = kept_CK.ravel()[order_M]
        rows_M = batch.counts_C[order_M // longest]
        is_at_MK = (order_M % longest)[:, None] == np.arange(longest)
        drafting_MK: Counts = (rows_M[:, None] * is_at_MK).cumsum(axis=0)
        num_tokens_M = batch.num_rows + rows_M.cumsum()
        seconds_M = self._costs.draft_s(exit_layer, drafting_MK).sum(axis=1)
        seconds_M += self._costs.verify_s(exit_layer, batch.num_rows, num_tokens_M)
        rates_M = (batch.num_rows + (rows_M * probabilities_M).cumsum()) / seconds_M
        best = int(rates_M.argmax())
        return _Candidate(exit_layer, float(probabilities_M[best]), float(rates_M[best]))


def _length(kind: _Kind, curve: Sequence[float], least: float) -> int:
    """How far a run is kept with at least this probability."""
    probability, length = 1.0, 0
    most = 1 if least == 0.0 else kind.limit
    for each in curve[:most]:
        probability *= min(kind.advantage * each, _MOST)
        if probability < least:
            break
        length += 1
    return length
