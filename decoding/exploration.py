"""When to look at something else than what promises most, and at what: only what is seen is known.

Knows promises and what they rest on; knows no tokens and chooses nothing for good.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from decoding.acceptance_record import AcceptanceRecord
from decoding.choice import ExitLayers
from decoding.weighing import MARGIN, Batch, Candidate, Weigher

_SOON_STEPS: Final = 16
_SETTLED_STEPS: Final = 256
_HOPELESS_STEPS: Final = 4096
"""The fewest and most steps between two looks, and between two where no draft ever paid."""

_FAR_AHEAD: Final = 1.25
_SPARED_LOOKS: Final = 3
"""What promises so many times what none does is not held against that each time: so many looks are left out."""

_LOOKED_STEPS: Final = 4
_SURVEYED_STEPS: Final = 2
"""How long a look lasts, and a survey of one row: of more rows it is shorter, as many tokens say as much."""

_SURVEY_STEPS: Final = 32
_SURVEYED_TOKENS: Final = 16
"""Steps between two surveys at the beginning; twice as many for each so many tokens that were surveyed."""

_MOST_SURVEYED: Final = 6
"""Exit layers that one survey takes in: each costs a head."""

_WORTH_A_LOOK: Final = 1.05
"""An exit layer is looked at if with luck it promises so much more than what is chosen."""

_HOPELESS_TOKENS: Final = 60
"""After so many, and looks ever further apart, drafts that promise nothing to a row alone are given up."""


@dataclass(frozen=True, slots=True)
class Look:
    """What to do instead for so many steps; nothing is drafted where exit layers are `surveyed`."""

    candidate: Candidate
    num_steps: int
    surveyed: ExitLayers = ()


class Explorer:
    """Plans looks: at exit layers of which too little is known, by comparing what they would draft with what is
    chosen; and at drafts where none are made, or at none, since costs change too.

    `pays` tells whether any draft of this checkpoint is worth its cost, as far as is known; `next_look` is the
    step of the next one.
    """

    def __init__(self, weigher: Weigher, record: AcceptanceRecord, exit_layers: Sequence[int]) -> None:
        self._weigher = weigher
        self._record = record
        self._exit_layers = exit_layers
        self._interval = _SOON_STEPS
        self.next_look = _SOON_STEPS
        self._is_surveys_turn = False
        self._num_surveyed = 0
        self._num_spared = 0
        self._num_tokens = 0
        self.pays = True

    def saw(self, num_tokens: int, *, surveyed: bool = False) -> None:
        """Count drafts that were verified, or tokens that were compared with what would have been drafted."""
        self._num_tokens += num_tokens
        self._num_surveyed += num_tokens * surveyed

    def hurry(self, step: int) -> None:
        """Look soon: what was seen was not expected."""
        self._interval = _SOON_STEPS
        self.next_look = min(self.next_look, step + _SOON_STEPS)

    def look(
        self, step: int, chosen: Candidate, best: Candidate, batch: Batch, *, layers: ExitLayers
    ) -> Look | None:
        """What to do instead of what is `chosen` from this step on, if it is time; `best` is the best that drafts.

        Only the given exit layers may be used; all may be, and are surveyed, where there are none.
        """
        if step < self.next_look:
            return None
        # Not as soon as a few were kept by chance.
        if chosen.drafts:
            self.pays = True
        self._is_surveys_turn = not self._is_surveys_turn
        plain = self._weigher.plain(chosen.exit_layer, batch)
        if not chosen.drafts:
            return self._beside_none(step, plain, best, batch, layers)
        surveyed = () if layers else self._hopeful(chosen, batch)
        self._interval = _SOON_STEPS
        learning = min(_SURVEY_STEPS * 2 ** min(self._num_surveyed // _SURVEYED_TOKENS, 8), _SETTLED_STEPS)
        if surveyed and (learning < _SETTLED_STEPS or self._is_surveys_turn):
            self.next_look = step + learning
            return self._survey(plain, surveyed, batch)
        self.next_look = step + _SETTLED_STEPS
        # What was seen of others long ago says less of them now.
        self._record.fade(but=chosen.exit_layer)
        is_far_ahead = self._weigher.rated(chosen, batch).rate > _FAR_AHEAD * plain.rate
        self._num_spared = (self._num_spared + 1) % (1 + _SPARED_LOOKS) if is_far_ahead else 0
        return None if self._num_spared else Look(plain, _LOOKED_STEPS)

    def _beside_none(
        self, step: int, plain: Candidate, best: Candidate, batch: Batch, layers: ExitLayers
    ) -> Look:
        """Soon after drafting was given up, then ever more seldom."""
        self.pays = not self._is_hopeless(batch)
        self._interval = min(2 * self._interval, _SETTLED_STEPS if self.pays else _HOPELESS_STEPS)
        self.next_look = step + self._interval
        # Are they kept by now, and cost what they did? What was seen long ago says less of that.
        self._record.fade()
        surveyed = () if layers else self._hopeful(plain, batch)
        if surveyed and self._is_surveys_turn:
            return self._survey(plain, surveyed, batch)
        # One draft tells as much as several do, and nobody waits long for it.
        drafting = best if self.pays else plain
        once = replace(drafting, lengths=(1,) * len(drafting.lengths), expected_length=1.0)
        return Look(once, _LOOKED_STEPS)

    def _survey(self, plain: Candidate, surveyed: ExitLayers, batch: Batch) -> Look:
        return Look(plain, max(1, _SURVEYED_STEPS // batch.num_rows), surveyed)

    def _hopeful(self, chosen: Candidate, batch: Batch) -> ExitLayers:
        """The best of the exit layers that beat what is chosen if all goes well where little was seen."""
        at_best = self._weigher.best_at(self._exit_layers, batch, hopes=True)
        hopeful = [
            each
            for each in at_best
            if each.rate > _WORTH_A_LOOK * chosen.rate
            and (each.exit_layer != chosen.exit_layer or not chosen.drafts)
        ]
        hopeful.sort(key=lambda each: -each.rate)
        return tuple(sorted(each.exit_layer for each in hopeful[:_MOST_SURVEYED]))

    def _is_hopeless(self, batch: Batch) -> bool:
        """Whether enough was seen, and no draft promises anything to a row that is alone."""
        if self._num_tokens < _HOPELESS_TOKENS or self._interval < _SETTLED_STEPS:
            return False
        alone = Batch.of(
            [1.0], longest=batch.longest, num_others=0, num_sampled=int(batch.num_sampled > batch.num_greedy)
        )
        best = max(self._weigher.best_at(self._exit_layers, alone), key=lambda each: each.rate)
        return best.rate <= MARGIN * self._weigher.plain(best.exit_layer, alone).rate
