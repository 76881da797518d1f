"""The outermost layer: gives every request an id and a log line, drops clients that stop reading, shapes the
body limit's answer.

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
from dataclasses import dataclass
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import error_body
from server.request_log import log_request

_log = logging.getLogger("layerskip.access")

REQUEST_ID: Final = "layerskip.request_id"
# In the state of a scope: its Connection, if the server below knows how to cut one off.
CONNECTION: Final = "layerskip.connection"
_ACCEPTABLE_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,128}", re.ASCII)
# Of a body that is refused for its size, as much is read, and for as long, so that its client sees the answer.
_MAX_REFUSED_BYTES: Final = 32 * 1024 * 1024
_REFUSED_BODY_S: Final = 5.0
_REFUSED_SILENCE_S: Final = 0.5


@dataclass(slots=True)
class Connection:
    """What carries a request. `cut_off` ends it without waiting for its client to read what was sent.

    `has_timed_out` says that it was, or that it ended by itself because nothing was read.
    """

    cut_off: Callable[[], None]
    has_timed_out: bool = False


class Edge:
    """Wraps an application. `count` is told of bodies refused for their size and of clients that were dropped."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_body_bytes: int,
        slow_reader_timeout_s: float,
        count: Callable[[str, Scope], None],
    ) -> None:
        self._app = app
        self._slow_reader_timeout_s = slow_reader_timeout_s
        self._count = count
        message = f"the body is larger than the {max_body_bytes} bytes allowed"
        self._too_large = json.dumps(
            error_body(message, kind="invalid_request_error", code="body_too_large")
        ).encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection's request; other scopes pass unchanged."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        reader = _Reader(scope, send, timeout_s=self._slow_reader_timeout_s)
        exchange = _Exchange(scope, receive, reader.send, too_large=self._too_large)
        try:
            await self._app(scope, receive, exchange.send)
        except Exception:
            if not exchange.status:
                raise
            # The client has its answer, a plain 500; the cause belongs in the log, once, under the id.
            _log.exception("request %s failed", exchange.request_id)
        finally:
            exchange.log(remark="slow_reader" if reader.has_stopped else None)
        if reader.has_stopped:
            self._count("slow_reader", scope)
        if exchange.status == 413:
            self._count("too_large", scope)


class _Reader:
    """The client as one who takes what is sent, and is dropped if that lasts too long."""

    def __init__(self, scope: Scope, send: Send, *, timeout_s: float) -> None:
        self._connection: Connection | None = scope.get("state", {}).get(CONNECTION)
        self._send = send
        self._timeout_s = timeout_s

    @property
    def has_stopped(self) -> bool:
        """Whether it took nothing for too long."""
        return self._connection is not None and self._connection.has_timed_out

    async def send(self, message: Message) -> None:
        """Pass a message on. Nothing fails if the client is dropped: the application sees it leave, as always."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._send(message)
        except TimeoutError:
            if self._connection is None:
                raise
            self._connection.has_timed_out = True
            self._connection.cut_off()


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

    def log(self, *, remark: str | None) -> None:
        """Write the request's line."""
        total_ms = 1000 * (time.perf_counter() - self._started_s)
        log_request(
            self._scope, request_id=self.request_id, status=self.status, total_ms=total_ms, remark=remark
        )

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
