"""What exit layers and draft lengths promise a batch: expected tokens over expected seconds.

Knows expected costs and acceptance; knows neither tokens nor what was chosen before.

Shapes: L exit layers that are weighed, C kinds of rows, K draft positions, M candidates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median_high
from typing import Final, Self

import numpy as np

from decoding.acceptance_record import SUREST, AcceptanceRecord, RowRecord
from decoding.confidence import Stopping
from decoding.step_costs import Counts, Floats, StepCosts

MARGIN: Final = 1.04
"""Drafting must promise so much more than plain decoding: the best of many guesses promises too much."""

_LONGEST_STEP: Final = 4.0
"""Nothing is promised by steps that take more than so many times what one without drafts does: streams would come
in bursts, and newcomers wait.
"""


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows by how much likelier than others' their drafts are kept, C kinds, and the most drafts any may make: one
    row and one draft at least.

    Rows that are alike draft alike, which also computes faster than odd lengths do. `num_others` rows are in the
    step that do not draft with these. `num_sampled` of those that do have a temperature.
    """

    advantages: tuple[float, ...]
    counts_C: Counts
    longest: int
    num_others: int
    num_sampled: int = 0

    @classmethod
    def of(cls, advantages: Sequence[float], *, longest: int, num_others: int, num_sampled: int = 0) -> Self:
        """The kinds of row in a batch, the likeliest first."""
        counts = Counter(advantages)
        kinds = sorted(counts, reverse=True)
        counts_C = np.array([counts[advantage] for advantage in kinds], dtype=np.int64)
        return cls(tuple(kinds), counts_C, longest, num_others, num_sampled)

    @property
    def num_rows(self) -> int:
        """Rows of all kinds, and others."""
        return int(self.counts_C.sum()) + self.num_others

    @property
    def num_greedy(self) -> int:
        """Rows at temperature 0 that draft."""
        return int(self.counts_C.sum()) - self.num_sampled

    def kept_probabilities(self, curves_LK: Floats) -> Floats:
        """Probability that a run of drafts is kept up to each position, [L, C, K]."""
        curves_L1K = curves_LK[:, None, : self.longest]
        kept_LCK: Floats = np.minimum(np.array(self.advantages)[:, None] * curves_L1K, SUREST)
        return kept_LCK.cumprod(axis=2)


@dataclass(frozen=True, slots=True)
class Candidate:
    """Draft lengths for the kinds of a batch, and the tokens a second they promise.

    Rows that stop drafting by themselves do so where the chance that all drafts are kept falls below `least`, and
    make `expected_length` drafts on average.
    """

    exit_layer: int
    lengths: tuple[int, ...]
    rate: float
    least: float = 0.0
    expected_length: float | None = None

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

    def best_at(self, exit_layers: Sequence[int], batch: Batch, *, hopes: bool = False) -> list[Candidate]:
        """For each exit layer the best of those that make all drafts which are kept likely enough. With `hopes`
        they are as likely as they might be for all that was seen.
        """
        curves_LK = self._record.hopes(exit_layers) if hopes else self._record.curves(exit_layers)
        kept_LCK = batch.kept_probabilities(curves_LK)
        kept_LM = kept_LCK.reshape(len(exit_layers), -1)
        order_LM = np.argsort(-kept_LM, axis=1, kind="stable")
        kinds_LM = order_LM // kept_LCK.shape[2]
        rows_LM = batch.counts_C[kinds_LM]
        # The kinds that draft at a position at all are the likeliest ones: each adds to what those before it cost.
        layers_L1 = np.array(exit_layers)[:, None]
        added_s_LC = np.diff(self._costs.draft_s(layers_L1, batch.counts_C.cumsum()), axis=1, prepend=0.0)
        draft_s_LM = np.take_along_axis(added_s_LC, kinds_LM, axis=1).cumsum(axis=1)
        num_tokens_LM = batch.num_rows + rows_LM.cumsum(axis=1)
        in_order_LM = np.take_along_axis(kept_LM, order_LM, axis=1)
        expected_LM = batch.num_rows + (rows_LM * in_order_LM).cumsum(axis=1)
        start_s = self._costs.start_s(batch.num_rows)
        other_s_LM = self._other_s(layers_L1, batch.num_rows, num_tokens_LM)
        rates_LM = self._rates(expected_LM, start_s + draft_s_LM + other_s_LM, batch)
        num_kinds = len(batch.advantages)
        return [
            Candidate(
                layer,
                tuple(np.bincount(kinds_M[: best + 1], minlength=num_kinds).tolist()),
                float(rates_M[best]),
            )
            for layer, kinds_M, rates_M, best in zip(
                exit_layers, kinds_LM, rates_LM, rates_LM.argmax(axis=1).tolist(), strict=True
            )
        ]

    def plain(self, exit_layer: int, batch: Batch) -> Candidate:
        """No drafts."""
        return Candidate(exit_layer, (0,) * len(batch.advantages), batch.num_rows / self._plain_s(batch))

    def rated(self, like: Candidate, batch: Batch) -> Candidate:
        """These draft lengths at this exit layer, and the rate they promise this batch by what is known now."""
        exit_layer, lengths = like.exit_layer, like.lengths
        (kept_CK,) = batch.kept_probabilities(self._record.curves([exit_layer]))
        is_made_CK = np.arange(batch.longest) < np.array(lengths)[:, None]
        made_CK = is_made_CK * batch.counts_C[:, None]
        if not like.drafts:
            return self.plain(exit_layer, batch)
        drafting_K = made_CK.sum(axis=0)
        seconds = (
            self._costs.start_s(batch.num_rows)
            + self._costs.draft_s(exit_layer, drafting_K).sum()
            + self._other_s(exit_layer, batch.num_rows, np.array(batch.num_rows + drafting_K.sum()))
        )
        expected = batch.num_rows + (made_CK * kept_CK).sum()
        return Candidate(exit_layer, lengths, float(self._rates(expected, seconds, batch)))

    def stopping(self, candidate: Candidate) -> Stopping | None:
        """When rows stop that draft so; None where they draft as far as they are told."""
        return None

    def _rates(self, num_tokens: Floats, seconds: Floats, batch: Batch) -> Floats:
        """Tokens a second; nothing where steps would take too long."""
        most_s = _LONGEST_STEP * self._plain_s(batch)
        rates: Floats = np.where(seconds <= most_s, num_tokens / seconds, 0.0)
        return rates

    def _plain_s(self, batch: Batch) -> float:
        return self._costs.plain_s(batch.num_rows) + self._costs.host_s(batch.num_rows, drafts=False)

    def _other_s(self, exit_layers: Counts | int, num_rows: int, num_tokens: Counts) -> Floats:
        """Seconds of steps with drafts beside drafting, with so many tokens to verify."""
        host_s = self._costs.host_s(num_rows, drafts=True)
        return self._costs.verify_s(exit_layers, num_rows, num_tokens) + host_s


def advantages_of(records: Iterable[RowRecord]) -> list[tuple[RowRecord, float]]:
    """The advantage of each row. Rows ahead of most others end early and leave these to a smaller batch: they gain
    nothing by drafting more.
    """
    known = [(record, record.advantage) for record in records]
    usual = median_high(advantage for _, advantage in known)
    return [(record, min(advantage, usual)) for record, advantage in known]
