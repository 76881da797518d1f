"""A generation as server-sent events.

Knows what an event carries and what ends a stream; knows nothing of sequences, or of how a choice is written.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import Final

from fastapi.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from server.choices import Chunk
from server.errors import ApiError, error_body
from server.generation import Generation

_DONE: Final = "data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """Streams a generation and closes it, whether the client stays, leaves or stops reading."""

    def __init__(self, generation: Generation) -> None:
        super().__init__(
            _frames(generation),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the response. Its status waits for its first event: until then it may still be refused."""
        start: Message = {}

        async def send_begun(message: Message) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
                return
            if start:
                await send({**start})
                start.clear()
            await send(message)

        try:
            await super().__call__(scope, receive, send_begun)
        finally:
            self._generation.close()


async def _frames(generation: Generation) -> AsyncIterator[str]:
    encode = ChunkEncoder(generation)
    unsent, has_begun = encode.opening(), False
    try:
        async for chunks in generation.chunks():
            if frames := unsent + encode.chunks(chunks):
                unsent, has_begun = "", True
                yield frames
    except ApiError as error:
        if not has_begun:
            raise
        yield _event(error.body)
        return
    except Exception:
        if not has_begun:
            raise
        # The status is sent; the client can only be told in the stream, and of nothing inside.
        yield _event(error_body("internal error", kind="server_error", code="internal_error"))
        raise
    yield unsent + encode.usage() + _DONE


class ChunkEncoder:
    """Writes the events of one generation."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._form = generation.plan.form
        head = _json(generation.head(self._form.part_kind))
        # Runs for every run of tokens of every stream: what does not change is written once.
        self._prefix = f"data: {head[:-1]},"
        self._includes_usage = generation.plan.request.includes_usage
        self._has_continuous_usage = generation.plan.request.has_continuous_usage

    def opening(self) -> str:
        """The events a stream begins with."""
        return "".join(self._event(_json(body)[1:-1]) for body in self._form.opening())

    def chunks(self, chunks: Sequence[Chunk]) -> str:
        """Events of chunks that say something, one choice in each."""
        choices = (self._form.part(chunk) for chunk in chunks)
        return "".join(
            self._event(f'"choices":[{_json(choice)}]') for choice in choices if choice is not None
        )

    def usage(self) -> str:
        """The last event, without choices, if the client asked for usage; else nothing."""
        if not self._includes_usage:
            return ""
        last = {"choices": [], "usage": self._generation.usage, "metrics": self._generation.metrics}
        return f"{self._prefix}{_json(last)[1:]}\n\n"

    def _event(self, members: str) -> str:
        return f"{self._prefix}{members}{self._tail()}}}\n\n"

    def _tail(self) -> str:
        if self._has_continuous_usage:
            return f',"usage":{_json(self._generation.usage)}'
        return ',"usage":null' if self._includes_usage else ""


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _event(body: object) -> str:
    return f"data: {_json(body)}\n\n"
