"""Completions: what a request's body means, and how chunks are written as OpenAI's text completions.

Knows prompts of text and of ids; how they are decoded is in `generation`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

from server.choices import Chunk
from server.errors import InvalidRequest
from server.generation import GenerationPlan, PlannedPrompt, SequencePlanner
from server.limits import TokenBudget, check_counts, resolve_speculation, resolve_truncation
from server.logprobs import ScoredTokens, TokenWriter, prompt_offsets
from server.openai_types import CompletionRequest, JsonObject, Prompt
from server.served_model import ServedModel
from server.vocabulary import Vocabulary

_DEFAULT_MAX_TOKENS: Final = 16


async def plan_completion(
    request: CompletionRequest,
    model: ServedModel,
    *,
    answer_id: str,
    clock: Callable[[], float] = time.monotonic,
) -> GenerationPlan:
    """Check a request against the model and tokenise it. Raises ApiError; takes no resource of the worker."""
    received_s = clock()
    limits = model.client.ready.limits
    check_counts(request, model.settings)
    if request.max_tokens == 0 and not request.echo:
        raise InvalidRequest("`max_tokens` must be at least 1, or 0 with `echo: true`", param="max_tokens")
    speculation = resolve_speculation(request, limits)
    budget = TokenBudget(asked=request.max_tokens, default=_DEFAULT_MAX_TOKENS)
    prompts = await _prompts(request, model, budget)
    planner = SequencePlanner(request, model, budget, speculation, _num_prompt_top(request))
    return GenerationPlan(
        request=request,
        prompts=prompts,
        sequences=planner.sequences(prompts),
        speculation=speculation,
        form=CompletionForm(request, prompts, model.codec.vocabulary),
        answer_id=answer_id,
        received_s=received_s,
    )


async def _prompts(
    request: CompletionRequest, model: ServedModel, budget: TokenBudget
) -> list[PlannedPrompt]:
    codec, context_tokens = model.codec, model.client.ready.limits.max_model_len
    limit = codec.prompt_limit(max_new_tokens=0 if request.max_tokens == 0 else 1, param="prompt")
    keep_last = resolve_truncation(request, budget, context_tokens=context_tokens)
    add_special_tokens = request.add_special_tokens is not False
    decode = codec.decoder(skip_special_tokens=request.hides_special_tokens)

    async def planned(prompt: Prompt) -> PlannedPrompt:
        token_ids = await codec.encode_prompt(
            prompt, limit, add_special_tokens=add_special_tokens, keep_last=keep_last
        )
        if not request.echo:
            return PlannedPrompt(token_ids)
        is_whole = keep_last is None
        return PlannedPrompt(token_ids, prompt if is_whole and isinstance(prompt, str) else decode(token_ids))

    return [await planned(prompt) for prompt in request.prompt]


def _num_prompt_top(request: CompletionRequest) -> int | None:
    """Most probable tokens to report beside each of a prompt's: for its own sake, or to echo it with the rest."""
    asked = (request.prompt_logprobs, request.logprobs if request.echo else None)
    return max((count for count in asked if count is not None), default=None)


class CompletionForm:
    """Writes text completions; a stream's choices have the same shape as whole ones."""

    whole_kind = part_kind = "text_completion"

    def __init__(
        self, request: CompletionRequest, prompts: Sequence[PlannedPrompt], vocabulary: Vocabulary
    ) -> None:
        self._request = request
        self._prompts = prompts
        self._vocabulary = vocabulary
        self._write = TokenWriter(vocabulary, as_ids=bool(request.return_tokens_as_token_ids))

    def opening(self) -> Sequence[JsonObject]:
        """Nothing: the first text opens the stream."""
        return ()

    def part(self, chunk: Chunk) -> JsonObject | None:
        """A chunk as a choice of a stream; None if it says nothing."""
        reports = self._request.reports_tokens and chunk.token_ids
        shows_prompt = chunk.is_first and (self._request.echo or self._request.return_token_ids)
        says_something = chunk.text or chunk.finish_reason or reports or shows_prompt
        return self.choice(chunk) if says_something else None

    def choice(self, whole: Chunk) -> JsonObject:
        """A whole choice, the prompt in front where it is echoed."""
        prompt = self._prompts[whole.choice_index // self._request.num_choices]
        text = prompt.echo + whole.text if whole.is_first else whole.text
        choice: JsonObject = {
            "index": whole.choice_index,
            "text": text,
            "logprobs": self._logprobs(prompt, whole),
            "finish_reason": whole.finish_reason,
            "stop_reason": whole.stop_reason,
        }
        return choice | self._asked_for(prompt, whole)

    def beside(self, wholes: Sequence[Chunk]) -> JsonObject:
        """Nothing: what was asked for stands in the choices."""
        return {}

    def _logprobs(self, prompt: PlannedPrompt, whole: Chunk) -> JsonObject | None:
        if self._request.logprobs is None:
            return None
        tokens = ScoredTokens(whole.token_ids, whole.text_offsets, whole.logprobs)
        if self._request.echo and whole.is_first:
            tokens = self._prompt_and(tokens, prompt, whole)
        return self._write.completion(tokens, num_top=self._request.logprobs)

    def _prompt_and(self, tokens: ScoredTokens, prompt: PlannedPrompt, whole: Chunk) -> ScoredTokens:
        offsets = prompt_offsets(prompt.token_ids, prompt.echo, self._vocabulary)
        return ScoredTokens(
            [*prompt.token_ids, *tokens.token_ids],
            [*offsets, *tokens.offsets],
            [None, *whole.prompt_logprobs, *tokens.logprobs],
        )

    def _asked_for(self, prompt: PlannedPrompt, whole: Chunk) -> JsonObject:
        """What a choice has only on request."""
        request, fields = self._request, JsonObject()
        if request.return_token_ids:
            fields["token_ids"] = list(whole.token_ids)
            fields["prompt_token_ids"] = list(prompt.token_ids) if whole.is_first else None
        if request.prompt_logprobs is not None:
            fields["prompt_logprobs"] = self._write.prompt(
                prompt.token_ids, whole.prompt_logprobs, num_top=request.prompt_logprobs
            )
        if request.return_draft_trace:
            fields["draft_trace"] = self._write.trace(whole.drafts)
        return fields
