"""A completion request becomes sequences, and what they decode becomes chunks of text.

Knows requests, choices and text; knows nothing of HTTP. The complete answer is a fold over the very chunks
that a stream sends.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from decoding.messages import SEED_BITS, Generate, sequence_seed
from server.choices import ChoiceProgress, Chunk
from server.drafts import DraftTally
from server.engine_client import Arrival
from server.errors import ApiError
from server.limits import (
    Speculation,
    check_counts,
    resolve_max_tokens,
    resolve_sampling,
    resolve_speculation,
)
from server.openai_types import (
    AnswerMetrics,
    Choice,
    CompletionAnswer,
    CompletionRequest,
    Prompt,
    Usage,
)
from server.served_model import ServedModel


@dataclass(frozen=True, slots=True)
class CompletionPlan:
    """A request that has passed every check: its ids, and one sequence for each choice of each prompt."""

    request: CompletionRequest
    answer_id: str
    created_s: int
    received_s: float
    prompts: Sequence[Sequence[int]]
    sequences: Sequence[Generate]
    speculation: Speculation


async def plan_completion(
    request: CompletionRequest,
    model: ServedModel,
    *,
    answer_id: str,
    clock: Callable[[], float] = time.monotonic,
) -> CompletionPlan:
    """Check a request against the model and tokenise it. Raises ApiError; takes no resource of the worker."""
    received_s = clock()
    model.answer_to(request.model)
    ready = model.client.ready
    check_counts(request, model.settings)
    speculation = resolve_speculation(request, ready.limits)
    prompts = [await model.codec.encode(prompt) for prompt in request.prompt]
    return CompletionPlan(
        request=request,
        answer_id=answer_id,
        created_s=int(time.time()),
        received_s=received_s,
        prompts=prompts,
        sequences=_sequences(request, model, prompts, speculation),
        speculation=speculation,
    )


def _sequences(
    request: CompletionRequest, model: ServedModel, prompts: Sequence[list[int]], speculation: Speculation
) -> list[Generate]:
    ready = model.client.ready
    sampling = resolve_sampling(request, ready.sampling)
    seed = secrets.randbits(SEED_BITS) if request.seed is None else request.seed
    return [
        Generate(
            sequence_id=model.client.next_sequence_id(),
            prompt_ids=prompt_ids,
            max_new_tokens=resolve_max_tokens(
                request, prompt_tokens=len(prompt_ids), context_tokens=ready.limits.max_model_len
            ),
            sampling=sampling,
            seed=sequence_seed(seed, prompt_index=prompt_index, choice_index=choice_index),
            stop_token_ids=[] if request.ignore_eos else ready.text.eos_token_ids,
            exit_layer=speculation.exit_layer,
            draft_length=speculation.draft_length,
        )
        for prompt_index, prompt_ids in enumerate(prompts)
        for choice_index in range(request.num_choices)
    ]


class Completion:
    """A planned request while it runs. Close it when done, however that came about: nothing is left decoding.

    Raises QueueFull and Unavailable when the worker takes no more.
    """

    def __init__(self, plan: CompletionPlan, model: ServedModel) -> None:
        self.plan = plan
        self.model_name = model.name
        self._model = model
        self._drafts = DraftTally()
        self._choices = {
            sequence.sequence_id: self._progress(index, sequence)
            for index, sequence in enumerate(plan.sequences)
        }
        self._max_draft_length = model.client.ready.limits.max_draft_length
        self._is_closed = False
        self._stream = model.client.submit(plan.sequences)
        model.metrics.request_n.observe(plan.request.num_choices)

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        prompt_tokens = sum(map(len, self.plan.prompts))
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
                "exit_layer": self.plan.speculation.exit_layer,
                "exit_layer_used": self._drafts.main_exit_layer,
                "draft_length": self.plan.speculation.draft_length,
            }
        }

    async def chunks(self) -> AsyncIterator[Sequence[Chunk]]:
        """Chunks of all choices as they come, those that came together at once. Raises ApiError midway."""
        if self.plan.request.echo:
            yield [Chunk(choice.index, self._echo(choice.index)) for choice in self._choices.values()]
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

    async def complete(self) -> CompletionAnswer:
        """Wait for every choice and put the answer together."""
        texts = [""] * len(self._choices)
        last: dict[int, Chunk] = {}
        async for chunks in self.chunks():
            for chunk in chunks:
                texts[chunk.choice_index] += chunk.text
                last[chunk.choice_index] = chunk
        return self._answer([_choice(text, last[index]) for index, text in enumerate(texts)])

    def _answer(self, choices: list[Choice]) -> CompletionAnswer:
        return {
            "id": self.plan.answer_id,
            "object": "text_completion",
            "created": self.plan.created_s,
            "model": self.model_name,
            "choices": choices,
            "usage": self.usage,
            "metrics": self.metrics,
            "system_fingerprint": None,
        }

    @property
    def _num_cached_tokens(self) -> int:
        return sum(choice.num_cached_tokens for choice in self._choices.values() if self._is_first(choice))

    def _is_first(self, choice: ChoiceProgress) -> bool:
        """Whether this is the choice that a prompt is counted with."""
        return choice.index % self.plan.request.num_choices == 0

    def _progress(self, index: int, sequence: Generate) -> ChoiceProgress:
        text = self._model.codec.text_stream(
            prompt_ids=sequence.prompt_ids, stop_strings=self.plan.request.stop_strings
        )
        return ChoiceProgress(index, sequence, text, received_s=self.plan.received_s)

    def _echo(self, choice_index: int) -> str:
        prompt: Prompt = self.plan.request.prompt[choice_index // self.plan.request.num_choices]
        return prompt if isinstance(prompt, str) else self._model.codec.decode(prompt)

    def _take(self, arrival: Arrival) -> Chunk | None:
        """The chunk of an event; None if it came together with the one that completed a stop string."""
        decoded = arrival.decoded
        choice = self._choices[decoded.sequence_id]
        if choice.finish_reason is not None:
            self._model.metrics.discarded(len(decoded.token_ids))
            return None
        if not choice.has_begun and self._is_first(choice):
            self._model.metrics.prompt_tokens.inc(len(choice.sequence.prompt_ids))
        self._drafts.record(exit_layer=decoded.exit_layer, drafted=decoded.drafted, kept=decoded.kept)
        chunk = choice.take(arrival, self._model.metrics)
        if chunk.stop_reason is not None:
            self._stream.end(decoded.sequence_id)
        return chunk

    def _end(self, reason: str) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._model.metrics.discarded(self._stream.close())
        for choice in self._choices.values():
            if choice.finish_reason is None:
                self._model.metrics.finished(reason)
                self._model.metrics.aborted.inc(reason == "abort")


def _choice(text: str, last: Chunk) -> Choice:
    return {
        "index": last.choice_index,
        "text": text,
        "logprobs": None,
        "finish_reason": last.finish_reason,
        "stop_reason": last.stop_reason,
    }
