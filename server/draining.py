"""The gate that closes when the server is told to end: what is under way goes on, nothing new begins.

Knows ASGI messages; knows nothing of signals, nor of what is served.
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import Draining, Refusal

# Work comes by this method; everything else only looks.
_WORK = "POST"


class DrainGate:
    """Counts work under way. Once `is_draining`, `refuse` answers new work and no connection is kept."""

    def __init__(self, app: ASGIApp, *, is_draining: Callable[[], bool], refuse: Refusal) -> None:
        self._app = app
        self._is_draining = is_draining
        self._refuse = refuse
        self.num_under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; other scopes pass unchanged."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        closing = self._closing(send)
        if scope["method"] != _WORK:
            await self._app(scope, receive, closing)
        elif self._is_draining():
            await self._refuse(Draining(), scope)(scope, receive, closing)
        else:
            await self._work(scope, receive, closing)

    async def _work(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.num_under_way += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self.num_under_way -= 1

    def _closing(self, send: Send) -> Send:
        """A send that tells the client to come back elsewhere, if the server drains by then."""

        async def send_closing(message: Message) -> None:
            if message["type"] == "http.response.start" and self._is_draining():
                headers = MutableHeaders(raw=list(message["headers"]))
                headers["connection"] = "close"
                message = {**message, "headers": headers.raw}
            await send(message)

        return send_closing
