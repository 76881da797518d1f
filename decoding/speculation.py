"""Adds drafts to the shares of a step, as requests ask or as the chooser finds best, and tells it how they fared.

Knows who drafts how much; knows nothing of how drafts are made.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import compress
from typing import Final, NamedTuple

from decoding.choice import (
    Choice,
    DraftChooser,
    DraftingRow,
    ExitLayers,
    Fate,
    Lease,
    Seen,
    StepOutcome,
)
from decoding.confidence import Stopping
from decoding.messages import Drafter
from decoding.plan import Result
from decoding.planning import Share
from decoding.sequence import Sequence as Stream

Extend = Callable[[Stream, int], bool]
"""Gives a sequence blocks for so many more tokens, or none and False."""

_BY_EARLY_EXIT: Final = (Drafter.EARLY_EXIT, Drafter.HYBRID)


class _Wish(NamedTuple):
    """What a row would draft by early exit."""

    exit_layer: int
    length: int


class _Resting(NamedTuple):
    """What these rows drafted in the last step, and may in the next ones without asking."""

    rows: tuple[int, ...]
    wishes: Mapping[int, _Wish]
    stopping: Stopping | None
    lease: Lease


class Speculator:
    """Spends what a step has left on drafts. Changes no sequence but for its blocks, by way of `extend`.

    Rows that ask for different exit layers each draft at their own, unless it `promotes`: then all draft at the
    most promising of those. `latest` is what the chooser chose last; `surveyed` are exit layers whose drafts the
    step does not make, but compares with what it chooses; `stopping` says when its rows stop by themselves.
    """

    def __init__(
        self,
        chooser: DraftChooser,
        *,
        extend: Extend,
        promotes: bool,
        model_draft_length: int = 0,
        model_context: int = sys.maxsize,
    ) -> None:
        self._chooser = chooser
        self._extend = extend
        self._promotes = promotes
        self._model_draft_length = model_draft_length
        self._model_context = model_context
        self.latest = Choice(exit_layer=0, draft_lengths=())
        self.surveyed: ExitLayers = ()
        self.stopping: Stopping | None = None
        self._fates: dict[tuple[int, Drafter], list[Fate]] = {}
        self._lease: Lease | None = None
        self._resting: _Resting | None = None
        self._rested: tuple[Sequence[Share], Result] | None = None

    @property
    def pays(self) -> bool:
        """Whether any drafting is worth its cost here, as far as is known."""
        return self._chooser.pays

    def add_drafts(self, shares: Sequence[Share], budget: int) -> list[Share]:
        """The shares with drafts of up to `budget` tokens in all, oldest rows first: nobody waits for drafts.

        None are made while a long prompt comes in: it and the rows beside it wait less for each other.
        """
        if any(share.is_of_long_prompt for share in shares):
            budget = 0
        drafting = [
            share for share in shares if share.sequence.num_pending == 1 and share.sequence.num_remaining > 1
        ]
        self.surveyed, self.stopping = (), None
        can_stop = all(share.sequence.wants_only_tokens for share in shares)
        wishes = self._known_wishes(drafting, can_stop=can_stop)
        added, num_left = [], len(wishes)
        for share in shares:
            request = share.sequence.request
            wish = wishes.get(request.sequence_id)
            if wish is None:
                exit_layer = request.exit_layer or self._chooser.exit_layer
                added.append(Share(share.sequence, share.num_fed, exit_layer))
            else:
                # Rows that stop by themselves seldom make all their drafts: each has its part of the budget.
                own = budget // max(1, num_left) if self.stopping else budget
                added.append(self._fulfil(share, wish, own, num_rows=len(drafting)))
                budget -= added[-1].num_drafts
                num_left -= 1
        if any(share.num_drafts for share in added):
            self.surveyed = ()
        return added

    def _known_wishes(self, drafting: Sequence[Share], *, can_stop: bool) -> Mapping[int, _Wish]:
        """What each row would draft by early exit: what it did in the last step, where that still holds."""
        rows = (can_stop, *[share.sequence.place for share in drafting])
        resting = self._resting
        if resting is not None and resting.rows == rows and resting.lease.take():
            self.stopping = resting.stopping
            return resting.wishes
        self._tell()
        if self._rested is not None:
            # Where nobody chose, steps take what they mostly do.
            self._tell_times(*self._rested)
        self._lease = self._resting = self._rested = None
        wishes = dict(self._wishes(drafting, can_stop=can_stop))
        if self._lease is not None:
            self._resting = _Resting(rows, wishes, self.stopping, self._lease)
        return wishes

    def learn(self, shares: Sequence[Share], result: Result) -> None:
        """Tell the chooser how the drafts of a step fared and what the step took."""
        for share, chosen in zip(shares, result.chosen, strict=True):
            if share.num_drafts and chosen:
                fate = Fate(
                    share.sequence.drafts,
                    share.num_drafts,
                    len(chosen) - 1,
                    share.grades,
                    share.is_sampled,
                    # Without grades it made all that were planned.
                    share.may_stop and bool(share.grades),
                    share.num_matched,
                )
                self._fates.setdefault((share.exit_layer, share.drafter), []).append(fate)
        if self._resting is not None:
            # Of these the last is told.
            self._rested = shares, result
            return
        self._tell()
        if self.surveyed:
            self._chooser.surveyed(self._seen(shares, result))
        else:
            self._tell_times(shares, result)

    def _tell_times(self, shares: Sequence[Share], result: Result) -> None:
        """What a step took, if the chooser learns from it."""
        exit_layers = {share.exit_layer for share in shares if share.draft_length}
        exit_layer = max(exit_layers, default=1)
        is_observed = self._chooser.observes(exit_layer, drafts=bool(exit_layers))
        if is_observed and len(exit_layers) <= 1 and all(share.is_typical for share in shares):
            self._chooser.took(
                StepOutcome(
                    exit_layer=exit_layer,
                    draft_lengths=tuple(share.draft_length for share in shares),
                    draft_s=result.draft_s,
                    verify_s=result.verify_s,
                )
            )

    def _tell(self) -> None:
        """What became of drafts since the chooser was told last."""
        for (exit_layer, drafter), of_rows in self._fates.items():
            self._chooser.drafted(exit_layer, drafter, of_rows)
        self._fates.clear()

    def _seen(self, shares: Sequence[Share], result: Result) -> dict[int, list[Seen]]:
        """What a survey found, of rows that might have drafted."""
        is_asked = [
            share.num_fed == 1 and bool(chosen) and share.sequence.request.drafter in _BY_EARLY_EXIT
            for share, chosen in zip(shares, result.chosen, strict=True)
        ]
        is_sampled = [share.is_sampled for share in shares]
        unknown: list[list[int | None]] = [[None] * len(shares)] * len(self.surveyed)
        graded = zip(self.surveyed, result.agreed, result.surveyed_grades or unknown, strict=True)
        return {
            layer: list(compress(map(Seen, agreed, grades, is_sampled), is_asked))
            for layer, agreed, grades in graded
        }

    def host_took(self, shares: Sequence[Share], host_s: float) -> None:
        """Tell the chooser what a step took beside drafting and verifying."""
        # With part of a prompt it takes longer.
        if all(share.num_fed == 1 for share in shares):
            num_drafts = sum(share.num_drafts for share in shares)
            self._chooser.host_took(len(shares), host_s, num_drafts=num_drafts)

    def _wishes(self, drafting: Sequence[Share], *, can_stop: bool) -> Iterator[tuple[int, _Wish]]:
        """What each row would draft by early exit if there were no end of budget and blocks, by sequence id."""
        exiting = [share for share in drafting if share.sequence.request.drafter in _BY_EARLY_EXIT]
        groups = list(self._groups(exiting))
        # Rows that leave at several exit layers are drafted for step by step.
        can_stop &= len(groups) == 1
        for among, together in groups:
            choice = self._choose(among, together, num_rows=len(drafting), can_stop=can_stop)
            self.stopping = choice.stopping
            for share, length in zip(together, choice.draft_lengths, strict=True):
                yield share.sequence.request.sequence_id, _Wish(choice.exit_layer, length)
        if len(groups) > 1:
            # One lease would be taken for several choices.
            self._lease = None
        for share in drafting:
            request = share.sequence.request
            if request.drafter not in _BY_EARLY_EXIT:
                yield request.sequence_id, _Wish(request.exit_layer or self._chooser.exit_layer, 0)

    def _groups(self, drafting: Sequence[Share]) -> Iterator[tuple[ExitLayers, Sequence[Share]]]:
        """Rows that draft at one exit layer, and which layers that may be: none where any may."""
        if self._promotes and drafting:
            requests = [share.sequence.request for share in drafting]
            asked = {request.exit_layer for request in requests if request.draft_length != 0}
            yield tuple(sorted(layer for layer in asked if layer is not None)), drafting
            return
        for layer in dict.fromkeys(share.sequence.request.exit_layer for share in drafting):
            together = [share for share in drafting if share.sequence.request.exit_layer == layer]
            yield () if layer is None else (layer,), together

    def _choose(
        self, among: ExitLayers, together: Sequence[Share], *, num_rows: int, can_stop: bool
    ) -> Choice:
        """Draft lengths that requests give stand; the others are chosen together."""
        fixed = [share.sequence.request.draft_length for share in together]
        limits = [share.sequence.num_remaining - 1 for share in together]
        is_open = [length is None for length in fixed]
        chosen: Choice | None = None
        if any(is_open) or (len(among) != 1 and any(fixed)):
            rows = [
                DraftingRow(limit, share.sequence.drafts, share.is_sampled)
                for limit, share in zip(limits, together, strict=True)
            ]
            candidates = [row for row, left_open in zip(rows, is_open, strict=True) if left_open]
            choosing = candidates or rows
            chosen = self.latest = self._chooser.choose(
                choosing, among=among, num_others=num_rows - len(choosing), can_stop=can_stop
            )
            self.surveyed = chosen.surveyed or self.surveyed
            self._lease = chosen.lease
        lengths = iter(chosen.draft_lengths if chosen else ())
        return Choice(
            exit_layer=chosen.exit_layer if chosen else among[0] if among else self._chooser.exit_layer,
            draft_lengths=tuple(
                next(lengths) if length is None else min(length, limit)
                for length, limit in zip(fixed, limits, strict=True)
            ),
            stopping=chosen.stopping if chosen else None,
        )

    def _fulfil(self, share: Share, wish: _Wish, budget: int, *, num_rows: int) -> Share:
        """The share with drafts of the kind its request asks for, as far as budget and blocks allow."""
        sequence, drafter = share.sequence, share.sequence.request.drafter
        looked_up: tuple[int, ...] = ()
        num_matched = sequence.ngrams.num_matched(sequence.token_ids) if sequence.ngrams else 0
        if sequence.ngrams and num_matched:
            length = self._lookup_length(sequence, num_rows, num_matched)
            looked_up = sequence.ngrams.propose(sequence.token_ids, min(length, budget))
        exits_early = not looked_up and drafter in _BY_EARLY_EXIT
        by_model = self._model_length(sequence) if drafter is Drafter.MODEL else 0
        drafting = Share(
            sequence,
            share.num_fed,
            wish.exit_layer,
            draft_length=min(wish.length, budget, sequence.num_remaining - 1) if exits_early else 0,
            model_length=min(by_model, budget),
            looked_up=looked_up,
            num_matched=num_matched,
            may_stop=self.stopping is not None and sequence.request.draft_length is None,
        )
        is_possible = self._extend(sequence, 1 + drafting.num_drafts)
        return drafting if is_possible else Share(sequence, share.num_fed, wish.exit_layer)

    def _model_length(self, sequence: Stream) -> int:
        """As asked, else always the same: what a separate model's steps cost is not measured.

        It is fed the known tokens and all drafts but the last; beyond its own context it does not draft.
        """
        fixed = sequence.request.draft_length
        length = self._model_draft_length if fixed is None else fixed
        room = self._model_context - len(sequence.token_ids)
        return min(length, sequence.num_remaining - 1, room + 1) if room >= 0 else 0

    def _lookup_length(self, sequence: Stream, num_rows: int, num_matched: int) -> int:
        fixed, limit = sequence.request.draft_length, sequence.num_remaining - 1
        if fixed is not None:
            return min(fixed, limit)
        may_exit = sequence.request.drafter in _BY_EARLY_EXIT
        return self._chooser.lookup_length(num_rows, limit, num_matched=num_matched, may_exit=may_exit)
