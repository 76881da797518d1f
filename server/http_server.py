"""Runs the application on a socket, and ends in order when told to.

Knows uvicorn and signals; knows nothing of what is served.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from types import FrameType

import uvicorn

from server.app import LayerskipApp
from server.banner import Terminal

# The other parser takes headers of any size and number.
_PARSER = "h11"
_MAX_HEADER_BYTES = 65536
_MAX_CONNECTIONS = 4096
_SHUTDOWN_S = 1


class HttpServer(uvicorn.Server):
    """Serves until a signal, or until the terminal was told that the start failed."""

    def __init__(self, app: LayerskipApp, terminal: Terminal) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=_PARSER,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                limit_concurrency=_MAX_CONNECTIONS,
                h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
                timeout_graceful_shutdown=_SHUTDOWN_S,
            )
        )
        self._app = app
        self._terminal = terminal
        self._loop: asyncio.AbstractEventLoop | None = None

    def serve_until_signal(self, listener: socket.socket) -> None:
        """Block until the end; a Ctrl-C is an ordinary one."""
        with contextlib.suppress(KeyboardInterrupt):
            self.run(sockets=[listener])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Remember the loop, which a signal must not touch from outside."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        self.should_exit |= self._terminal.has_failed
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Signal handler: end open streams with an error, so that the rest need not wait for them."""
        if self.should_exit:
            # The end is under way and bounded; a second signal would only cut it off with a traceback.
            return
        super().handle_exit(sig, frame)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._app.model.client.refuse_work)
