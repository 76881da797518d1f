"""How long a request may wait for a place in the batch, and how long its answer may take.

Knows timers and refusals; knows nothing of HTTP, nor of what is decoded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from server.errors import ApiError, QueueTimeout, RequestTimeout

# Of a deadline that is put off, the shortest time until it is looked at again.
_LEAST_DELAY_S: Final = 0.05


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


class Stopwatch:
    """How long something has lasted, all times together."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lasted_s = 0.0
        self._began_at_s: float | None = None

    def start(self) -> None:
        """It lasts from now on, unless it did already."""
        if self._began_at_s is None:
            self._began_at_s = self._clock()

    def stop(self) -> None:
        """It lasts no longer."""
        self._lasted_s, self._began_at_s = self.lasted_s, None

    @property
    def lasted_s(self) -> float:
        """Seconds up to now."""
        return self._lasted_s + (0.0 if self._began_at_s is None else self._clock() - self._began_at_s)


@dataclass(frozen=True, slots=True)
class Waiting:
    """What the line a request stands in says of it.

    `is_waiting` tells whether the batch has had no place for it; a long prompt has one before anything comes. In
    the time that `holdup` counts nobody was given a place in his turn.
    """

    is_waiting: Callable[[], bool]
    holdup: Stopwatch


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds from when a request is let in; None is no deadline.

    A step may take `step_s`, any time if that is 0: not a request's own deadline, but its worker's.
    """

    queue_s: float | None = None
    total_s: float | None = None
    step_s: float = 0.0

    def start(
        self, decoding: Decoding, waiting: Waiting, *, count: Callable[[str], None]
    ) -> Sequence[asyncio.TimerHandle]:
        """Timers that stop `decoding`; cancel them when it has ended. `count` is told which of the two it was.

        A hold-up puts off the end of waiting by as long as it lasts.
        """

        def stop(error: ApiError, reason: str) -> None:
            if decoding.is_open:
                count(reason)
                decoding.stop(error)

        def stop_waiting(error: ApiError, held_up_before_s: float) -> None:
            if decoding.has_begun or not waiting.is_waiting():
                return
            held_up_s = waiting.holdup.lasted_s
            if held_up_s > held_up_before_s:
                delay_s = max(_LEAST_DELAY_S, held_up_s - held_up_before_s)
                timers.append(loop.call_later(delay_s, stop_waiting, error, held_up_s))
            else:
                stop(error, "queue_timeout")

        loop = asyncio.get_running_loop()
        timers: list[asyncio.TimerHandle] = []
        if self.queue_s is not None:
            error, held_up_s = QueueTimeout(timeout_s=self.queue_s), waiting.holdup.lasted_s
            timers.append(loop.call_later(self.queue_s, stop_waiting, error, held_up_s))
        if self.total_s is not None:
            late = RequestTimeout(timeout_s=self.total_s)
            timers.append(loop.call_later(self.total_s, stop, late, "request_timeout"))
        return timers
