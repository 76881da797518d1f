"""The completion request as OpenAI's clients send it, and the fixed part of its answers.

Knows types and ranges that hold for every model; what this model and this operator allow is checked in
`limits`. Parameters that others honour and this server does not are refused by name, never ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, TypedDict

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)

from server.errors import InvalidRequest, UnsupportedParameter

Prompt = str | list[int]

_ALIASES: Final = {
    "assistant_early_exit": "exit_layer",
    "num_speculative_tokens": "draft_length",
    "num_assistant_tokens": "draft_length",
}
# Each with the values that ask for nothing; null asks for nothing everywhere.
_UNSUPPORTED: Final[dict[str, tuple[object, ...]]] = {
    "add_special_tokens": (True,),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "cache_salt": (),
    "drafter": ("early_exit",),
    "frequency_penalty": (0,),
    "functions": ([],),
    "grammar": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "json_schema": (),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "logprobs": (),
    "min_tokens": (0,),
    "presence_penalty": (0,),
    "priority": (0,),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "regex": (),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stop_regex": (),
    "stop_token_ids": ([],),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}

_PROMPT_SCHEMA: Final = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        {"type": "array", "items": {"type": "integer"}, "minItems": 1},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}, "minItems": 1},
    ]
}


def _parse_prompts(value: object) -> tuple[Prompt, ...]:
    """One text, one list of ids, or a list of either, told apart by the first element alone.

    By hand, because a union of four types would report an error for each of a million ids.
    """
    if isinstance(value, str):
        return (_encodable(value),)
    if isinstance(value, list) and value:
        if type(value[0]) is int:
            return (_token_ids(value),)
        if isinstance(value[0], str) and all(isinstance(text, str) for text in value):
            return tuple(map(_encodable, value))
        if isinstance(value[0], list):
            return tuple(map(_token_ids, value))
    raise ValueError(
        "must be a string, a list of strings, a list of token ids or a list of lists of token ids"
    )


def _token_ids(value: object) -> list[int]:
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        raise ValueError("a list of token ids may hold integers only")
    return value


def _encodable(text: str) -> str:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("must be valid Unicode, without lone surrogates") from None
    return text


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _none_if_auto(value: object) -> object:
    if isinstance(value, str) and value != "auto":
        raise ValueError('must be an integer or "auto"')
    return None if value == "auto" else value


# JSON's true is not 1 and "1" is not 1: numbers are taken strictly, NaN and infinity not at all.
_Integer = Annotated[int, Field(strict=True)]
_Real = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_Flag = Annotated[bool, Field(strict=True)]
_Auto = Annotated[_Integer | None, BeforeValidator(_none_if_auto)]


class StreamOptions(BaseModel):
    """What a stream carries besides text."""

    model_config = ConfigDict(extra="ignore")

    include_usage: _Flag | None = None
    continuous_usage_stats: _Flag | None = None


class CompletionRequest(BaseModel):
    """The body of `POST /v1/completions`. None means that the caller left the choice to the server."""

    model_config = ConfigDict(extra="ignore", frozen=True, hide_input_in_errors=True)

    model: str | None = Field(default=None, max_length=1024)
    prompt: Annotated[tuple[Prompt, ...], PlainValidator(_parse_prompts), WithJsonSchema(_PROMPT_SCHEMA)]
    max_tokens: Annotated[_Integer, Field(ge=1, le=2**31 - 1)] | None = None
    temperature: Annotated[_Real, Field(ge=0, le=2)] | None = None
    top_p: Annotated[_Real, Field(gt=0, le=1)] | None = None
    top_k: Annotated[_Integer, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[_Real, Field(ge=0, le=1)] | None = None
    seed: Annotated[_Integer, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Annotated[list[Annotated[str, Field(min_length=1)]] | None, BeforeValidator(_as_list)] = None
    n: Annotated[_Integer, Field(ge=1, le=2**31 - 1)] | None = None
    best_of: Annotated[_Integer, Field(ge=1, le=2**31 - 1)] | None = None
    echo: _Flag | None = None
    stream: _Flag | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: _Flag | None = None
    exit_layer: _Auto = None
    draft_length: _Auto = None
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _know_every_name(cls, body: Any) -> Any:  # noqa: ANN401 -- whatever JSON held
        if not isinstance(body, dict):
            return body
        _refuse_unsupported(body)
        return _without_aliases(body)

    @property
    def num_choices(self) -> int:
        """Choices for each prompt."""
        return 1 if self.n is None else self.n

    @property
    def stop_strings(self) -> list[str]:
        """Strings that end a choice, none by default."""
        return self.stop or []

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def has_continuous_usage(self) -> bool:
        """Whether every chunk of a stream carries usage."""
        return self.includes_usage and bool(
            self.stream_options and self.stream_options.continuous_usage_stats
        )


def _refuse_unsupported(body: dict[str, object]) -> None:
    for name, neutral in _UNSUPPORTED.items():
        value = body.get(name)
        if value is not None and value not in neutral:
            raise UnsupportedParameter(name)


def _without_aliases(body: dict[str, object]) -> dict[str, object]:
    renamed = {name: value for name, value in body.items() if name not in _ALIASES}
    for alias, name in _ALIASES.items():
        value = body.get(alias)
        if value is None:
            continue
        if renamed.get(name) not in (None, value):
            raise InvalidRequest(f"`{alias}` and `{name}` are the same and differ", param=alias)
        renamed[name] = value
    return renamed


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
    exit_layer: int
    exit_layer_used: int | None
    draft_length: int


class AnswerMetrics(TypedDict):
    """The `metrics` object of an answer."""

    speculative_decoding: SpeculativeDecoding


class Choice(TypedDict):
    """One text of an answer."""

    index: int
    text: str
    logprobs: None
    finish_reason: str | None
    stop_reason: str | int | None


class CompletionAnswer(TypedDict):
    """The body of a complete answer."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    metrics: AnswerMetrics
    system_fingerprint: None
