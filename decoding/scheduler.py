"""Decides what each step computes, and applies what it gave: continuous batching over one block pool.

Knows sequences, tokens and blocks; knows no tensors of the model. It alone changes a Sequence.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Final

import torch

from decoding.blocks import BlockPool, PrefixHit, num_publishable
from decoding.choice import DraftChooser
from decoding.messages import Decoded, Generate, Load
from decoding.pacing import PromptPacer
from decoding.plan import Plan, Reported, Result
from decoding.planning import Plans, Share, StepLimits, as_made
from decoding.sequence import Sequence
from decoding.speculation import Speculator

_RANK: Final = attrgetter("rank")


class Scheduler:
    """Lowest priority first, then first come, first served. A step is `plan`, run, `commit`; `submit` and `abort`
    come in between.

    A sequence has tokens known and tokens computed, and a step gives it some of the difference: prefill,
    its chunks, prefix hits, decoding and recomputation after preemption are all this one rule.
    """

    def __init__(
        self,
        pool: BlockPool,
        limits: StepLimits,
        chooser: DraftChooser,
        *,
        device: torch.device,
        clock: Callable[[], float],
    ) -> None:
        self._pool = pool
        self._speculator = Speculator(
            chooser,
            extend=self._extend,
            promotes=limits.promotes,
            model_draft_length=limits.model_draft_length or 0,
            model_context=limits.model_context,
        )
        self._limits = limits
        self._pacer = PromptPacer()
        self._plans = Plans(device, follows=limits.has_draft_model)
        self._clock = clock
        # Those that wait stand in the order of their ranks, those that run in that of their admission.
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._planned: list[Share] = []
        self._committed: list[Share] = []
        self._num_submitted = 0
        self._knows_priorities = False
        self._num_preemptions = 0
        self._num_queried_tokens = 0
        self._num_hit_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether anything runs or waits."""
        return bool(self._waiting or self._running)

    @property
    def running_ids(self) -> list[int] | None:
        """Sequences in the batch; None as long as no priority but 0 was asked for: then they are the oldest."""
        return [s.request.sequence_id for s in self._running] if self._knows_priorities else None

    def submit(self, request: Generate) -> None:
        """Queue a request. Its prompt and new tokens together must fit the pool; the caller has checked."""
        self._num_submitted += 1
        self._knows_priorities |= request.priority != 0
        editor = self._plans.editor(request)
        insort(self._waiting, Sequence(request, self._clock(), self._num_submitted, editor), key=_RANK)

    def abort(self, sequence_ids: Iterable[int]) -> None:
        """Drop these sequences and free their blocks at once; unknown ids are ignored.

        Between plan and commit too: what the step computed for them is dropped with them.
        """
        dropped = set(sequence_ids)
        for sequence in [s for s in self._running if s.request.sequence_id in dropped]:
            self._retire(sequence)
        self._waiting = [s for s in self._waiting if s.request.sequence_id not in dropped]

    def plan(self, most_tokens: int | None = None) -> Plan | None:
        """The next step, or None if there is nothing to do. A `commit` follows, or another plan in its place."""
        num_preemptions, most = self._num_preemptions, most_tokens or self._limits.max_num_batched_tokens
        paced = self._paced_budget(most)
        shares = self._fund_running(paced)
        budget = paced - sum(share.num_fed for share in shares)
        # Blocks that were taken from a running sequence are not for newcomers.
        while budget > 0 and self._num_preemptions == num_preemptions:
            hit = self._admissible()
            if hit is None:
                break
            share = self._fund(self._admit(hit), budget)
            assert share is not None
            shares.append(share)
            budget -= share.num_fed
        num_fed = sum(share.num_fed for share in shares)
        shares = self._speculator.add_drafts(shares, max(0, most - num_fed))
        # Rows that are alike side by side are drafted and attended together; else their order stays.
        shares.sort(key=lambda s: (-s.draft_length, s.length_class, len(s.sequence.token_ids).bit_length()))
        self._planned = shares
        return (
            self._plans.of(shares, self._speculator.surveyed, self._speculator.stopping) if shares else None
        )

    def commit(self, result: Result) -> list[Decoded]:
        """Apply the planned step's result; one event for each row that has chosen tokens."""
        events, self._planned = [], as_made(self._planned, result)
        self._speculator.learn(self._planned, result)
        fed, drafts = [s.num_fed for s in self._planned], any(s.num_drafts for s in self._planned)
        self._pacer.observe(fed, result.draft_s + result.verify_s, drafts=drafts)
        for share, chosen, reported in zip(self._planned, result.chosen, result.reported, strict=True):
            if share.sequence.block_ids:
                events += self._commit_row(share, chosen, reported or Reported())
        self._committed, self._planned = self._planned, []
        return events

    def host_took(self, host_s: float) -> None:
        """Learn what the step just committed took beside drafting and verifying."""
        self._speculator.host_took(self._committed, host_s)

    def load(self) -> Load:
        """How full the batch, the queue and the pool are."""
        return Load(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_used_blocks=self._pool.num_used,
            num_free_blocks=self._pool.num_free,
            num_preemptions_total=self._num_preemptions,
            prefix_cache_queried_tokens_total=self._num_queried_tokens,
            prefix_cache_hit_tokens_total=self._num_hit_tokens,
            chosen_exit_layer=self._speculator.latest.exit_layer,
            chosen_draft_length=self._speculator.latest.mean_draft_length,
            is_drafting_worthwhile=self._speculator.pays,
        )

    def check_integrity(self) -> None:
        """Assert that running sequences own exactly the blocks that are not free. For tests and idle moments."""
        self._pool.check_integrity(s.block_ids for s in self._running)
        assert not any(s.block_ids for s in self._waiting)

    def _paced_budget(self, most: int) -> int:
        """Tokens that may be fed in the next step: of prompts no more than rows that decode can wait for."""
        decoding = sum(s.num_pending == 1 for s in self._running)
        beginning = len(self._running) - decoding + len(self._waiting)
        most -= decoding
        paced = self._pacer.num_prompt_tokens(num_decoding=decoding, num_beginning=beginning, most=most)
        return max(len(self._running), decoding + paced)

    def _fund_running(self, budget: int) -> list[Share]:
        """Shares of the running sequences: decoding rows first, so that a long prompt fills what they leave.

        Every row gets at least one token, which is why the budget is never below the number of rows.
        """
        order = sorted(self._running, key=lambda s: (s.num_pending > 1, s.rank))
        shares: list[Share] = []
        for num_served, sequence in enumerate(order, start=1):
            share = self._fund(sequence, budget - (len(order) - num_served))
            if share is not None:
                shares.append(share)
                budget -= share.num_fed
        # A share's sequence may since have been preempted for another's blocks.
        return [share for share in shares if share.sequence.block_ids]

    def _fund(self, sequence: Sequence, budget: int) -> Share | None:
        """Give a running sequence blocks for as much of a step as `budget` ≥ 1 allows; None if it was preempted.

        When blocks run short, those of the sequence that ranks last are taken.
        """
        num_fed = min(sequence.num_pending, budget)
        while sequence in self._running:
            if self._extend(sequence, num_fed):
                return Share(sequence=sequence, num_fed=num_fed)
            self._preempt_last()
        return None

    def _extend(self, sequence: Sequence, num_tokens: int) -> bool:
        """Allocate what `num_tokens` more computed positions need, or nothing and False."""
        num_missing = self._num_blocks(sequence.num_computed + num_tokens) - len(sequence.block_ids)
        if num_missing > self._pool.num_free:
            return False
        if num_missing > 0:
            sequence.block_ids += self._pool.allocate(num_missing)
        return True

    def _preempt_last(self) -> None:
        """Take the blocks of the youngest of those of the highest priority number; it waits and starts again."""
        last = max(self._running, key=_RANK)
        self._retire(last)
        insort(self._waiting, last, key=_RANK)
        self._num_preemptions += 1

    def _admissible(self) -> PrefixHit | None:
        """What the prefix cache holds of the first that waits, if that one can start now."""
        if not self._waiting or len(self._running) >= self._limits.max_num_seqs:
            return None
        first = self._waiting[0]
        known = first.token_ids
        # The last token is always computed: its logits choose the next.
        # So are the tokens whose successors' probabilities are asked for.
        max_tokens = len(known) - 1 if first.is_prompt_scored else 0
        # It may wait for many steps, and its prompt be long.
        first.found = hit = self._pool.find_prefix(
            known, root=first.root, max_tokens=max_tokens, before=first.found
        )
        if self._is_being_computed(first, max_tokens, beyond=len(hit.block_ids)):
            return None
        num_missing = self._num_blocks(len(known)) - len(hit.block_ids)
        return hit if num_missing <= self._pool.num_allocatable_beside(hit) else None

    def _is_being_computed(self, waiting: Sequence, max_tokens: int, *, beyond: int) -> bool:
        """Whether a running prompt will soon publish more blocks of the first `max_tokens` of this one's ids than
        the `beyond` that are there.

        Choices of one prompt come together; the others wait for the first instead of computing it again.
        """
        end = (beyond + 1) * self._pool.block_size
        return end <= max_tokens and any(
            sequence.num_computed < end and sequence.token_ids[:end] == waiting.token_ids[:end]
            for sequence in self._running
            if sequence.num_pending > 1 and sequence.root == waiting.root
        )

    def _admit(self, hit: PrefixHit) -> Sequence:
        """Start the first that waits on the cached start of it."""
        sequence = self._waiting.pop(0)
        sequence.block_ids = self._pool.acquire(hit)
        sequence.chain = hit.chain(sequence.root)
        sequence.num_published = len(hit.block_ids)
        sequence.num_computed = sequence.num_followed = len(hit.block_ids) * self._pool.block_size
        if sequence.queued_s is None:
            sequence.queued_s = self._clock() - sequence.arrived_s
            sequence.num_cached_tokens = sequence.num_computed
            self._num_queried_tokens += len(sequence.token_ids)
            self._num_hit_tokens += sequence.num_computed
        self._running.append(sequence)
        return sequence

    def _commit_row(self, share: Share, chosen: tuple[int, ...], reported: Reported) -> list[Decoded]:
        sequence = share.sequence
        sequence.prompt_logprobs += reported.prompt_logprobs
        followed = sequence.num_computed + share.num_followed
        if not chosen:
            sequence.num_computed += share.num_fed
            self._publish(sequence, followed)
            return []
        emitted, reason = sequence.append(chosen)
        # All known tokens but the newest were fed or drafted, and so computed.
        sequence.num_computed = len(sequence.token_ids) - 1
        self._publish(sequence, followed)
        request, is_later = sequence.request, sequence.is_announced
        event = Decoded(
            sequence_id=request.sequence_id,
            token_ids=emitted,
            drafted=share.num_drafts,
            kept=min(len(chosen) - 1, len(emitted)),
            exit_layer=share.exit_layer,
            drafter=share.drafter,
            finish_reason=reason,
            queued_s=None if is_later else sequence.queued_s,
            num_cached_tokens=None if is_later else sequence.num_cached_tokens,
            logprobs=None if request.logprobs is None else list(reported.logprobs[: len(emitted)]),
            prompt_logprobs=None if is_later or request.prompt_logprobs is None else sequence.prompt_logprobs,
            drafted_ids=list(reported.drafted_ids) if request.traces_drafts else None,
        )
        sequence.is_announced = True
        if reason is not None:
            self._retire(sequence)
        return [event]

    def _publish(self, sequence: Sequence, followed: int) -> None:
        """Share full blocks that are computed, by a draft model too, which has computed `followed` positions."""
        size, computed = self._pool.block_size, sequence.num_computed
        sequence.num_followed = min(computed, followed) if self._limits.has_draft_model else computed
        full = num_publishable(num_computed=sequence.num_followed, block_size=size)
        for index in range(sequence.num_published, full):
            sequence.chain = self._pool.publish(
                sequence.block_ids[index],
                chain=sequence.chain,
                token_ids=sequence.token_ids[index * size : (index + 1) * size],
            )
        sequence.num_published = max(sequence.num_published, full)

    def _retire(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._pool.release(sequence.block_ids)
        sequence.forget_computed()

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._pool.block_size)
