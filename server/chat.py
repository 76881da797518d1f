"""Chats: what a conversation means, and how chunks are written as OpenAI's chat completions.

Knows messages and the template that makes them a prompt; how that is decoded is in `generation`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from server.chat_template import render_messages
from server.chat_types import ChatRequest
from server.choices import Chunk
from server.generation import GenerationPlan, PlannedPrompt, SequencePlanner
from server.limits import TokenBudget, check_counts, resolve_speculation, resolve_truncation
from server.logprobs import ScoredTokens, TokenWriter
from server.openai_types import JsonObject
from server.served_model import ServedModel
from server.vocabulary import Vocabulary


async def plan_chat(
    request: ChatRequest,
    model: ServedModel,
    *,
    answer_id: str,
    clock: Callable[[], float] = time.monotonic,
) -> GenerationPlan:
    """Check a request against the model, render and tokenise it. Raises ApiError; takes no resource."""
    received_s = clock()
    check_counts(request, model.settings)
    speculation = resolve_speculation(request, model.client.ready.limits)
    budget = _budget(request)
    prompt = await _prompt(request, model, budget)
    planner = SequencePlanner(request, model, budget, speculation, request.prompt_logprobs)
    return GenerationPlan(
        request=request,
        prompts=[prompt],
        sequences=planner.sequences([prompt]),
        speculation=speculation,
        form=ChatForm(request, prompt, model.codec.vocabulary),
        answer_id=answer_id,
        received_s=received_s,
    )


def _budget(request: ChatRequest) -> TokenBudget:
    """All that the context has room for, unless the request says; of its two names the newer one counts."""
    if request.max_completion_tokens is not None:
        return TokenBudget(request.max_completion_tokens, None, "max_completion_tokens")
    return TokenBudget(request.max_tokens, None)


async def _prompt(request: ChatRequest, model: ServedModel, budget: TokenBudget) -> PlannedPrompt:
    codec, context_tokens = model.codec, model.client.ready.limits.max_model_len
    limit = codec.prompt_limit(max_new_tokens=1, param="messages")
    text = await render_messages(
        model.chat_template,
        request.messages,
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
        limit=limit,
    )
    token_ids = await codec.encode_prompt(
        text,
        limit,
        # A template writes the special tokens that its model knows.
        add_special_tokens=bool(request.add_special_tokens),
        keep_last=resolve_truncation(request, budget, context_tokens=context_tokens),
    )
    return PlannedPrompt(token_ids)


class ChatForm:
    """Writes chat completions: messages at once, deltas in a stream."""

    whole_kind = "chat.completion"
    part_kind = "chat.completion.chunk"

    def __init__(self, request: ChatRequest, prompt: PlannedPrompt, vocabulary: Vocabulary) -> None:
        self._request = request
        self._prompt = prompt
        self._write = TokenWriter(vocabulary, as_ids=bool(request.return_tokens_as_token_ids))

    def opening(self) -> Sequence[JsonObject]:
        """Who speaks, for every choice; the first says what the prompt was, if asked."""
        bodies: list[JsonObject] = [
            {"choices": [self._opened(index)]} for index in range(self._request.num_choices)
        ]
        bodies[0] |= self._prompt_token_ids()
        return bodies

    def part(self, chunk: Chunk) -> JsonObject | None:
        """A chunk as a choice of a stream; None if it says nothing."""
        reports = self._request.reports_tokens and chunk.token_ids
        if not (chunk.text or chunk.finish_reason or reports):
            return None
        delta = {"content": chunk.text} if chunk.text else {}
        return self._choice(chunk, "delta", delta)

    def choice(self, whole: Chunk) -> JsonObject:
        """A whole choice."""
        return self._choice(whole, "message", {"role": "assistant", "content": whole.text})

    def beside(self, wholes: Sequence[Chunk]) -> JsonObject:
        """What was asked for of the prompt, which all choices share."""
        fields = self._prompt_token_ids()
        if self._request.prompt_logprobs is not None:
            fields["prompt_logprobs"] = self._write.prompt(
                self._prompt.token_ids, wholes[0].prompt_logprobs, num_top=self._request.prompt_logprobs
            )
        return fields

    def _opened(self, index: int) -> JsonObject:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _prompt_token_ids(self) -> JsonObject:
        if not self._request.return_token_ids:
            return {}
        return {"prompt_token_ids": list(self._prompt.token_ids)}

    def _choice(self, chunk: Chunk, name: str, words: dict[str, str]) -> JsonObject:
        request = self._request
        choice: JsonObject = {
            "index": chunk.choice_index,
            name: words,
            "logprobs": self._logprobs(chunk),
            "finish_reason": chunk.finish_reason,
            "stop_reason": chunk.stop_reason,
        }
        if request.return_token_ids:
            choice["token_ids"] = list(chunk.token_ids)
        if request.return_draft_trace:
            choice["draft_trace"] = self._write.trace(chunk.drafts)
        return choice

    def _logprobs(self, chunk: Chunk) -> JsonObject | None:
        num_top = self._request.num_top_logprobs
        if num_top is None:
            return None
        tokens = ScoredTokens(chunk.token_ids, chunk.text_offsets, chunk.logprobs)
        return self._write.chat(tokens, num_top=num_top)
