"""Chooses exit layer and draft lengths where a request leaves them open: what gives most tokens a second.

Knows what is promised and when to look again; knows no tokens. No output depends on what it chooses.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from decoding.acceptance_record import SUREST, AcceptanceRecord, RowRecord
from decoding.choice import Choice, DraftingRow, ExitLayers, Fate, StepOutcome
from decoding.exploration import Explorer
from decoding.messages import Drafter
from decoding.reports import Beliefs
from decoding.standing import Occasion, Span, Standing, keep
from decoding.step_costs import StepCosts
from decoding.telling import beliefs_of
from decoding.weighing import MARGIN, Batch, Candidate, Weigher, advantages_of

_KEPT_STEPS: Final = 8
_CONFIRMED_STEPS: Final = 64
"""A choice is used for so many steps, and for twice as many each time it is confirmed: weighing takes time, and
steps of one shape share their preparation.
"""

_FIRST_STEPS: Final = 64
_OBSERVED_STEPS: Final = 17
"""After the first steps, the times of one in so many are learned from: that takes time too. Not a multiple of
`_KEPT_STEPS`, lest all that are learned from are steps in which something is weighed.
"""

_NOT_THIS: Final = 2
"""The host's time is learned in the step that follows."""

_SEARCH_STEPS: Final = 64
"""How often all exit layers are weighed; in between, the last and its neighbours."""

_SURPRISING: Final = 1.0
"""Where nothing is drafted, drafts are soon repeated if so many more were kept than expected, in units of the
square root of their number: what chance alone seldom gives.
"""

_GUESSED: Final = 0.95
"""What an exit layer promises that was hardly tried is worth so much of what another does."""

_WORTH_CHANGING: Final = 1.02
"""What is in use stays until something promises so much more."""

_LEAST_LOOKED_UP: Final = 0.25
"""Looked-up drafts are thought no worse: another text may repeat itself more, and nothing else would show it."""

_TRIED_LOOKUPS: Final = 256
"""Where no looked-up draft pays, one in so many steps is verified all the same."""


class Controller:
    """Maximises expected tokens over expected seconds, from costs and acceptance that it keeps current."""

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
        self._weigher = Weigher(costs, record)
        self._explorer = Explorer(self._weigher, record, tuple(exit_layers))
        self._exit_layers = tuple(exit_layers)
        self._max_draft_length = max_draft_length
        self._standing: dict[Occasion, Standing] = {}
        self._settled: dict[Occasion, Standing] = {}
        self._lookups = RowRecord()
        self._num_steps = 0
        self._next_search = 0
        self._is_plain = False
        self._num_lookups = 0
        self._num_outcomes = 0
        self._host_steps = 0
        self._observed_layer = 0
        self._first_exit_layer = first_exit_layer
        self.exit_layer = first_exit_layer

    def choose(self, rows: Sequence[DraftingRow], *, among: ExitLayers = (), num_others: int = 0) -> Choice:
        """What promises most tokens a second; now and then something else, to learn whether it would."""
        self._num_steps += 1
        occasion = Occasion.of(among, len(rows) + num_others)
        standing = self._standing.get(occasion)
        if standing is None or not standing.serves(rows, self._num_steps):
            standing = self._decide(rows, occasion, num_others)
            keep(self._standing, occasion, standing)
        standing.steps_left -= 1
        if not among:
            self.exit_layer = standing.exit_layer
        return Choice(standing.exit_layer, tuple(map(standing.length, rows)), standing.surveyed)

    @property
    def pays(self) -> bool:
        """Whether any drafting is worth its cost on this checkpoint, as far as is known."""
        return self._explorer.pays

    def lookup_length(self, num_rows: int, limit: int) -> int:
        """Drafts that were looked up cost no layers before they are verified."""
        rate = min(max(0.5 * self._lookups.ratio, _LEAST_LOOKED_UP), SUREST)
        lengths = np.arange(min(limit, self._max_draft_length) + 1)
        expected = np.cumsum(np.power(rate, lengths))
        seconds = self._costs.verify_s(1, num_rows, num_rows * (1 + lengths))
        plain_s, drafting_s = (self._costs.host_s(num_rows, drafts=drafts) for drafts in (False, True))
        best = int((expected / (seconds + np.where(lengths, drafting_s, plain_s))).argmax())
        self._num_lookups += 1
        # Once in a while one draft is tried where none pays, to learn whether it would by now.
        return best or min(limit, int(self._num_lookups % _TRIED_LOOKUPS == 0))

    def drafted(self, exit_layer: int, drafter: Drafter, fates: Sequence[Fate]) -> None:
        """Count cycles for their rows and for all."""
        if drafter is Drafter.EARLY_EXIT:
            expected = self._record.expected(exit_layer)
            surprise, num_reached = 0.0, 0
            for row, drafted, kept in fates:
                row.record(expected, drafted=drafted, kept=kept)
                reached = min(kept + 1, drafted, len(expected) - 1)
                surprise += kept - expected[reached]
                num_reached += reached
            if self._is_plain and surprise > _SURPRISING * math.sqrt(num_reached):
                self._explorer.hurry(self._num_steps)
            self._explorer.saw(sum(drafted for _, drafted, _ in fates))
            self._record.record(exit_layer, [(drafted, kept) for _, drafted, kept in fates])
        elif drafter is Drafter.LOOKUP:
            for _, drafted, kept in fates:
                halves = [0.5 * count for count in range(drafted + 1)]
                self._lookups.record(halves, drafted=drafted, kept=kept)

    def surveyed(self, agreed: Mapping[int, Sequence[bool]]) -> None:
        """Count drafts of one token that nobody made."""
        for exit_layer, of_rows in agreed.items():
            self._record.record(exit_layer, [(1, int(is_kept)) for is_kept in of_rows])
        self._explorer.saw(max(map(len, agreed.values()), default=0), surveyed=True)

    def observes(self, exit_layer: int, *, drafts: bool) -> bool:
        """Now and then, and at once where drafts leave elsewhere than in the last step that was learned from."""
        self._num_outcomes += 1
        is_elsewhere = drafts and exit_layer != self._observed_layer
        is_due = self._num_outcomes <= _FIRST_STEPS or self._num_outcomes % _OBSERVED_STEPS == 0
        return is_elsewhere or is_due

    def took(self, outcome: StepOutcome) -> None:
        """Keep the costs current."""
        if any(outcome.draft_lengths):
            self._observed_layer = outcome.exit_layer
        self._costs.observe(
            outcome.exit_layer, outcome.draft_lengths, draft_s=outcome.draft_s, verify_s=outcome.verify_s
        )
        self._host_steps = _NOT_THIS

    def host_took(self, num_rows: int, host_s: float, *, drafts: bool) -> None:
        """Keep the costs current, by the step behind one that was learned from: learning took the host time."""
        self._host_steps -= 1
        if self._host_steps == 0:
            self._costs.observe_host(num_rows, host_s, drafts=drafts)

    def beliefs(self) -> Beliefs:
        """What it expects of the exit layers it has tried, and of the one it chose last."""
        told = [each for each in self._exit_layers if each == self.exit_layer or self._record.is_tried(each)]
        looked_up = min(max(0.5 * self._lookups.ratio, _LEAST_LOOKED_UP), SUREST)
        return beliefs_of(self._costs, self._record, exit_layers=told, lookup_acceptance=looked_up)

    def _decide(self, rows: Sequence[DraftingRow], occasion: Occasion, num_others: int) -> Standing:
        self._record.refresh()
        advantages = advantages_of(row.record for row in rows)
        # Not as far as these rows may draft now: what is chosen serves the ones that come after them, too.
        batch = Batch.of(
            [advantage for _, advantage in advantages], longest=self._max_draft_length, num_others=num_others
        )
        layers = occasion.among or self._layers_to_weigh()
        best = max(self._weigher.best_at(layers, batch), key=self._worth)
        plain = self._weigher.plain(best.exit_layer, batch)
        found = best if best.rate > MARGIN * plain.rate else plain
        settled = self._settled.get(occasion)
        chosen = self._unless_like(settled, found, plain, batch)
        self._is_plain = not chosen.drafts
        look = self._explorer.look(self._num_steps, chosen, best, batch, layers=occasion.among)
        if look is not None:
            span = Span(look.num_steps, look.surveyed)
            return Standing.of(look.candidate, batch, advantages, step=self._num_steps, span=span)
        span = Span(self._num_steps_of(settled, chosen, batch))
        standing = Standing.of(chosen, batch, advantages, step=self._num_steps, span=span)
        keep(self._settled, occasion, standing)
        return standing

    def _worth(self, candidate: Candidate) -> float:
        """Promises that rest on guesses are worth less; no worth is lost where a choice must begin."""
        layer = candidate.exit_layer
        is_known = layer == self._first_exit_layer or self._record.is_tried(layer)
        return candidate.rate * (1.0 if is_known else _GUESSED)

    def _unless_like(
        self, settled: Standing | None, found: Candidate, plain: Candidate, batch: Batch
    ) -> Candidate:
        """What was found, unless what is in use promises about as much: changing costs time too. But drafts end as
        soon as they promise hardly more than none.
        """
        if settled is None or not set(batch.advantages) <= settled.by_advantage.keys():
            return found
        lengths = tuple(settled.by_advantage[advantage] for advantage in batch.advantages)
        if (found.exit_layer, found.lengths) == (settled.exit_layer, lengths):
            return found
        known = self._weigher.rated(settled.exit_layer, lengths, batch)
        if known.drafts and known.rate <= _WORTH_CHANGING * plain.rate:
            return found
        return found if found.rate > _WORTH_CHANGING * known.rate else known

    def _num_steps_of(self, settled: Standing | None, chosen: Candidate, batch: Batch) -> int:
        """How long it is used: longer each time that nothing else was found, but not past the next look."""
        is_confirmed = (
            settled is not None
            and settled.exit_layer == chosen.exit_layer
            and settled.by_advantage == dict(zip(batch.advantages, chosen.lengths, strict=True))
        )
        if settled is None or not is_confirmed:
            return _KEPT_STEPS
        until_look = self._explorer.next_look - self._num_steps
        return max(_KEPT_STEPS, min(2 * settled.num_steps, _CONFIRMED_STEPS, until_look))

    def _layers_to_weigh(self) -> Sequence[int]:
        """Now and then all exit layers, else those beside the last: weighing takes time of the step."""
        if self._num_steps >= self._next_search:
            self._next_search = self._num_steps + _SEARCH_STEPS
            return self._exit_layers
        place = bisect_left(self._exit_layers, self.exit_layer)
        return self._exit_layers[max(0, place - 1) : place + 2]
