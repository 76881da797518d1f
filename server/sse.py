"""A completion as server-sent events.

Knows OpenAI's chunk format and what ends a stream; knows nothing of sequences. Frames are put together from
fixed strings and one JSON string each, because this runs for every run of tokens of every stream.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Final

from fastapi.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from server.choices import Chunk
from server.completions import Completion
from server.errors import ApiError, error_body

_log = logging.getLogger("layerskip.sse")

_DONE: Final = "data: [DONE]\n\n"
_SEND_TIMEOUT_S: Final = 30.0


class EventStream(StreamingResponse):
    """Streams a completion and closes it, whether the client stays, leaves or stops reading."""

    def __init__(self, completion: Completion) -> None:
        super().__init__(
            _frames(completion),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._completion = completion

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the response; a client that takes nothing for half a minute is dropped."""

        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(_SEND_TIMEOUT_S):
                await send(message)

        try:
            await super().__call__(scope, receive, send_in_time)
        except TimeoutError:
            _log.warning("dropped a client that did not read its stream")
        finally:
            self._completion.close()


async def _frames(completion: Completion) -> AsyncIterator[str]:
    encode = ChunkEncoder(completion)
    try:
        async for chunks in completion.chunks():
            if frames := encode.chunks(chunks):
                yield frames
    except ApiError as error:
        yield _event(error.body)
        return
    except Exception:
        # The status is sent; the client can only be told in the stream, and of nothing inside.
        yield _event(error_body("internal error", kind="server_error", code="internal_error"))
        raise
    yield encode.usage() + _DONE


class ChunkEncoder:
    """Writes the chunks of one completion."""

    def __init__(self, completion: Completion) -> None:
        self._completion = completion
        plan = completion.plan
        self._head = {
            "id": plan.answer_id,
            "object": "text_completion",
            "created": plan.created_s,
            "model": completion.model_name,
        }
        self._prefix = f'data: {_json(self._head)[:-1]},"choices":[{{"index":'
        self._includes_usage = plan.request.includes_usage
        self._has_continuous_usage = plan.request.has_continuous_usage

    def chunks(self, chunks: Sequence[Chunk]) -> str:
        """Frames of chunks that say something, one choice in each."""
        return "".join(self._chunk(chunk) for chunk in chunks if chunk.text or chunk.finish_reason)

    def usage(self) -> str:
        """The last chunk, without choices, if the client asked for usage; else nothing."""
        if not self._includes_usage:
            return ""
        last = {"choices": [], "usage": self._completion.usage, "metrics": self._completion.metrics}
        return _event(self._head | last)

    def _chunk(self, chunk: Chunk) -> str:
        reason = "null" if chunk.finish_reason is None else f'"{chunk.finish_reason}"'
        return (
            f'{self._prefix}{chunk.choice_index},"text":{_json(chunk.text)},"logprobs":null,'
            f'"finish_reason":{reason},"stop_reason":{_json(chunk.stop_reason)}}}]'
            f"{self._tail()}}}\n\n"
        )

    def _tail(self) -> str:
        if self._has_continuous_usage:
            return f',"usage":{_json(self._completion.usage)}'
        return ',"usage":null' if self._includes_usage else ""


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _event(body: object) -> str:
    return f"data: {_json(body)}\n\n"
