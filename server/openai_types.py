"""The completion request as OpenAI's clients send it, and the parts that every answer has.

Knows the forms of a prompt; what completions share with chats stands in `openai_params`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Final

from pydantic import Field, PlainValidator, WithJsonSchema
from typing_extensions import TypedDict

from server.openai_params import (
    TOKEN_IDS_SCHEMA,
    Flag,
    GenerationParams,
    Integer,
    TopLogprobs,
    encodable,
    token_ids,
)

Prompt = str | list[int]

_PROMPT_SCHEMA: Final = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        {**TOKEN_IDS_SCHEMA, "minItems": 1},
        {"type": "array", "items": {**TOKEN_IDS_SCHEMA, "minItems": 1}, "minItems": 1},
    ]
}


def _parse_prompts(value: object) -> tuple[Prompt, ...]:
    """One text, one list of ids, or a list of either, told apart by the first element alone.

    By hand, because a union of four types would report an error for each of a million ids.
    """
    if isinstance(value, str):
        return (encodable(value),)
    if isinstance(value, list) and value:
        if type(value[0]) is int:
            return (token_ids(value),)
        if isinstance(value[0], str) and all(isinstance(text, str) for text in value):
            return tuple(map(encodable, value))
        if isinstance(value[0], list):
            return tuple(map(token_ids, value))
    raise ValueError(
        "must be a string, a list of strings, a list of token ids or a list of lists of token ids"
    )


class CompletionRequest(GenerationParams):
    """The body of `POST /v1/completions`."""

    prompt_param: ClassVar[str] = "prompt"

    prompt: Annotated[tuple[Prompt, ...], PlainValidator(_parse_prompts), WithJsonSchema(_PROMPT_SCHEMA)]
    max_tokens: Annotated[Integer, Field(ge=0, le=2**31 - 1)] | None = None
    logprobs: TopLogprobs | None = None
    echo: Flag | None = None

    @property
    def num_prompts(self) -> int:
        """Prompts to continue."""
        return len(self.prompt)

    @property
    def num_top_logprobs(self) -> int | None:
        """Most probable tokens reported beside each new one; None if no log-probability was asked for."""
        return self.logprobs


class CachedTokens(TypedDict):
    """Prompt tokens whose KV was there already."""

    cached_tokens: int


class Usage(TypedDict):
    """Tokens of one request; a prompt counts once, whatever its number of choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class SpeculativeDecoding(TypedDict):
    """How the drafts of one request fared: vLLM's fields, then ours."""

    mean_acceptance_length: float | None
    draft_acceptance_rate: float | None
    acceptance_histogram: list[int]
    num_spec_steps: int
    num_accepted_draft_tokens: int
    num_draft_tokens: int
    num_spec_tokens: int
    exit_layer: int | str
    exit_layer_used: int | None
    draft_length: int | str
    drafts_by_drafter: Mapping[str, int]


class AnswerMetrics(TypedDict):
    """The `metrics` object of an answer."""

    speculative_decoding: SpeculativeDecoding


class AnswerHead(TypedDict):
    """What a complete answer and every chunk of a stream begin with."""

    id: str
    object: str
    created: int
    model: str


JsonObject = dict[str, object]
