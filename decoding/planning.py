"""Writes plans: what the scheduler decided for each sequence, as arrays for the cycle.

Knows sequences and shares of a step; decides nothing and changes nothing.
"""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from decoding.choice import ExitLayers
from decoding.confidence import Stopping
from decoding.edits import Edited, Editor
from decoding.logits import Sampling
from decoding.messages import Drafter, Generate
from decoding.pacing import is_long_prompt
from decoding.plan import Following, Plan, PromptScoring, Result, Stops, Wanted
from decoding.ragged import LENGTH_CLASSES
from decoding.sequence import Sequence

_KEPT_ORDERS: Final = 8


@dataclass(frozen=True, slots=True)
class Share:
    """A sequence's part of the next step: known tokens to feed, and drafts on top, looked up or to be made.

    `exit_layer` is where `draft_length` drafts leave the stack, fewer if the row `may_stop`; `model_length` drafts
    are a separate model's; those `looked_up` were found by `num_matched` ids. Once they are made, `grades` tell
    how sure they were, where that is known.
    """

    sequence: Sequence
    num_fed: int
    exit_layer: int = 1
    draft_length: int = 0
    model_length: int = 0
    looked_up: tuple[int, ...] = ()
    num_matched: int = 0
    may_stop: bool = False
    grades: tuple[int, ...] = ()

    @property
    def num_drafts(self) -> int:
        """Drafts of any kind; never of two."""
        return self.draft_length + self.model_length + len(self.looked_up)

    @property
    def length_class(self) -> int:
        """Of the tokens fed, looked-up drafts among them."""
        return bisect_left(LENGTH_CLASSES, self.num_fed + len(self.looked_up))

    @property
    def num_followed(self) -> int:
        """Positions from the first fed one on that a separate draft model has computed after the step.

        It is not fed the last draft that it makes, nor those that others make.
        """
        return self.num_fed + max(0, self.model_length - 1)

    @property
    def is_sampled(self) -> bool:
        """Whether its tokens are drawn."""
        return self.sequence.request.sampling.temperature > 0

    @property
    def is_of_long_prompt(self) -> bool:
        """Whether most of a long prompt is still to come."""
        sequence = self.sequence
        return is_long_prompt(
            self.num_fed,
            num_pending=sequence.num_pending,
            num_uncached=len(sequence.token_ids) - sequence.num_cached_tokens,
        )

    @property
    def is_typical(self) -> bool:
        """Whether it takes the time of a row that only decodes, with drafts by early exit or none."""
        asks_for_more = self.sequence.editor is not None or self.sequence.request.logprobs is not None
        drafts_otherwise = self.looked_up or self.model_length
        return self.num_fed == 1 and not drafts_otherwise and not asks_for_more

    @property
    def drafter(self) -> Drafter:
        """Who made them."""
        if self.draft_length:
            return Drafter.EARLY_EXIT
        if self.model_length:
            return Drafter.MODEL
        return Drafter.LOOKUP if self.looked_up else Drafter.NONE


@dataclass(frozen=True, slots=True)
class StepLimits:
    """What one step may hold: rows, tokens fed or drafted, and unless it `promotes`, several exit layers.

    `model_draft_length` is how much a separate draft model drafts unless asked; None where there is no such model.
    It knows `model_context` positions.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    promotes: bool = False
    model_draft_length: int | None = None
    model_context: int = sys.maxsize

    @property
    def has_draft_model(self) -> bool:
        """Whether a separate draft model follows what is computed."""
        return self.model_draft_length is not None


class Plans:
    """Writes plans for one device, and keeps what consecutive steps of the same rows share.

    With `follows` they say what a separate draft model lacks.
    """

    def __init__(self, device: torch.device, *, follows: bool = False) -> None:
        self._device = device
        self._follows = follows
        self._sampling: OrderedDict[tuple[int, ...], Sampling] = OrderedDict()

    @staticmethod
    def editor(request: Generate) -> Editor | None:
        """The edits of a request, prepared; None where it asks for none."""
        if request.sampling.edits is None:
            return None
        return Editor.of(
            request.sampling.edits,
            num_prompt_tokens=len(request.prompt_ids),
            stop_token_ids=request.stop_token_ids,
        )

    def of(self, shares: list[Share], surveyed: ExitLayers = (), stopping: Stopping | None = None) -> Plan:
        """The plan of these shares, in their order; none drafts if exit layers are `surveyed`.

        A loop over rows on the host: their numbers are Python's.
        """
        sequences = [share.sequence for share in shares]
        fed = [
            [*s.token_ids[s.num_computed : s.num_computed + share.num_fed], *share.looked_up]
            for s, share in zip(sequences, shares, strict=True)
        ]
        width = max(len(s.block_ids) for s in sequences)
        return Plan(
            sequence_ids=tuple(s.request.sequence_id for s in sequences),
            fed_N=np.array([token_id for ids in fed for token_id in ids], dtype=np.int64),
            num_fed_B=np.array(list(map(len, fed)), dtype=np.int64),
            num_looked_up_B=np.array([len(share.looked_up) for share in shares], dtype=np.int64),
            num_computed_B=np.array([s.num_computed for s in sequences], dtype=np.int64),
            draft_lengths_B=np.array([share.draft_length for share in shares], dtype=np.int64),
            exit_layers_B=np.array([share.exit_layer for share in shares], dtype=np.int64),
            model_lengths_B=np.array([share.model_length for share in shares], dtype=np.int64),
            following=_following(shares) if self._follows else None,
            chooses_B=np.array(
                [share.num_fed == s.num_pending for s, share in zip(sequences, shares, strict=True)]
            ),
            blocks_BW=np.array(
                [s.block_ids + [0] * (width - len(s.block_ids)) for s in sequences], dtype=np.int64
            ),
            sampling=self._sampling_of(sequences),
            edited=tuple(map(_edited, sequences)),
            wanted=tuple(map(_wanted, shares)),
            surveyed=surveyed,
            stops=_stops(shares, stopping),
        )

    def _sampling_of(self, sequences: list[Sequence]) -> Sampling:
        """The rows' sampling columns, kept for a while: batches of the same sequences come in few orders."""
        places = tuple(s.place for s in sequences)
        known = self._sampling.pop(places, None)
        if known is None:
            params, seeds = [s.request.sampling for s in sequences], [s.request.seed for s in sequences]
            known = Sampling.of(params, seeds, self._device)
        self._sampling[places] = known
        if len(self._sampling) > _KEPT_ORDERS:
            self._sampling.popitem(last=False)
        return known


def _edited(sequence: Sequence) -> Edited | None:
    if sequence.editor is None:
        return None
    return Edited.of(sequence.editor, sequence.token_ids, sequence.tally)


def as_made(shares: list[Share], result: Result) -> list[Share]:
    """The shares with the drafts that were made by early exit, where some rows stopped before their length."""
    if not result.grades:
        return shares
    # Written out: to replace fields of what is frozen takes several times as long, in every step.
    return [
        Share(
            *(share.sequence, share.num_fed, share.exit_layer, len(grades)),
            may_stop=share.may_stop,
            grades=grades,
        )
        if share.draft_length
        else share
        for share, grades in zip(shares, result.grades, strict=True)
    ]


def _stops(shares: list[Share], stopping: Stopping | None) -> Stops | None:
    if stopping is None:
        return None
    least_B = np.array([stopping.least if share.may_stop else 0.0 for share in shares], dtype=np.float32)
    return Stops(stopping.chances_2G, least_B)


def _following(shares: list[Share]) -> Following:
    lacking = [
        s.token_ids[s.num_followed : s.num_computed + share.num_fed]
        for s, share in ((share.sequence, share) for share in shares)
    ]
    return Following(
        ids_N=np.array([token_id for ids in lacking for token_id in ids], dtype=np.int64),
        counts_B=np.array(list(map(len, lacking)), dtype=np.int64),
        starts_B=np.array([share.sequence.num_followed for share in shares], dtype=np.int64),
    )


def _wanted(share: Share) -> Wanted | None:
    request = share.sequence.request
    if request.logprobs is None and request.prompt_logprobs is None and not request.traces_drafts:
        return None
    return Wanted(num_top=request.logprobs, prompt=_prompt_scoring(share), drafts=request.traces_drafts)


def _prompt_scoring(share: Share) -> PromptScoring | None:
    """The fed prompt tokens whose successors are prompt tokens too and not scored yet."""
    sequence, request = share.sequence, share.sequence.request
    if request.prompt_logprobs is None:
        return None
    start = max(sequence.num_computed, len(sequence.prompt_logprobs))
    end = min(sequence.num_computed + share.num_fed, len(request.prompt_ids) - 1)
    if start >= end:
        return None
    targets = np.array(request.prompt_ids[start + 1 : end + 1], dtype=np.int64)
    return PromptScoring(start - sequence.num_computed, targets, request.prompt_logprobs)
