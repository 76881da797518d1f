"""How long a request may wait for a place in the batch, and how long its answer may take.

Knows timers and refusals; knows nothing of HTTP, nor of what is decoded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from server.errors import ApiError, QueueTimeout, RequestTimeout


class Decoding(Protocol):
    """A request while it is decoded."""

    @property
    def is_open(self) -> bool:
        """Whether any of its sequences still waits or runs."""

    @property
    def has_begun(self) -> bool:
        """Whether anything came of it."""

    def stop(self, error: ApiError) -> None:
        """Abort its sequences; the reader gets `error` after what already came."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds from when a request is let in; None is no deadline."""

    queue_s: float | None = None
    total_s: float | None = None

    def start(
        self, decoding: Decoding, *, is_waiting: Callable[[], bool], count: Callable[[str], None]
    ) -> Sequence[asyncio.TimerHandle]:
        """Timers that stop `decoding`; cancel them when it has ended. `count` is told which of the two it was.

        `is_waiting` says whether the batch has had no place for it; a long prompt has one before anything comes.
        """

        def stop(error: ApiError, reason: str) -> None:
            if decoding.is_open:
                count(reason)
                decoding.stop(error)

        def stop_waiting(error: ApiError, reason: str) -> None:
            if not decoding.has_begun and is_waiting():
                stop(error, reason)

        loop = asyncio.get_running_loop()
        timers = []
        if self.queue_s is not None:
            error = QueueTimeout(timeout_s=self.queue_s)
            timers.append(loop.call_later(self.queue_s, stop_waiting, error, "queue_timeout"))
        if self.total_s is not None:
            late = RequestTimeout(timeout_s=self.total_s)
            timers.append(loop.call_later(self.total_s, stop, late, "request_timeout"))
        return timers
