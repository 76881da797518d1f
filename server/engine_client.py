"""The asynchronous front of one worker: its state, its queue bound, and streams of what it decodes.

Knows sequences and messages; knows nothing of HTTP or text. Everything here runs on the event loop.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from decoding.messages import Abort, Decoded, Event, Failed, Generate, Load, Loading, Ready, StepReport
from server.deadlines import Deadlines
from server.errors import ApiError, InvalidRequest, QueueFull, SlowReader, Unavailable, WorkerLost
from server.observers import StartListener, StepObserver
from server.supervisor import WorkerCallbacks, WorkerProcess

# For each sequence. One that is read needs far less; what is behind more is a client that stopped reading.
_MAX_PENDING_EVENTS: Final = 4096
_NO_DEADLINES: Final = Deadlines()

_log = logging.getLogger("layerskip.worker")


class WorkerState(StrEnum):
    """Where a worker is in its life."""

    LOADING = "loading"
    READY = "ready"
    DEAD = "dead"


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


class EngineClient:
    """Submits sequences to one worker and hands each event to the stream that waits for it.

    `max_queued` sequences may be open beyond the `max_num_seqs` the worker decodes together.
    """

    def __init__(
        self,
        process: WorkerProcess,
        *,
        max_queued: int,
        deadlines: Deadlines = _NO_DEADLINES,
        observer: StepObserver,
        listener: StartListener,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._process = process
        self._max_queued = max_queued
        self._deadlines = deadlines
        self._observer = observer
        self._listener = listener
        self._clock = clock
        self._ids = itertools.count(1)
        self._streams: dict[int, TokenStream] = {}
        self._ready: Ready | None = None
        self._heard_at_s = clock()
        self._is_stopping = False
        self.state = WorkerState.LOADING
        self.stage = "starting"
        self.fraction = 0.0
        self.load = Load()

    @property
    def pid(self) -> int | None:
        """Process id of the worker."""
        return self._process.pid

    @property
    def is_up(self) -> bool:
        """Whether the worker serves."""
        return self.state is WorkerState.READY

    @property
    def has_failed_to_start(self) -> bool:
        """Whether the worker ended before it ever served."""
        return self.state is WorkerState.DEAD and self._ready is None

    @property
    def num_open(self) -> int:
        """Sequences running or waiting, also those on their way to the worker."""
        return len(self._streams)

    @property
    def num_waiting(self) -> int:
        """Sequences the worker does not run yet."""
        return max(0, self.num_open - self.load.num_running)

    @property
    def heartbeat_age_s(self) -> float:
        """Seconds since the worker was last heard; grows while one step lasts."""
        return self._clock() - self._heard_at_s

    @property
    def ready(self) -> Ready:
        """What the worker serves. Raises Unavailable unless it is up."""
        if self._is_stopping:
            raise Unavailable("the server is shutting down")
        if self.state is WorkerState.LOADING:
            raise Unavailable(f"the model is loading ({self.stage}, {self.fraction:.0%})")
        if self.state is WorkerState.DEAD or self._ready is None:
            raise Unavailable("the worker of this model is gone")
        return self._ready

    def start(self) -> None:
        """Spawn the worker; returns at once, `state` tells when it is ready."""
        self._process.start(WorkerCallbacks(on_event=self._on_event, on_exit=self._on_exit))

    async def stop(self) -> None:
        """End open streams with an error and the worker with them."""
        self.refuse_work()
        await self._process.stop()

    def refuse_work(self) -> None:
        """Let nothing in any more and end every open stream with an error."""
        self._is_stopping = True
        self._fail_streams(Unavailable("the server is shutting down"))

    def next_sequence_id(self) -> int:
        """A number no other sequence of this worker has."""
        return next(self._ids)

    def submit(self, sequences: Sequence[Generate]) -> TokenStream:
        """Send sequences to the worker. Raises Unavailable or QueueFull, and then has sent none."""
        limit = self.ready.limits.max_num_seqs + self._max_queued
        if len(sequences) > limit:
            raise InvalidRequest(
                f"at most {limit} sequences are decoded or queued here, not {len(sequences)}", param="n"
            )
        if self.num_open + len(sequences) > limit:
            raise QueueFull(num_open=self.num_open, limit=limit)
        if self._process.is_congested:
            raise Unavailable("the worker does not take requests at the moment")
        stream = TokenStream([sequence.sequence_id for sequence in sequences], abort=self._abort)
        for sequence in sequences:
            self._streams[sequence.sequence_id] = stream
            self._process.send(sequence)
        stream.limit(
            self._deadlines.start(
                stream, is_waiting=lambda: self._is_waiting(stream), count=self._observer.expired
            )
        )
        return stream

    def _is_waiting(self, stream: TokenStream) -> bool:
        """Whether none of a stream's sequences has a place in the batch: the oldest that are open have them.

        The very first always has one, even if the worker has not said so yet.
        """
        num_running = max(1, self.load.num_running)
        return stream not in itertools.islice(self._streams.values(), num_running)

    def _abort(self, sequence_ids: Sequence[int]) -> None:
        running = [sequence_id for sequence_id in sequence_ids if self._streams.pop(sequence_id, None)]
        if running:
            self._process.send(Abort(running))

    def _on_event(self, event: Event) -> None:
        self._heard_at_s = self._clock()
        if isinstance(event, StepReport):
            self._on_step(event)
        elif isinstance(event, Loading):
            self.stage, self.fraction = event.stage, event.fraction
            self._listener.loading(event.stage, event.fraction)
        elif isinstance(event, Ready):
            # Only a model whose text can be handled is ready.
            self._observer.worker_ready(event)
            self._ready, self.state = event, WorkerState.READY
            self.load = Load(num_free_blocks=event.limits.num_blocks)
            self._listener.ready(event)
        else:
            self._on_failed(event)

    def _on_step(self, report: StepReport) -> None:
        if self.load.is_drafting_worthwhile and not report.load.is_drafting_worthwhile:
            _log.warning("no draft of this checkpoint pays: requests that leave it open are decoded plainly")
        self.load = report.load
        self._observer.step(report)
        for decoded in report.decoded:
            stream = self._streams.get(decoded.sequence_id)
            if stream is None:
                self._observer.discarded(len(decoded.token_ids))
                continue
            if decoded.finish_reason is not None:
                del self._streams[decoded.sequence_id]
            stream.push(Arrival(decoded, self._heard_at_s))

    def _on_failed(self, failed: Failed) -> None:
        self.state = WorkerState.DEAD
        self._listener.failed(failed.message)

    def _on_exit(self, exit_code: int | None) -> None:
        was, self.state = self.state, WorkerState.DEAD
        self.load = Load()
        if was is WorkerState.LOADING:
            self._listener.failed(f"the worker died while loading (exit code {exit_code})")
        if was is WorkerState.READY:
            self._listener.failed(f"the worker died (exit code {exit_code})")
        self._fail_streams(WorkerLost("the worker died while it decoded this request"))

    def _fail_streams(self, error: ApiError) -> None:
        streams = set(self._streams.values())
        self._streams.clear()
        for stream in streams:
            stream.fail(error)
