"""Runs the application on a socket, and ends in order when told to.

Knows uvicorn, connections and signals; knows nothing of what is served.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Final

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.app import LayerskipApp
from server.edge import CONNECTION, Connection

_log = logging.getLogger("layerskip.server")

_MAX_HEADER_BYTES: Final = 65536
_MAX_CONNECTIONS: Final = 4096
_SHUTDOWN_S: Final = 1
_SEND_BUFFER_BYTES: Final = 256 * 1024
_NO_LINGERING: Final = struct.pack("ii", 1, 0)


class _HttpConnection(H11Protocol):
    """One connection; the application finds it in the state of its requests.

    h11's parser, because the other one takes headers of any size and number.
    """

    def connection_made(  # type: ignore[override]
        self, transport: asyncio.Transport
    ) -> None:
        """Called by the loop."""

        def cut_off() -> None:
            # Without this the kernel would go on offering what the client does not read.
            carrier = transport.get_extra_info("socket")
            carrier.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGERING)
            transport.abort()

        self._connection = Connection(cut_off)
        self.app_state = {**self.app_state, CONNECTION: self._connection}
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the loop; a timeout is the kernel's, which may notice before the application does."""
        self._connection.has_timed_out |= isinstance(exc, TimeoutError)
        super().connection_lost(exc)


class HttpServer(uvicorn.Server):
    """Serves until a signal, or until no worker is left that serves or will.

    The first SIGTERM lets running requests finish; SIGINT, or a second signal, does not wait for them.
    """

    def __init__(self, app: LayerskipApp) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=_HttpConnection,
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
        self._settings = app.settings
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain_until_s: float | None = None

    def serve_until_signal(self, listener: socket.socket) -> None:
        """Block until the end; a Ctrl-C is an ordinary one."""
        # Every connection inherits these. The kernel would take megabytes for a client that reads nothing, which
        # would go unnoticed for as long.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        if sys.platform == "linux":
            timeout_ms = int(1000 * self._settings.slow_reader_timeout_s)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, timeout_ms))
        with contextlib.suppress(KeyboardInterrupt):
            self.run(sockets=[listener])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Remember the loop, which a signal must not touch from outside."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        self.should_exit |= self._app.models.are_gone
        if self._drain_until_s is not None and not self.should_exit:
            is_late = time.monotonic() >= self._drain_until_s
            if is_late or not self._app.num_under_way:
                self._stop()
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Signal handler: drain at a first SIGTERM, else stop."""
        if self.should_exit:
            # The end is under way and bounded; a second signal would only cut it off with a traceback.
            return
        if sig == signal.SIGTERM and self._drain_until_s is None:
            self._drain_until_s = time.monotonic() + self._settings.drain_timeout_s
            self._in_loop(self._drain)
        else:
            self._stop()

    def _drain(self) -> None:
        self._app.models.drain()
        _log.info(
            "draining: %d requests under way have up to %g s",
            self._app.num_under_way,
            self._settings.drain_timeout_s,
        )

    def _stop(self) -> None:
        """End open streams with an error, so that the rest need not wait for them.

        Not by way of uvicorn's own handler: it would raise the signal again, and that would be the exit code.
        """
        self.should_exit = True
        self._in_loop(self._app.models.refuse_work)

    def _in_loop(self, action: Callable[[], None]) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(action)
