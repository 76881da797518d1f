"""The asynchronous front of one worker: its state, its queue bound, and streams of what it decodes.

A worker that dies after it served is followed by another, which resumes what was open. Knows sequences and
messages; knows nothing of HTTP or text. Everything here runs on the event loop.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Final

from decoding.messages import Abort, Event, Failed, Generate, Load, Loading, Ready, StepReport
from server.deadlines import Deadlines, Stopwatch, Waiting
from server.errors import (
    ApiError,
    InvalidRequest,
    OutOfMemory,
    QueueFull,
    Unavailable,
    WorkerLost,
    WorkerLostTwice,
)
from server.hang_watch import HangWatch
from server.observers import StartListener, StepObserver
from server.restarts import MAX_FRUITLESS_DEATHS, RestartPolicy
from server.roster import Roster
from server.supervisor import WorkerCallbacks, WorkerProcess
from server.token_stream import Arrival, TokenStream

_NO_DEADLINES: Final = Deadlines()

_log = logging.getLogger("layerskip.worker")


class WorkerState(StrEnum):
    """Where a worker is in its life. From `DEAD` there is no return."""

    LOADING = "loading"
    READY = "ready"
    RESTARTING = "restarting"
    DEAD = "dead"


class EngineClient:
    """Submits sequences to one worker and hands each event to the stream that waits for it.

    `spawn` makes a worker that is yet to be started: the first, and one after each that died. `max_queued`
    sequences may be open beyond the `max_num_seqs` the worker decodes together. A worker that serves and says
    nothing for longer than a step may take is ended, as if it had died.
    """

    def __init__(
        self,
        spawn: Callable[[], WorkerProcess],
        *,
        max_queued: int,
        deadlines: Deadlines = _NO_DEADLINES,
        observer: StepObserver,
        listener: StartListener,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spawn = spawn
        self._process = spawn()
        self._max_queued = max_queued
        self._deadlines = deadlines
        self._observer = observer
        self._listener = listener
        self._clock = clock
        self._ids = itertools.count(1)
        self._roster = Roster()
        self._restarts = RestartPolicy(clock)
        self._next_start: asyncio.TimerHandle | None = None
        self._ready: Ready | None = None
        self._heard_at_s = clock()
        self._holdup = Stopwatch(clock)
        self._watch = HangWatch(
            deadlines.step_s, silent_s=lambda: self.heartbeat_age_s, on_hang=self._on_hang
        )
        self._has_hung = False
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
    def is_gone(self) -> bool:
        """Whether no worker serves and none will: it never started, or died too often."""
        return self.state is WorkerState.DEAD

    @property
    def num_open(self) -> int:
        """Sequences running or waiting, also those on their way to the worker."""
        return len(self._roster)

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
        if self.state is WorkerState.RESTARTING:
            raise Unavailable("the worker of this model died and is being restarted; try again")
        if self.state is WorkerState.DEAD or self._ready is None:
            raise Unavailable("the worker of this model is gone")
        return self._ready

    def start(self) -> None:
        """Spawn the worker; returns at once, `state` tells when it is ready."""
        self._process.start(WorkerCallbacks(on_event=self._on_event, on_exit=self._on_exit))

    async def stop(self) -> None:
        """End open streams with an error and the worker with them."""
        self.refuse_work()
        self._watch.stop()
        if self._next_start is not None:
            self._next_start.cancel()
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
        self._roster.add(stream, sequences)
        self._give()
        waiting = Waiting(lambda: not self._roster.has_place(stream), self._holdup)
        stream.limit(self._deadlines.start(stream, waiting, count=self._observer.expired))
        return stream

    def _give(self) -> None:
        """Send the worker the requests whose turn it is."""
        if self.state is not WorkerState.READY:
            return
        for request in self._roster.give():
            for sequence in request.to_send():
                self._process.send(sequence)
            if request.is_resumed:
                self._observer.resumed()
        if not self._roster.is_held_up:
            self._holdup.stop()

    def _abort(self, sequence_ids: Sequence[int]) -> None:
        if given := self._roster.remove(sequence_ids):
            self._process.send(Abort(given))

    def _on_event(self, event: Event) -> None:
        self._heard_at_s = self._clock()
        if isinstance(event, StepReport):
            self._on_step(event)
        elif isinstance(event, Loading):
            self.stage, self.fraction = event.stage, event.fraction
            self._listener.loading(event.stage, event.fraction)
        elif isinstance(event, Ready):
            self._on_ready(event)
        else:
            self._on_failed(event)

    def _on_ready(self, ready: Ready) -> None:
        if self._ready is not None and not ready.serves_like(self._ready):
            self._fail_streams(WorkerLost("the worker died, and the next one serves another checkpoint"))
        # Only a model whose text can be handled is ready.
        self._observer.worker_ready(ready)
        self._ready, self.state = ready, WorkerState.READY
        self.load = Load(num_free_blocks=ready.limits.num_blocks)
        self._restarts.served()
        self._listener.ready(ready)
        self._watch.start()
        self._give()

    def _on_step(self, report: StepReport) -> None:
        if self.load.is_drafting_worthwhile and not report.load.is_drafting_worthwhile:
            _log.warning("no draft of this checkpoint pays: requests that leave it open are decoded plainly")
        self.load = report.load
        self._observer.step(report)
        for decoded in report.decoded:
            stream = self._roster.note(decoded)
            if stream is None:
                self._observer.discarded(len(decoded.token_ids))
                continue
            if decoded.finish_reason is not None:
                self._restarts.finished()
            stream.push(Arrival(decoded, self._heard_at_s))
        for sequence_id in report.out_of_memory:
            self._on_out_of_memory(sequence_id)
        self._roster.heard(report)
        self._give()

    def _on_out_of_memory(self, sequence_id: int) -> None:
        """The worker dropped a sequence: nothing of its request is of use any more."""
        _log.warning("the device's memory ran out: sequence %d was dropped", sequence_id)
        stream = self._roster.stream_of(sequence_id)
        if stream is not None:
            stream.stop(OutOfMemory())

    def _on_failed(self, failed: Failed) -> None:
        if failed.may_pass and self.state is WorkerState.RESTARTING:
            # What the worker before this one held may not be free yet. Its exit has another follow.
            _log.error("the worker could not be started: %s", failed.message)
            return
        self.state = WorkerState.DEAD
        self._listener.failed(failed.message)

    def _on_hang(self) -> None:
        """Silence is a step that does not end: an idle worker is heard every second."""
        _log.error("the worker has said nothing for %.0f s and is ended", self.heartbeat_age_s)
        self._has_hung = True
        self._process.end_hung()

    def _on_exit(self, exit_code: int | None) -> None:
        self._watch.stop()
        if self._is_stopping:
            return
        was, self.state = self.state, WorkerState.DEAD
        self.load = Load()
        if was is WorkerState.LOADING:
            self._listener.failed(f"the worker died while loading (exit code {exit_code})")
        if was in (WorkerState.READY, WorkerState.RESTARTING):
            self._recover(exit_code)
        if self.state is WorkerState.DEAD:
            self._fail_streams(WorkerLost("the worker died while it decoded this request"))

    def _recover(self, exit_code: int | None) -> None:
        """Have another worker started in a while, unless this has come to nothing too often."""
        assert self._ready is not None
        fallen = self._roster.crashed(max_num_seqs=self._ready.limits.max_num_seqs)
        for stream in fallen:
            stream.fail(WorkerLostTwice())
        self._holdup.start()
        wait_s = self._restarts.died()
        died = "the worker hung" if self._has_hung else f"the worker died (exit code {exit_code})"
        self._has_hung = False
        if wait_s is None:
            often = f"the last of {MAX_FRUITLESS_DEATHS} times in which it finished no request"
            self._listener.failed(f"{died}, {often}; no other is started")
            return
        self.state, self.stage, self.fraction = WorkerState.RESTARTING, "starting", 0.0
        self._listener.restarting(
            f"{died}; another starts in {wait_s:g} s: {self._roster.num_requests} requests wait to be resumed, "
            f"{len(fallen)} failed"
        )
        self._next_start = asyncio.get_running_loop().call_later(wait_s, self._restart)

    def _restart(self) -> None:
        self._observer.restarted()
        self._process = self._spawn()
        try:
            self.start()
        except OSError as error:
            # No memory or no process left: what may have killed the last worker may be over in a while.
            _log.warning("the worker could not be started: %s", error)
            self._on_exit(None)

    def _fail_streams(self, error: ApiError) -> None:
        for stream in self._roster.clear():
            stream.fail(error)
