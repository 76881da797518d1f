"""Reads JSON bodies with a fast parser, because the event loop stands still meanwhile.

Knows bytes and routes; knows nothing of what is in a body.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute

from server.errors import InvalidRequest


class FastJsonRequest(Request):
    """A request whose `json` accepts what the standard library accepts."""

    async def json(self) -> Any:  # noqa: ANN401 -- whatever JSON held
        """The parsed body. Raises InvalidRequest."""
        body = await self.body()
        try:
            return msgspec.json.decode(body)
        except (msgspec.DecodeError, RecursionError):
            return _lenient(body)


def _lenient(body: bytes) -> Any:  # noqa: ANN401 -- whatever JSON held
    """Parse again with the standard library: NaN is no JSON, but its refusal should name the field."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("the body is not valid JSON") from error


class FastJsonRoute(APIRoute):
    """A route whose requests are FastJsonRequests."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What FastAPI calls for a request."""
        handle = super().get_route_handler()

        async def handle_fast(request: Request) -> Response:
            return await handle(FastJsonRequest(request.scope, request.receive))

        return handle_fast
