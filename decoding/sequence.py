"""One stream of tokens in decoding: what is known of it and how much of that is computed.

Knows token ids and block ids. Only the scheduler changes a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from decoding.acceptance_record import RowRecord
from decoding.blocks import PrefixHit, salted_root
from decoding.edits import Editor, Tally
from decoding.lookup import NgramSearch
from decoding.messages import Drafter, FinishReason, Generate, TokenLogprob


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens known (prompt and committed ones) and how many of them have keys and values in every layer.

    Between steps a sequence that has started decoding has exactly one token pending: the last committed. `place`
    counts the sequences that came before it. `chain` and `num_published` say how far its blocks are in the prefix
    cache, `found` what was there of its tokens at the last look. `prompt_logprobs` gathers, chunk by chunk, what
    the request asked for; the first event takes them along. `ngrams` is there where drafts are looked up. `drafts`
    says how they have fared. `num_followed` counts the computed tokens that a separate draft model has computed
    too; all of them where there is none. One that `wants_only_tokens` edits no logits and reports nothing else.
    """

    request: Generate
    arrived_s: float
    place: int
    editor: Editor | None = None
    token_ids: list[int] = field(init=False)
    tally: Tally | None = None
    num_computed: int = 0
    num_followed: int = 0
    block_ids: list[int] = field(default_factory=list)
    root: int = field(init=False)
    chain: int = field(init=False)
    found: PrefixHit = field(default_factory=PrefixHit)
    num_published: int = 0
    queued_s: float | None = None
    num_cached_tokens: int = 0
    is_announced: bool = False
    ngrams: NgramSearch | None = None
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    drafts: RowRecord = field(default_factory=RowRecord)
    wants_only_tokens: bool = field(init=False)

    def __post_init__(self) -> None:
        self.root = self.chain = salted_root(self.request.cache_salt)
        self.token_ids = [*self.request.prompt_ids, *self.request.resumed_ids]
        if self.editor is not None and self.editor.penalises:
            self.tally = Tally(self.editor.asked, self.request.prompt_ids, self.request.resumed_ids)
        # Of a sequence that is resumed the first event was sent by another worker.
        self.is_announced = bool(self.request.resumed_ids)
        self.wants_only_tokens = (
            self.editor is None
            and self.request.logprobs is None
            and self.request.prompt_logprobs is None
            and not self.request.traces_drafts
        )
        if self.request.drafter in (Drafter.LOOKUP, Drafter.HYBRID):
            self.ngrams = NgramSearch()

    @property
    def rank(self) -> tuple[int, int]:
        """The lower, the earlier it is admitted and the later it gives way."""
        return self.request.priority, self.place

    @property
    def num_pending(self) -> int:
        """Known tokens that are not computed."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_new(self) -> int:
        """Tokens committed after the prompt."""
        return len(self.token_ids) - len(self.request.prompt_ids)

    @property
    def is_prompt_scored(self) -> bool:
        """Whether no log-probability of a prompt token is wanting."""
        wants = self.request.prompt_logprobs is not None
        return not wants or len(self.prompt_logprobs) >= len(self.request.prompt_ids) - 1

    @property
    def num_remaining(self) -> int:
        """Tokens the sequence may still get."""
        return self.request.max_new_tokens - self.num_new

    def append(self, chosen: tuple[int, ...]) -> tuple[list[int], FinishReason | None]:
        """Commit chosen tokens up to the one that ends the sequence, if one does."""
        if self.num_remaining <= 0:
            return [], FinishReason.LENGTH
        for count, token_id in enumerate(chosen, start=1):
            self.token_ids.append(token_id)
            if self.tally is not None:
                self.tally.add(token_id)
            reason = self._ending()
            if reason is not None:
                return list(chosen[:count]), reason
        return list(chosen), None

    def _ending(self) -> FinishReason | None:
        """Why the last committed token ends the sequence, if it does; a stop token beats the length."""
        if self.num_new and self.token_ids[-1] in self.request.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.num_remaining <= 0 else None

    def forget_computed(self) -> None:
        """Back to nothing computed and no blocks: everything known is to be computed again."""
        self.num_computed = 0
        self.num_followed = 0
        self.block_ids = []
        self.chain = self.root
        self.num_published = 0
