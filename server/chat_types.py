"""The chat request as OpenAI's clients send it.

Knows what a message may hold; knows nothing of how a template puts messages into words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Final, Self

from pydantic import PlainValidator, WithJsonSchema, model_validator

from server.errors import InvalidRequest
from server.openai_params import Count, Flag, GenerationParams, TopLogprobs, encodable

_ROLES: Final = ("system", "developer", "user", "assistant")
_UNSUPPORTED_IN_MESSAGES: Final = ("audio", "function_call", "tool_calls", "tool_call_id")
_MESSAGES_SCHEMA: Final = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role", "content"],
        "properties": {
            "role": {"enum": list(_ROLES)},
            "name": {"type": ["string", "null"]},
            "content": {
                "anyOf": [
                    {"type": "string"},
                    {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "required": ["type", "text"],
                            "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                        },
                    },
                ]
            },
        },
    },
}


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation."""

    role: str
    content: str
    name: str | None = None


def parse_messages(value: object) -> tuple[ChatMessage, ...]:
    """Messages of JSON; raises ValueError at the first that is none.

    By hand, because pydantic would report an error for each of ten thousand messages.
    """
    if not isinstance(value, list) or not value:
        raise ValueError("must be a list of at least one message")
    return tuple(_message(index, item) for index, item in enumerate(value))


def _message(index: int, item: object) -> ChatMessage:
    if isinstance(item, dict):
        return _message_of(index, item)
    raise ValueError(f"message {index} must be an object with `role` and `content`")


def _message_of(index: int, item: dict[str, object]) -> ChatMessage:
    role, name = item.get("role"), item.get("name")
    if not isinstance(role, str) or role not in _ROLES:
        raise ValueError(f"`role` of message {index} must be one of {', '.join(_ROLES)}")
    if name is not None and not isinstance(name, str):
        raise ValueError(f"`name` of message {index} must be a string")
    if any(item.get(key) for key in _UNSUPPORTED_IN_MESSAGES):
        raise ValueError(f"message {index} has to do with tools or audio, which are not supported")
    return ChatMessage(role, _content(index, item.get("content")), None if name is None else encodable(name))


def _content(index: int, content: object) -> str:
    if isinstance(content, str):
        return encodable(content)
    if isinstance(content, list):
        return "\n".join(_part(index, part) for part in content)
    raise ValueError(f"`content` of message {index} must be a string or a list of text parts")


def _part(index: int, part: object) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise ValueError(
            f'`content` of message {index} may hold only parts of the form {{"type": "text", "text": "…"}}'
        )
    return encodable(part["text"])


Messages = Annotated[
    tuple[ChatMessage, ...], PlainValidator(parse_messages), WithJsonSchema(_MESSAGES_SCHEMA)
]


class ChatRequest(GenerationParams):
    """The body of `POST /v1/chat/completions`."""

    prompt_param: ClassVar[str] = "messages"
    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **GenerationParams.unsupported,
        "echo": (False,),
        "prediction": (),
        "reasoning_effort": (),
        "web_search_options": (),
    }

    messages: Messages
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: Flag | None = None
    top_logprobs: TopLogprobs | None = None
    add_generation_prompt: Flag | None = None
    continue_final_message: Flag | None = None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        """Raise InvalidRequest where two parameters contradict each other."""
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("`top_logprobs` needs `logprobs: true`", param="top_logprobs")
        check_turn(self.add_generation_prompt, self.continue_final_message)
        return self

    @property
    def num_prompts(self) -> int:
        """Prompts to continue: the conversation is one."""
        return 1

    @property
    def num_top_logprobs(self) -> int | None:
        """Most probable tokens reported beside each new one; None if no log-probability was asked for."""
        return (self.top_logprobs or 0) if self.logprobs else None


def check_turn(add_generation_prompt: bool | None, continue_final_message: bool | None) -> None:
    """Raise InvalidRequest if an answer should both begin a turn and continue the last one."""
    if add_generation_prompt and continue_final_message:
        raise InvalidRequest(
            "`continue_final_message` and `add_generation_prompt` exclude each other",
            param="continue_final_message",
        )
