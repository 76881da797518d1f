"""The outermost layer: gives every request an id, writes the access log, shapes the body limit's answer.

Knows ASGI messages; knows nothing of routes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import time
import uuid
from collections.abc import Callable
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import error_body

_log = logging.getLogger("layerskip.access")

REQUEST_ID: Final = "layerskip.request_id"
_ACCEPTABLE_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,128}", re.ASCII)
# Of a body that is refused for its size, as much is read, and for as long, so that its client sees the answer.
_MAX_REFUSED_BYTES: Final = 32 * 1024 * 1024
_REFUSED_BODY_S: Final = 5.0
_REFUSED_SILENCE_S: Final = 0.5
_UNLOGGED: Final = ("/health", "/metrics")


class Edge:
    """Wraps an application. `on_too_large` is called when a body was refused for its size."""

    def __init__(self, app: ASGIApp, *, max_body_bytes: int, on_too_large: Callable[[], None]) -> None:
        self._app = app
        self._on_too_large = on_too_large
        message = f"the body is larger than the {max_body_bytes} bytes allowed"
        self._too_large = json.dumps(
            error_body(message, kind="invalid_request_error", code="body_too_large")
        ).encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection's request; other scopes pass unchanged."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send, too_large=self._too_large)
        try:
            await self._app(scope, receive, exchange.send)
        except Exception:
            if not exchange.status:
                raise
            # The client has its answer, a plain 500; the cause belongs in the log, once, under the id.
            _log.exception("request %s failed", exchange.request_id)
        finally:
            exchange.log()
        if exchange.status == 413:
            self._on_too_large()


class _Exchange:
    """One request and its answer on the way out."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, *, too_large: bytes) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._too_large = too_large
        self._started_s = time.perf_counter()
        self.status = 0
        asked = Headers(scope=scope).get("x-request-id", "")
        self.request_id = asked if _ACCEPTABLE_ID.fullmatch(asked) else uuid.uuid4().hex
        scope[REQUEST_ID] = self.request_id

    async def send(self, message: Message) -> None:
        """Pass a message on, with the id among the headers and a 413 in the shape of every other error."""
        if message["type"] == "http.response.start":
            self._start(message)
            if self.status == 413:
                await self._read_to_the_end()
        elif self.status == 413:
            message = {**message, "body": self._too_large if not message.get("more_body") else b""}
        await self._send(message)

    async def _read_to_the_end(self) -> None:
        """Take the rest of a body that is refused: closing on it would reset the connection, answer and all."""
        num_bytes = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_REFUSED_BODY_S):
                while num_bytes < _MAX_REFUSED_BYTES:
                    message = await asyncio.wait_for(self._receive(), _REFUSED_SILENCE_S)
                    num_bytes += len(message.get("body", b""))
                    if not message.get("more_body"):
                        return

    def log(self) -> None:
        """Write the access line: no query, no body."""
        path = self._scope.get("raw_path", b"").decode("ascii", "backslashreplace").partition("?")[0]
        if not path.startswith(_UNLOGGED):
            elapsed_ms = 1000 * (time.perf_counter() - self._started_s)
            method = self._scope["method"]
            _log.info("%s %s %d %.1f ms id=%s", method, path, self.status, elapsed_ms, self.request_id)

    def _start(self, message: Message) -> None:
        self.status = message["status"]
        headers = MutableHeaders(raw=list(message["headers"]))
        headers["x-request-id"] = self.request_id
        if self.status == 413:
            headers["content-type"] = "application/json"
            headers["content-length"] = str(len(self._too_large))
            # Not all of the body may have been read, so nothing else can follow on this connection.
            headers["connection"] = "close"
        message["headers"] = headers.raw
