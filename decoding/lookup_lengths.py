"""How many looked-up drafts are worth verifying: as those that were found alike have fared.

Knows costs and what became of drafts; knows no tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from decoding.acceptance_record import SUREST, RowRecord
from decoding.choice import Fate
from decoding.step_costs import StepCosts

_USUAL: Final = (0.5, 0.5, 0.4, 0.5, 0.6, 0.75)
"""How likely looked-up drafts are thought to be kept at first, by how many ids matched."""

_LEAST: Final = 0.25
"""They are thought no worse: another text may repeat itself more, and nothing else would show it."""

_TRIED: Final = 256
"""Where no looked-up draft pays, one is verified all the same once in so many times that it is asked."""


class LookupLengths:
    """Remembers drafts by the number of ids that they were found by: many ids that match seldom mislead."""

    def __init__(self, costs: StepCosts) -> None:
        self._costs = costs
        self._records = [RowRecord() for _ in _USUAL]
        self._num_asked = 0

    def length(self, num_rows: int, limit: int, num_matched: int, *, instead_of: float = 0.0) -> int:
        """What gives most tokens a second, up to `limit`; 0 where that is less than what would be made instead."""
        lengths = np.arange(limit + 1)
        expected = np.cumsum(np.power(self.rate(num_matched), lengths))
        verify_s = self._costs.verify_s(1, num_rows, num_rows * (1 + lengths))
        plain_s, drafting_s = (self._costs.host_s(num_rows, drafts=drafts) for drafts in (False, True))
        host_s = np.where(lengths, drafting_s, plain_s) + self._costs.host_draft_s * num_rows * lengths
        rates = num_rows * expected / (verify_s + host_s)
        best = int(rates.argmax())
        if rates[best] < instead_of:
            best = 0
        self._num_asked += 1
        # Once in a while one draft is tried where none pays, to learn whether it would by now.
        return best or min(limit, int(self._num_asked % _TRIED == 0))

    def rate(self, num_matched: int) -> float:
        """How likely a draft is kept if all before it were."""
        return min(max(_USUAL[num_matched] * self._records[num_matched].ratio, _LEAST), SUREST)

    def rates(self) -> list[float]:
        """The same for two ids that matched, and more."""
        return [self.rate(num_matched) for num_matched in range(2, len(_USUAL))]

    def record(self, fates: Sequence[Fate]) -> None:
        """Count what became of drafts."""
        for fate in fates:
            expected = [_USUAL[fate.num_matched] * count for count in range(fate.drafted + 1)]
            self._records[fate.num_matched].record(expected, drafted=fate.drafted, kept=fate.kept)
