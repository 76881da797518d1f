"""Chooses exit layer and draft lengths where a request leaves them open: what gives most tokens a second.

Knows what is promised and when to look again; knows no tokens. No output depends on what it chooses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final, NamedTuple

from decoding.acceptance_record import AcceptanceRecord, RowRecord
from decoding.choice import Choice, DraftingRow, ExitLayers, Fate, Lease, Seen, StepOutcome
from decoding.exploration import Explorer, Look
from decoding.lookup_lengths import LookupLengths
from decoding.messages import Drafter
from decoding.observing import Observer
from decoding.reports import Beliefs
from decoding.standing import Occasion, Span, Standing, keep, num_steps_of
from decoding.step_costs import StepCosts
from decoding.stopping import StoppingWeigher
from decoding.surprise import Surprise
from decoding.telling import beliefs_of
from decoding.weighing import MARGIN, Batch, Candidate, Weigher, advantages_of

_LEASED_STEPS: Final = 15
"""For so many more steps nobody asks again: what is done in every step has its code in near caches."""

_GUESSED: Final = 0.95
"""What an exit layer promises that was hardly tried is worth so much of what another does."""

_WORTH_CHANGING: Final = 1.02
_WORTH_MOVING: Final = 1.04
"""What is in use stays until something promises so much more: the second where both draft, of which many promise
about the same.
"""


class _Mode(NamedTuple):
    """Who rates and who explores: where rows draft as far as they are told, or until they are unsure."""

    weigher: Weigher
    explorer: Explorer


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
        can_stop: bool = False,
    ) -> None:
        self._costs = costs
        self._record = record
        self._can_stop = can_stop
        weighers = Weigher(costs, record), StoppingWeigher(costs, record)
        self._modes = [_Mode(each, Explorer(each, record, tuple(exit_layers))) for each in weighers]
        self._mode = self._modes[can_stop]
        self._exit_layers = tuple(exit_layers)
        self._max_draft_length = max_draft_length
        self._standing: dict[Occasion, Standing] = {}
        self._settled: dict[Occasion, Standing] = {}
        self._lookups = LookupLengths(costs)
        self._promised = 0.0
        self._num_steps = 0
        self._is_plain = False
        self._surprise = Surprise()
        self._observer = Observer(costs)
        self._leased: tuple[Lease, Standing] | None = None
        self._first_exit_layer = first_exit_layer
        self.exit_layer = first_exit_layer

    def choose(
        self,
        rows: Sequence[DraftingRow],
        *,
        among: ExitLayers = (),
        num_others: int = 0,
        can_stop: bool = False,
    ) -> Choice:
        """What promises most tokens a second; now and then something else, to learn whether it would."""
        self._end_lease()
        self._num_steps += 1
        occasion = Occasion.of(among, rows, num_others=num_others, can_stop=can_stop and self._can_stop)
        self._mode = self._modes[occasion.can_stop]
        standing = self._standing.get(occasion)
        if standing is None or not standing.serves(rows, self._num_steps):
            standing = self._decide(rows, occasion, num_others)
            self._observer.has_weighed = True
            keep(self._standing, occasion, standing)
        elif standing.may_look and self._num_steps >= self._mode.explorer.next_look:
            self._look_aside(standing, occasion)
        standing = standing.now()
        self._promised = standing.candidate.rate
        if not among:
            self.exit_layer = standing.exit_layer
        return Choice(
            standing.exit_layer,
            tuple(map(standing.length, rows)),
            standing.surveyed,
            standing.stopping,
            standing.candidate.expected_length,
            self._lease_of(standing),
        )

    @property
    def pays(self) -> bool:
        """Whether any drafting is worth its cost on this checkpoint, as far as is known."""
        return self._modes[self._can_stop].explorer.pays

    def lookup_length(self, num_rows: int, limit: int, *, num_matched: int, may_exit: bool) -> int:
        """Drafts that were looked up cost no layers before they are verified."""
        limit = min(limit, self._max_draft_length)
        return self._lookups.length(
            num_rows, limit, num_matched, instead_of=self._promised if may_exit else 0.0
        )

    def drafted(self, exit_layer: int, drafter: Drafter, fates: Sequence[Fate]) -> None:
        """Count cycles for their rows and for all."""
        if drafter is Drafter.EARLY_EXIT:
            unchosen = list(map(_unchosen, fates))
            if self._is_plain:
                self._hurry_if_surprised(exit_layer, unchosen)
            for fate in fates:
                if not fate.may_stop:
                    expected = self._record.expected(exit_layer)
                    fate.record.record(expected, drafted=fate.drafted, kept=fate.kept)
                if fate.grades:
                    self._record.confidence.record(
                        exit_layer, fate.grades, kept=fate.kept, is_sampled=fate.is_sampled
                    )
            self._saw(sum(fate.drafted for fate in fates))
            self._record.record(exit_layer, unchosen)
        elif drafter is Drafter.LOOKUP:
            self._lookups.record(fates)

    def surveyed(self, seen: Mapping[int, Sequence[Seen]]) -> None:
        """Count drafts of one token that nobody made."""
        for exit_layer, of_rows in seen.items():
            fates = [(1, int(row.is_kept)) for row in of_rows]
            if self._is_plain:
                self._hurry_if_surprised(exit_layer, fates)
            self._record.record(exit_layer, fates)
            for is_kept, grade, is_sampled in of_rows:
                if grade is not None:
                    self._record.confidence.record(
                        exit_layer, (grade,), kept=int(is_kept), is_sampled=is_sampled
                    )
        self._saw(max(map(len, seen.values()), default=0), surveyed=True)

    def observes(self, exit_layer: int, *, drafts: bool) -> bool:
        """Now and then."""
        return self._observer.wants(
            exit_layer, self._num_steps, drafts=drafts, usually_drafts=not self._is_plain
        )

    def took(self, outcome: StepOutcome) -> None:
        """Keep the costs current."""
        self._observer.took(outcome, self._num_steps)

    def host_took(self, num_rows: int, host_s: float, *, num_drafts: int) -> None:
        """Keep the costs current."""
        self._observer.host_took(num_rows, host_s, num_drafts=num_drafts)

    def beliefs(self) -> Beliefs:
        """What it expects of the exit layers it has tried, and of the one it chose last."""
        told = [each for each in self._exit_layers if each == self.exit_layer or self._record.is_tried(each)]
        rates = self._lookups.rates()
        return beliefs_of(self._costs, self._record, exit_layers=told, lookup_acceptance=rates)

    def _decide(self, rows: Sequence[DraftingRow], occasion: Occasion, num_others: int) -> Standing:
        self._record.refresh()
        weigher, explorer = self._mode.weigher, self._mode.explorer
        # How sure its drafts are tells more of a row than how earlier ones fared.
        advantages = (
            [(row.record, 1.0) for row in rows]
            if occasion.can_stop
            else advantages_of(row.record for row in rows)
        )
        # Not as far as these rows may draft now: what is chosen serves the ones that come after them, too.
        batch = Batch.of(
            [advantage for _, advantage in advantages],
            longest=self._max_draft_length,
            num_others=num_others,
            num_sampled=sum(row.is_sampled for row in rows),
        )
        layers = occasion.among or self._exit_layers
        best = max(weigher.best_at(layers, batch), key=self._worth)
        plain = weigher.plain(best.exit_layer, batch)
        found = best if best.rate > MARGIN * plain.rate else plain
        settled = self._settled.get(occasion)
        chosen = self._unless_like(settled, found, plain, batch)
        self._is_plain = not chosen.drafts
        self._surprise = Surprise()
        look = explorer.look(self._num_steps, chosen, best, batch, layers=occasion.among)

        stands = self._standing_of(
            chosen,
            batch,
            Span(num_steps_of(chosen, batch, settled, until_look=explorer.next_look - self._num_steps)),
            advantages,
        )
        keep(self._settled, occasion, stands)
        if look is None:
            return stands
        stands.look = self._looking(look, batch)
        # What is seen now decides whether anything is drafted.
        return stands if chosen.drafts else stands.look

    def _lease_of(self, standing: Standing) -> Lease | None:
        """Not while much is to be learned, nor beyond the next look; a look has none."""
        until_look = self._mode.explorer.next_look - self._num_steps - 1
        num_steps = min(_LEASED_STEPS, standing.steps_left, until_look)
        if num_steps <= 0 or self._observer.knows_little or standing.is_look:
            return None
        self._leased = Lease(num_steps), standing
        return self._leased[0]

    def _end_lease(self) -> None:
        """Count the steps that were taken on it."""
        if self._leased is not None:
            lease, standing = self._leased
            self._num_steps += lease.num_taken
            standing.steps_left -= lease.num_taken
            self._leased = None

    def _look_aside(self, standing: Standing, occasion: Occasion) -> None:
        """Look, and go on with what stands: nothing is weighed for that."""
        chosen, batch = standing.candidate, standing.batch
        look = self._mode.explorer.look(self._num_steps, chosen, chosen, batch, layers=occasion.among)
        standing.look = self._looking(look, batch) if look else None
        self._observer.has_weighed = True

    def _looking(self, look: Look, batch: Batch) -> Standing:
        looking = self._standing_of(look.candidate, batch, Span(look.num_steps, look.surveyed))
        looking.is_look = True
        return looking

    def _standing_of(
        self,
        candidate: Candidate,
        batch: Batch,
        span: Span,
        advantages: Sequence[tuple[RowRecord, float]] = (),
    ) -> Standing:
        stopping = self._mode.weigher.stopping(candidate)
        return Standing.of(candidate, batch, advantages, step=self._num_steps, span=span, stopping=stopping)

    def _hurry_if_surprised(self, exit_layer: int, fates: Sequence[tuple[int, int]]) -> None:
        """Look soon at drafts where none are made, if more were kept since then than chance alone explains."""
        self._surprise.add(self._record.expected(exit_layer), fates)
        if self._surprise.is_large:
            self._mode.explorer.hurry(self._num_steps)

    def _saw(self, num_tokens: int, *, surveyed: bool = False) -> None:
        for mode in self._modes:
            mode.explorer.saw(num_tokens, surveyed=surveyed)

    def _worth(self, candidate: Candidate) -> float:
        """Promises that rest on guesses are worth less; no worth is lost where a choice must begin."""
        layer = candidate.exit_layer
        is_known = layer == self._first_exit_layer or self._record.is_known(layer)
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
        if (found.exit_layer, found.lengths, found.least) == (
            settled.exit_layer,
            lengths,
            settled.candidate.least,
        ):
            return found
        known = self._mode.weigher.rated(replace(settled.candidate, lengths=lengths), batch)
        if known.drafts and known.rate <= _WORTH_CHANGING * plain.rate:
            return found
        enough = _WORTH_MOVING if known.drafts and found.drafts else _WORTH_CHANGING
        return found if self._worth(found) > enough * known.rate else known


def _unchosen(fate: Fate) -> tuple[int, int]:
    """Drafted and kept tokens that say how likely any draft is kept: of a row that stops where it is unsure only
    the first, which it made whatever it was.
    """
    return (1, min(1, fate.kept)) if fate.may_stop else (fate.drafted, fate.kept)
