"""What is decoded for one request, as the one who asked for it reads it.

Knows sequences and events; knows nothing of where they come from.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from decoding.messages import Decoded
from server.errors import ApiError, SlowReader

# For each sequence. One that is read needs far less; what is behind more is a client that stopped reading.
_MAX_PENDING_EVENTS: Final = 4096


@dataclass(frozen=True, slots=True)
class Arrival:
    """An event of one sequence and when it came, in seconds of the client's clock."""

    decoded: Decoded
    at_s: float


class TokenStream:
    """What is decoded for one request, in order. It ends with each sequence's last event or with an error.

    Close it when done, however that came about: sequences that still run are then aborted.
    """

    def __init__(self, sequence_ids: Sequence[int], *, abort: Callable[[Sequence[int]], None]) -> None:
        self._open = set(sequence_ids)
        self._max_pending = _MAX_PENDING_EVENTS * len(self._open)
        self._abort = abort
        self._arrivals: list[Arrival] = []
        self._error: ApiError | None = None
        self._wake_up = asyncio.Event()
        self._timers: Sequence[asyncio.TimerHandle] = ()
        self.has_begun = False

    @property
    def is_open(self) -> bool:
        """Whether any of its sequences still waits or runs."""
        return bool(self._open)

    async def next(self) -> Sequence[Arrival]:
        """Everything that came since the last call, at least one. Raises the ApiError that ended it."""
        while not self._arrivals:
            if self._error is not None:
                raise self._error
            self._wake_up.clear()
            await self._wake_up.wait()
        arrivals, self._arrivals = self._arrivals, []
        return arrivals

    def end(self, sequence_id: int) -> None:
        """Nothing more is wanted of one sequence."""
        if sequence_id in self._open:
            self._open.discard(sequence_id)
            self._abort([sequence_id])

    def close(self) -> int:
        """Nothing more is wanted at all; returns how many tokens had come and were not read."""
        self._abort_open()
        unread, self._arrivals = self._arrivals, []
        return sum(len(arrival.decoded.token_ids) for arrival in unread)

    def stop(self, error: ApiError) -> None:
        """For a deadline: abort what is open and end with `error`, after the events that already came."""
        self._abort_open()
        self.fail(error)

    def limit(self, timers: Sequence[asyncio.TimerHandle]) -> None:
        """For the client: timers that end with the stream."""
        self._timers = timers

    def push(self, arrival: Arrival) -> None:
        """For the client: add an event."""
        self.has_begun = True
        if arrival.decoded.finish_reason is not None:
            self._open.discard(arrival.decoded.sequence_id)
        self._arrivals.append(arrival)
        self._wake_up.set()
        if len(self._arrivals) > self._max_pending:
            self.fail(SlowReader("the stream was not read for too long"))
            self.close()

    def fail(self, error: ApiError) -> None:
        """For the client: end every sequence with `error`, after the events that already came."""
        self._error = error
        self._wake_up.set()

    def _abort_open(self) -> None:
        for timer in self._timers:
            timer.cancel()
        if self._open:
            still_open, self._open = self._open, set()
            self._abort(sorted(still_open))
