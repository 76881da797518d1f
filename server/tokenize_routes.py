"""`/tokenize` and `/detokenize`: what a text or a conversation is in tokens, and back, in vLLM's shapes.

Knows requests and the tokenizer; nothing here reaches the worker.
"""

from __future__ import annotations

from typing import Annotated, Any, Self

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema, model_validator

from server.answer_types import DetokenizeAnswer, TokenizeAnswer
from server.chat_template import render_messages
from server.chat_types import Messages, check_turn
from server.described import works
from server.errors import InvalidRequest
from server.json_route import FastJsonRoute
from server.openai_params import Flag, TokenIds, encodable, refuse_unsupported
from server.openai_types import JsonObject
from server.request_scope import Choose
from server.served_model import ServedModel

router = APIRouter(route_class=FastJsonRoute)


def _text(value: object) -> str:
    if isinstance(value, str):
        return encodable(value)
    raise ValueError("must be a string")


class TokenizeRequest(BaseModel):
    """The body of `POST /tokenize`: a prompt (`content` is another name of it) or messages."""

    model_config = ConfigDict(extra="ignore", frozen=True, hide_input_in_errors=True)

    model: str | None = Field(default=None, max_length=1024)
    prompt: Annotated[str, PlainValidator(_text), WithJsonSchema({"type": "string"})] | None = None
    messages: Messages | None = None
    add_special_tokens: Flag | None = None
    return_token_strs: Flag | None = None
    add_generation_prompt: Flag | None = None
    continue_final_message: Flag | None = None

    @model_validator(mode="before")
    @classmethod
    def _know_every_name(cls, body: Any) -> Any:  # noqa: ANN401 -- whatever JSON held
        if not isinstance(body, dict):
            return body
        refuse_unsupported(body)
        return body if body.get("prompt") is not None else body | {"prompt": body.get("content")}

    @model_validator(mode="after")
    def _agree(self) -> Self:
        """Raise InvalidRequest unless there is one thing to tokenise."""
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("give either `prompt` or `messages`", param="prompt")
        check_turn(self.add_generation_prompt, self.continue_final_message)
        return self


class DetokenizeRequest(BaseModel):
    """The body of `POST /detokenize`."""

    model_config = ConfigDict(extra="ignore", frozen=True, hide_input_in_errors=True)

    model: str | None = Field(default=None, max_length=1024)
    tokens: TokenIds


@router.post("/tokenize", response_model=None, responses=works(TokenizeAnswer))
async def tokenize(body: TokenizeRequest, choose: Choose) -> JsonObject:
    """Ids of a text, or of the prompt that a conversation makes."""
    model = choose(body.model)
    token_ids = await _token_ids(body, model)
    symbol = model.codec.vocabulary.symbol
    return {
        "count": len(token_ids),
        "max_model_len": model.client.ready.limits.max_model_len,
        "tokens": token_ids,
        "token_strs": [symbol(token_id) for token_id in token_ids] if body.return_token_strs else None,
    }


@router.post("/detokenize", response_model=None, responses=works(DetokenizeAnswer))
async def detokenize(body: DetokenizeRequest, choose: Choose) -> JsonObject:
    """The text of ids, special tokens included."""
    model = choose(body.model)
    model.codec.check_ids(body.tokens, param="tokens")
    return {"prompt": model.codec.decoder(skip_special_tokens=False)(body.tokens)}


async def _token_ids(body: TokenizeRequest, model: ServedModel) -> list[int]:
    codec = model.codec
    if body.prompt is not None:
        return await codec.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
    assert body.messages is not None
    text = await render_messages(
        model.chat_template,
        body.messages,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        limit=codec.prompt_limit(max_new_tokens=0, param="messages"),
    )
    return await codec.encode(text, add_special_tokens=bool(body.add_special_tokens))
