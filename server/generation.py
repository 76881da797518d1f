"""A checked request becomes sequences, and what they decode becomes chunks.

Knows requests, choices and text; knows nothing of HTTP, or of the shape an answer has. A complete answer is a
fold over the very chunks that a stream sends.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from typing import Protocol

from decoding.messages import SEED_BITS, Generate, SamplingParams, sequence_seed
from server.choices import ChoiceProgress, Chunk, TokenStops, joined
from server.drafts import DraftTally
from server.edits import resolve_edits
from server.errors import ApiError
from server.limits import (
    Speculation,
    TokenBudget,
    or_auto,
    resolve_max_tokens,
    resolve_priority,
    resolve_sampling,
)
from server.openai_params import GenerationParams
from server.openai_types import AnswerHead, AnswerMetrics, JsonObject, Usage
from server.request_log import AnswerSummary
from server.served_model import ServedModel
from server.text_stream import StopRules, TextStream
from server.token_stream import Arrival


class AnswerForm(Protocol):
    """How chunks are written: as completions or as chats."""

    whole_kind: str
    part_kind: str

    def opening(self) -> Sequence[JsonObject]:
        """What a stream begins with: bodies of events, without what all events have."""

    def part(self, chunk: Chunk) -> JsonObject | None:
        """A chunk as a choice of a stream; None if it says nothing."""

    def choice(self, whole: Chunk) -> JsonObject:
        """A whole choice."""

    def beside(self, wholes: Sequence[Chunk]) -> JsonObject:
        """What a complete answer has beside its choices."""


@dataclass(frozen=True, slots=True)
class PlannedPrompt:
    """A prompt's ids, and its text if choices begin with it."""

    token_ids: Sequence[int]
    echo: str = ""


@dataclass(frozen=True, slots=True)
class GenerationPlan:
    """A request that has passed every check: its prompts, and one sequence for each choice of each prompt."""

    request: GenerationParams
    prompts: Sequence[PlannedPrompt]
    sequences: Sequence[Generate]
    speculation: Speculation
    form: AnswerForm
    answer_id: str
    received_s: float
    created_s: int = field(default_factory=lambda: int(time.time()))


@dataclass(frozen=True, slots=True)
class SequencePlanner:
    """Makes the sequences of one request for one model.

    `num_prompt_top` asks for log-probabilities of the prompts, each beside those of so many others.
    """

    request: GenerationParams
    model: ServedModel
    budget: TokenBudget
    speculation: Speculation
    num_prompt_top: int | None

    def sequences(self, prompts: Sequence[PlannedPrompt]) -> list[Generate]:
        """One for each choice of each prompt. Raises ApiError; takes no resource of the worker."""
        request, speculation = self.request, self.speculation
        seed = secrets.randbits(SEED_BITS) if request.seed is None else request.seed
        self.model.codec.check_ids(request.stop_token_ids or (), param="stop_token_ids")
        shapes = [self._shape(prompt) for prompt in prompts]
        return [
            Generate(
                sequence_id=self.model.client.next_sequence_id(),
                prompt_ids=list(prompts[prompt_index].token_ids),
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                seed=sequence_seed(seed, prompt_index=prompt_index, choice_index=choice_index),
                stop_token_ids=self._stop_token_ids,
                exit_layer=speculation.exit_layer,
                draft_length=speculation.draft_length,
                drafter=speculation.drafter,
                logprobs=request.num_top_logprobs,
                prompt_logprobs=self.num_prompt_top,
                traces_drafts=bool(request.return_draft_trace),
                priority=resolve_priority(request, self.model.settings),
                cache_salt=request.cache_salt or "",
            )
            for prompt_index, (max_new_tokens, sampling) in enumerate(shapes)
            for choice_index in range(request.num_choices)
        ]

    def _shape(self, prompt: PlannedPrompt) -> tuple[int, SamplingParams]:
        """How long the answer to a prompt may get, and how its tokens are chosen."""
        ready = self.model.client.ready
        max_new_tokens = resolve_max_tokens(
            self.budget, prompt_tokens=len(prompt.token_ids), context_tokens=ready.limits.max_model_len
        )
        edits = resolve_edits(
            self.request,
            self.model.codec,
            stop_token_ids=self._stop_token_ids,
            max_new_tokens=max_new_tokens,
        )
        return max_new_tokens, resolve_sampling(self.request, ready.sampling, edits)

    @property
    def _stop_token_ids(self) -> list[int]:
        own = [] if self.request.ignore_eos else self.model.client.ready.text.eos_token_ids
        return sorted({*own, *(self.request.stop_token_ids or ())})


class Generation:
    """A planned request while it runs. Close it when done, however that came about: nothing is left decoding.

    Raises QueueFull and Unavailable when the worker takes no more.
    """

    def __init__(self, plan: GenerationPlan, model: ServedModel) -> None:
        self.plan = plan
        self._model = model
        self._drafts = DraftTally()
        self._choices = {
            sequence.sequence_id: self._progress(index, sequence)
            for index, sequence in enumerate(plan.sequences)
        }
        self._max_draft_length = model.client.ready.limits.max_draft_length
        self._cut_short_by: str | None = None
        self._stream = model.client.submit(plan.sequences)
        model.metrics.request_n.observe(plan.request.num_choices)

    def head(self, kind: str) -> AnswerHead:
        """What every body of the answer begins with."""
        return {
            "id": self.plan.answer_id,
            "object": kind,
            "created": self.plan.created_s,
            "model": self._model.name,
        }

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        prompt_tokens = sum(len(prompt.token_ids) for prompt in self.plan.prompts)
        completion_tokens = sum(choice.num_tokens for choice in self._choices.values())
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self._num_cached_tokens},
        }

    @property
    def metrics(self) -> AnswerMetrics:
        """How the drafts fared so far, over all choices."""
        num_drafts, num_drafted = self._drafts.num_drafts, self._drafts.num_draft_tokens
        num_kept = self._drafts.num_kept_tokens
        return {
            "speculative_decoding": {
                "mean_acceptance_length": 1 + num_kept / num_drafts if num_drafts else None,
                "draft_acceptance_rate": num_kept / num_drafted if num_drafted else None,
                "acceptance_histogram": self._drafts.kept_histogram(max_draft_length=self._max_draft_length),
                "num_spec_steps": num_drafts,
                "num_accepted_draft_tokens": num_kept,
                "num_draft_tokens": num_drafted,
                "num_spec_tokens": self._max_draft_length,
                "exit_layer": or_auto(self.plan.speculation.exit_layer),
                "exit_layer_used": self._drafts.main_exit_layer,
                "draft_length": or_auto(self.plan.speculation.draft_length),
                "drafts_by_drafter": self._drafts.by_drafter,
            }
        }

    @property
    def summary(self) -> AnswerSummary:
        """What the answer came to so far."""
        reasons = (choice.finish_reason or self._cut_short_by for choice in self._choices.values())
        ttfts_s = [choice.ttft_s for choice in self._choices.values() if choice.ttft_s is not None]
        num_drafted = self._drafts.num_draft_tokens
        return AnswerSummary(
            model=self._model.name,
            prompt_tokens=self.usage["prompt_tokens"],
            completion_tokens=self.usage["completion_tokens"],
            exit_layer=or_auto(self.plan.speculation.exit_layer),
            draft_length=or_auto(self.plan.speculation.draft_length),
            acceptance=self._drafts.num_kept_tokens / num_drafted if num_drafted else None,
            ttft_ms=1000 * min(ttfts_s) if ttfts_s else None,
            finish_reason=",".join(dict.fromkeys(map(str, reasons))),
        )

    async def chunks(self) -> AsyncIterator[Sequence[Chunk]]:
        """Chunks of all choices as they come, those that came together at once. Raises ApiError midway."""
        try:
            while any(choice.finish_reason is None for choice in self._choices.values()):
                chunks = [self._take(arrival) for arrival in await self._stream.next()]
                yield [chunk for chunk in chunks if chunk is not None]
        except ApiError:
            self._end("error")
            raise

    def close(self) -> None:
        """Abort what still runs; it counts as given up by the client. Closing twice does nothing."""
        self._end("abort")

    async def complete(self) -> JsonObject:
        """Wait for every choice and put the answer together."""
        chunks = [chunk async for together in self.chunks() for chunk in together]
        chunks.sort(key=attrgetter("choice_index"))
        wholes = [joined(list(parts)) for _, parts in groupby(chunks, key=attrgetter("choice_index"))]
        form = self.plan.form
        return {
            **self.head(form.whole_kind),
            "choices": [form.choice(whole) for whole in wholes],
            "usage": self.usage,
            "metrics": self.metrics,
            "system_fingerprint": None,
            **form.beside(wholes),
        }

    @property
    def _num_cached_tokens(self) -> int:
        return sum(choice.num_cached_tokens for choice in self._choices.values() if self._is_first(choice))

    def _is_first(self, choice: ChoiceProgress) -> bool:
        """Whether this is the choice that a prompt is counted with."""
        return choice.index % self.plan.request.num_choices == 0

    def _progress(self, index: int, sequence: Generate) -> ChoiceProgress:
        request, prompt = self.plan.request, self.plan.prompts[index // self.plan.request.num_choices]
        keeps_stop = bool(request.include_stop_str_in_output)
        text = TextStream(
            self._model.codec.decoder(skip_special_tokens=request.hides_special_tokens),
            prompt_ids=sequence.prompt_ids,
            stops=StopRules(request.stop_strings, request.min_tokens or 0, keeps_stop),
            begins_at=len(prompt.echo),
        )
        stops = TokenStops(self._asked_stops(), keeps_stop)
        return ChoiceProgress(index, sequence, text, stops=stops, received_s=self.plan.received_s)

    def _asked_stops(self) -> frozenset[int]:
        """Stop tokens of the request's own; an end-of-sequence token is one only where it is ignored as such."""
        asked = frozenset(self.plan.request.stop_token_ids or ())
        is_ignored = self.plan.request.ignore_eos
        return asked if is_ignored else asked - frozenset(self._model.client.ready.text.eos_token_ids)

    def _take(self, arrival: Arrival) -> Chunk | None:
        """The chunk of an event; None if it came together with the one that completed a stop string."""
        decoded = arrival.decoded
        choice = self._choices[decoded.sequence_id]
        if choice.finish_reason is not None:
            self._model.metrics.discarded(len(decoded.token_ids))
            return None
        if not choice.has_begun and self._is_first(choice):
            self._model.metrics.prompt_tokens.inc(len(choice.sequence.prompt_ids))
        self._drafts.record(
            exit_layer=decoded.exit_layer,
            drafted=decoded.drafted,
            kept=decoded.kept,
            drafter=decoded.drafter,
        )
        chunk = choice.take(arrival, self._model.metrics)
        if chunk.finish_reason is not None and decoded.finish_reason is None:
            self._stream.end(decoded.sequence_id)
        return chunk

    def _end(self, reason: str) -> None:
        if self._cut_short_by is not None:
            return
        self._cut_short_by = reason
        self._model.metrics.discarded(self._stream.close())
        for choice in self._choices.values():
            if choice.finish_reason is None:
                self._model.metrics.finished(reason)
                self._model.metrics.aborted.inc(reason == "abort")
