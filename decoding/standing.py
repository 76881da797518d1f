"""Choices in use: for which batches, for how long, and what each row gets of them.

Knows rows and what was chosen; knows nothing of what is promised.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Self

from decoding.acceptance_record import RowRecord
from decoding.choice import DraftingRow, ExitLayers
from decoding.confidence import Stopping
from decoding.weighing import Batch, Candidate

_KEPT_STEPS: Final = 8
_MOVED_STEPS: Final = 16
_CONFIRMED_STEPS: Final = 128
_LONGER: Final = 3
"""A choice is used for so many steps, longer where only the way of drafting changed, and for several times as many
when it is confirmed: weighing takes time, and steps of one shape share their preparation.
"""

_LONGEST_KEPT_STEPS: Final = 256
"""Where other choices are used in between, it is forgotten after so many steps in all."""

_LIKE_ENOUGH: Final = 0.25
"""It serves batches whose numbers of rows differ by this share at most."""

_KEPT_CHOICES: Final = 64
"""Choices that are kept at a time: requests make up ever new sets of exit layers to choose among."""

_USUAL: Final = 1.0
"""The advantage of a row of which nothing is known."""


class Occasion(NamedTuple):
    """What a choice is made for: the exit layers that may be chosen, about how many rows, of which kinds, and
    whether they can stop drafting by themselves.
    """

    among: ExitLayers
    size: int
    any_greedy: bool
    any_sampled: bool
    can_stop: bool

    @classmethod
    def of(
        cls, among: ExitLayers, rows: Sequence[DraftingRow], *, num_others: int, can_stop: bool = False
    ) -> Self:
        """As rows come and go their number changes often, and what was chosen for it before still holds."""
        size = round(math.log(len(rows) + num_others) / math.log1p(_LIKE_ENOUGH))
        kinds = {row.is_sampled for row in rows}
        return cls(among, size, False in kinds, True in kinds, can_stop)


class Span(NamedTuple):
    """For how many steps something is chosen, and which exit layers are surveyed meanwhile."""

    num_steps: int
    surveyed: ExitLayers = ()


@dataclass(slots=True)
class Standing:
    """A choice in use, until a step, and what rows get: those that came since, what an unknown row would. At first
    there may be a `look` at something else.
    """

    candidate: Candidate
    batch: Batch
    stopping: Stopping | None
    by_advantage: dict[float, int]
    by_row: dict[RowRecord, int]
    num_steps: int
    steps_left: int
    last_step: int
    surveyed: ExitLayers
    look: Standing | None = None
    is_look: bool = False

    def now(self) -> Standing:
        """What this step does: this, or the look that comes first; a step less is left of it."""
        one = self.look if self.look is not None and self.look.steps_left > 0 else self
        one.steps_left -= 1
        return one

    def serves(self, rows: Sequence[DraftingRow], step: int) -> bool:
        """Whether it still stands: rows that are new are like some it was made for."""
        if self.steps_left <= 0 or step > self.last_step:
            return False
        if _USUAL in self.by_advantage:
            return True
        num_new = sum(row.record not in self.by_row for row in rows)
        return num_new <= _LIKE_ENOUGH * len(rows)

    @property
    def may_look(self) -> bool:
        """Whether a look may come first: where none drafts, looks are planned when choosing."""
        return self.candidate.drafts and not self.is_look

    @property
    def exit_layer(self) -> int:
        """Where drafts leave."""
        return self.candidate.exit_layer

    def length(self, row: DraftingRow) -> int:
        """How much a row drafts."""
        wanted = self.by_row.get(row.record)
        if wanted is None:
            nearest = min(self.by_advantage, key=lambda advantage: abs(advantage - _USUAL))
            wanted = self.by_row[row.record] = self.by_advantage[nearest]
        return min(wanted, row.limit)

    @classmethod
    def of(
        cls,
        chosen: Candidate,
        batch: Batch,
        advantages: Sequence[tuple[RowRecord, float]],
        *,
        step: int,
        span: Span,
        stopping: Stopping | None = None,
    ) -> Self:
        """What was chosen at this step for these rows, each with its advantage."""
        by_advantage = dict(zip(batch.advantages, chosen.lengths, strict=True))
        by_row = {record: by_advantage[advantage] for record, advantage in advantages}
        last_step = step + _LONGEST_KEPT_STEPS
        return cls(
            *(chosen, batch, stopping, by_advantage, by_row),
            *(span.num_steps, span.num_steps, last_step, span.surveyed),
        )


def keep(kept: dict[Occasion, Standing], occasion: Occasion, standing: Standing) -> None:
    """As the latest of so many."""
    kept.pop(occasion, None)
    kept[occasion] = standing
    if len(kept) > _KEPT_CHOICES:
        del kept[next(iter(kept))]


def num_steps_of(chosen: Candidate, batch: Batch, settled: Standing | None, *, until_look: int) -> int:
    """How long it is used: longer each time that nothing else was found."""
    is_confirmed = (
        settled is not None
        and settled.exit_layer == chosen.exit_layer
        and settled.candidate.least == chosen.least
        and settled.by_advantage == dict(zip(batch.advantages, chosen.lengths, strict=True))
    )
    if settled is None or not is_confirmed:
        has_moved = settled is not None and settled.candidate.drafts and chosen.drafts
        return _MOVED_STEPS if has_moved else _KEPT_STEPS
    longer = min(_LONGER * settled.num_steps, _CONFIRMED_STEPS)
    # Where none drafts, looks decide.
    return max(_KEPT_STEPS, longer if chosen.drafts else min(longer, until_look))
