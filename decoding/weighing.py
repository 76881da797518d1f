"""What exit layers and draft lengths promise a batch: expected tokens over expected seconds.

Knows expected costs and acceptance; knows neither tokens nor what was chosen before.

Shapes: C kinds of rows, K draft positions, M candidates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median_high
from typing import Self

import numpy as np

from decoding.acceptance_record import SUREST, AcceptanceRecord, RowRecord
from decoding.step_costs import Counts, Floats, StepCosts


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows by how much likelier than others' their drafts are kept, C kinds, and the most drafts any may make: one
    row and one draft at least.

    Rows that are alike draft alike, which also computes faster than odd lengths do. `num_others` rows are in the
    step that do not draft with these.
    """

    advantages: tuple[float, ...]
    counts_C: Counts
    longest: int
    num_others: int

    @classmethod
    def of(cls, advantages: Sequence[float], *, longest: int, num_others: int) -> Self:
        """The kinds of row in a batch."""
        counts = Counter(advantages)
        counts_C = np.array(list(counts.values()), dtype=np.int64)
        return cls(tuple(counts), counts_C, longest, num_others)

    @property
    def num_rows(self) -> int:
        """Rows of all kinds, and others."""
        return int(self.counts_C.sum()) + self.num_others

    def kept_probabilities(self, curve_K: Floats) -> Floats:
        """Probability that a run of drafts is kept up to each position, [C, K]."""
        each_CK = np.minimum(np.array(self.advantages)[:, None] * curve_K[: self.longest], SUREST)
        kept_CK: Floats = each_CK.cumprod(axis=1)
        return kept_CK


@dataclass(frozen=True, slots=True)
class Candidate:
    """Draft lengths for the kinds of a batch, and the tokens a second they promise."""

    exit_layer: int
    lengths: tuple[int, ...]
    rate: float

    @property
    def drafts(self) -> bool:
        """Whether any row drafts."""
        return any(self.lengths)


class Weigher:
    """Rates candidates by what is known now.

    For one exit layer the drafts worth making are those likeliest to be kept: the candidates are all drafts of all
    rows that are kept with at least some probability.
    """

    def __init__(self, costs: StepCosts, record: AcceptanceRecord) -> None:
        self._costs = costs
        self._record = record

    def best_at(self, exit_layer: int, batch: Batch) -> Candidate:
        """The best of those that make all drafts at this exit layer which are kept likely enough."""
        kept_CK = batch.kept_probabilities(self._record.curve(exit_layer))
        order_M = np.argsort(-kept_CK, axis=None, kind="stable")
        kinds_M, positions_M = np.divmod(order_M, kept_CK.shape[1])
        rows_M = batch.counts_C[kinds_M]
        is_at_MK = positions_M[:, None] == np.arange(kept_CK.shape[1])
        drafting_MK: Counts = (rows_M[:, None] * is_at_MK).cumsum(axis=0)
        num_tokens_M = batch.num_rows + rows_M.cumsum()
        expected_M = batch.num_rows + (rows_M * kept_CK.ravel()[order_M]).cumsum()
        rates_M = expected_M / self._seconds(exit_layer, batch.num_rows, drafting_MK, num_tokens_M)
        best = int(rates_M.argmax())
        lengths = np.bincount(kinds_M[: best + 1], minlength=len(batch.advantages)).tolist()
        return Candidate(exit_layer, tuple(lengths), float(rates_M[best]))

    def rated(self, candidate: Candidate, batch: Batch) -> Candidate:
        """The same with the rate it promises this batch."""
        kept_CK = batch.kept_probabilities(self._record.curve(candidate.exit_layer))
        is_made_CK = np.arange(batch.longest) < np.array(candidate.lengths)[:, None]
        made_CK = is_made_CK * batch.counts_C[:, None]
        num_tokens_M = np.array([batch.num_rows + made_CK.sum()])
        seconds_M = self._seconds(
            candidate.exit_layer, batch.num_rows, made_CK.sum(axis=0)[None], num_tokens_M
        )
        expected = batch.num_rows + float((made_CK * kept_CK).sum())
        return replace(candidate, rate=expected / float(seconds_M[0]))

    def _seconds(self, exit_layer: int, num_rows: int, drafting_MK: Counts, num_tokens_M: Counts) -> Floats:
        """Seconds of steps with so many rows drafting at each position and so many tokens to verify."""
        seconds_M: Floats = self._costs.draft_s(exit_layer, drafting_MK).sum(axis=1)
        return (
            seconds_M
            + self._costs.verify_s(exit_layer, num_rows, num_tokens_M)
            + self._costs.host_s(num_rows)
        )


def advantages_of(records: Iterable[RowRecord]) -> list[tuple[RowRecord, float]]:
    """The advantage of each row. Rows ahead of most others end early and leave these to a smaller batch: they gain
    nothing by drafting more.
    """
    known = [(record, record.advantage) for record in records]
    usual = median_high(advantage for _, advantage in known)
    return [(record, min(advantage, usual)) for record, advantage in known]
