"""What completions and chats have in common of OpenAI's request: sampling, edits, speculation, streaming.

Knows types and ranges that hold for every model; what this model and this operator allow is checked in
`limits` and `edits`. Parameters that others honour and this server does not are refused by name, never ignored.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)

from decoding.messages import Drafter
from server.errors import InvalidRequest, UnsupportedParameter

MAX_LOGPROBS: Final = 20

_ALIASES: Final = {
    "assistant_early_exit": "exit_layer",
    "num_speculative_tokens": "draft_length",
    "num_assistant_tokens": "draft_length",
}
# Each with the values that ask for nothing; null asks for nothing everywhere.
_UNSUPPORTED: Final[dict[str, tuple[object, ...]]] = {
    "audio": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "function_call": ("none",),
    "functions": ([],),
    "grammar": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "json_schema": (),
    "length_penalty": (1,),
    "logprob_token_ids": ([],),
    "modalities": (["text"],),
    "prompt_embeds": (),
    "regex": (),
    "response_format": ({"type": "text"},),
    "spaces_between_special_tokens": (True,),
    "stop_regex": (),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "truncation_side": ("left",),
    "use_beam_search": (False,),
}


def token_ids(value: object) -> list[int]:
    """A list of integers. By hand, because pydantic would report an error for each of a million ids."""
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        raise ValueError("a list of token ids may hold integers only")
    return value


def encodable(text: str) -> str:
    """A text that UTF-8 can hold."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("must be valid Unicode, without lone surrogates") from None
    return text


def _strings(value: object) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) and text for text in value):
        raise ValueError("must be a list of strings, none of them empty")
    return [encodable(text) for text in value]


def _stop_strings(value: object) -> list[str]:
    return _strings([value] if isinstance(value, str) else value)


def _logit_bias(value: object) -> dict[int, float]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError("must be an object of token ids and numbers")
    if not all(re.fullmatch(r"\d{1,10}", key, re.ASCII) for key in value):
        raise ValueError("its names must be token ids")
    if not all(type(bias) in (int, float) and -100 <= bias <= 100 for bias in value.values()):
        raise ValueError("its values must be numbers from -100 to 100")
    return {int(key): float(bias) for key, bias in value.items()}


def _none_if_auto(value: object) -> object:
    if isinstance(value, str) and value != "auto":
        raise ValueError('must be an integer or "auto"')
    return None if value == "auto" else value


# JSON's true is not 1 and "1" is not 1: numbers are taken strictly, NaN and infinity not at all.
Integer = Annotated[int, Field(strict=True)]
Count = Annotated[Integer, Field(ge=1, le=2**31 - 1)]
Flag = Annotated[bool, Field(strict=True)]
TopLogprobs = Annotated[Integer, Field(ge=0, le=MAX_LOGPROBS)]
_Real = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_Penalty = Annotated[_Real, Field(ge=-2, le=2)]
TOKEN_IDS_SCHEMA: Final = {"type": "array", "items": {"type": "integer", "minimum": 0}}
TokenIds = Annotated[list[int], PlainValidator(token_ids), WithJsonSchema(TOKEN_IDS_SCHEMA)]
_SOME_TOKEN_IDS_SCHEMA: Final = {**TOKEN_IDS_SCHEMA, "minItems": 1}
_STRINGS_SCHEMA: Final = {"type": "array", "items": {"type": "string", "minLength": 1}}
_LOGIT_BIAS_SCHEMA: Final = {
    "type": "object",
    "propertyNames": {"pattern": "^[0-9]{1,10}$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
}


def _auto_schema(least: int) -> dict[str, object]:
    """An integer or "auto"; the greatest depends on the model, see `/server_info`."""
    return {"anyOf": [{"type": "integer", "minimum": least}, {"const": "auto"}, {"type": "null"}]}


_Auto = Annotated[Integer | None, BeforeValidator(_none_if_auto)]


class StreamOptions(BaseModel):
    """What a stream carries besides text."""

    model_config = ConfigDict(extra="ignore")

    include_usage: Flag | None = None
    continuous_usage_stats: Flag | None = None


class GenerationParams(BaseModel, ABC):
    """The part of a request's body that completions and chats share. None leaves the choice to the server."""

    model_config = ConfigDict(extra="ignore", frozen=True, hide_input_in_errors=True)

    # Where a text that is too long, or empty, was given.
    prompt_param: ClassVar[str]
    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = _UNSUPPORTED

    model: str | None = Field(default=None, max_length=1024)
    user: str | None = None
    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,128}$")] | None = None
    n: Count | None = None
    best_of: Count | None = None

    temperature: Annotated[_Real, Field(ge=0, le=2)] | None = None
    top_p: Annotated[_Real, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Integer, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[_Real, Field(ge=0, le=1)] | None = None
    seed: Annotated[Integer, Field(ge=-(2**63), le=2**63 - 1)] | None = None

    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    # Beyond these bounds a logit overflows, and nothing sensible was ever asked for.
    repetition_penalty: Annotated[_Real, Field(ge=0.01, le=100)] | None = None
    logit_bias: (
        Annotated[
            dict[int, float],
            PlainValidator(_logit_bias),
            WithJsonSchema(_LOGIT_BIAS_SCHEMA),
        ]
        | None
    ) = None
    bad_words: Annotated[list[str], PlainValidator(_strings), WithJsonSchema(_STRINGS_SCHEMA)] | None = None
    allowed_token_ids: (
        Annotated[list[int], PlainValidator(token_ids), WithJsonSchema(_SOME_TOKEN_IDS_SCHEMA)] | None
    ) = None
    min_tokens: Annotated[Integer, Field(ge=0, le=2**31 - 1)] | None = None

    stop: (
        Annotated[
            list[str],
            PlainValidator(_stop_strings),
            WithJsonSchema({"anyOf": [{"type": "string", "minLength": 1}, _STRINGS_SCHEMA]}),
        ]
        | None
    ) = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: Flag | None = None
    ignore_eos: Flag | None = None

    add_special_tokens: Flag | None = None
    skip_special_tokens: Flag | None = None
    truncate_prompt_tokens: Annotated[Integer, Field(ge=-1, le=2**31 - 1)] | None = None

    prompt_logprobs: TopLogprobs | None = None
    return_token_ids: Flag | None = None
    return_tokens_as_token_ids: Flag | None = None
    return_draft_trace: Flag | None = None

    stream: Flag | None = None
    stream_options: StreamOptions | None = None

    exit_layer: Annotated[_Auto, WithJsonSchema(_auto_schema(1))] = None
    draft_length: Annotated[_Auto, WithJsonSchema(_auto_schema(0))] = None
    drafter: Drafter | None = None

    cache_salt: Annotated[str, Field(min_length=1, max_length=1024), AfterValidator(encodable)] | None = None
    priority: Annotated[Integer, Field(ge=-(2**31), le=2**31 - 1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _know_every_name(cls, body: Any) -> Any:  # noqa: ANN401 -- whatever JSON held
        if not isinstance(body, dict):
            return body
        refuse_unsupported(body, cls.unsupported)
        return _without_aliases(body)

    @property
    @abstractmethod
    def num_prompts(self) -> int:
        """Prompts to continue."""

    @property
    @abstractmethod
    def num_top_logprobs(self) -> int | None:
        """Most probable tokens reported beside each new one; None if no log-probability was asked for."""

    @property
    def num_choices(self) -> int:
        """Choices for each prompt."""
        return 1 if self.n is None else self.n

    @property
    def stop_strings(self) -> list[str]:
        """Strings that end a choice, none by default."""
        return self.stop or []

    @property
    def hides_special_tokens(self) -> bool:
        """Whether special tokens leave no text."""
        return self.skip_special_tokens is not False

    @property
    def reports_tokens(self) -> bool:
        """Whether an answer says something of single tokens."""
        asked = self.return_token_ids or self.return_draft_trace
        return bool(asked) or self.num_top_logprobs is not None

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


def refuse_unsupported(
    body: Mapping[str, object], unsupported: Mapping[str, tuple[object, ...]] = _UNSUPPORTED
) -> None:
    """Raise UnsupportedParameter for the first name that asks for what is not offered."""
    for name, neutral in unsupported.items():
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
