"""The API process's end of one worker: spawns it, carries frames both ways, notices its death.

Knows processes, pipes and threads; knows nothing of what commands and events mean. The event loop never
waits for the pipe: one thread reads it and one writes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Final

import msgspec

from config.settings import EngineSettings
from decoding.messages import Command, Event
from server import worker
from server.orphans import TELL_WHERE
from server.worker import EngineLoader

_log = logging.getLogger("layerskip.supervisor")

# Events the loop has not yet seen; beyond it the reader waits, then the pipe fills, then the worker waits.
_MAX_UNSEEN_EVENTS: Final = 256
_MAX_UNSENT_COMMANDS: Final = 8192
_STOP_S: Final = 1.0
_LAST_WORDS_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class WorkerCallbacks:
    """What is called on the event loop: for each event in order, and once with the exit code at the end."""

    on_event: Callable[[Event], None]
    on_exit: Callable[[int | None], None]


class WorkerProcess:
    """One spawned worker with the threads at its pipe. `start` once, from the event loop; then `stop`.

    After `on_exit` nothing of it is left, and another may be made in its place.
    """

    def __init__(self, settings: EngineSettings, *, load_engine: EngineLoader) -> None:
        self._settings = settings
        self._load_engine = load_engine
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._unseen = threading.BoundedSemaphore(_MAX_UNSEEN_EVENTS)
        self._stopping = threading.Event()
        self._process: SpawnProcess | None = None
        self._threads: list[threading.Thread] = []

    @property
    def pid(self) -> int | None:
        """Process id, None before the start."""
        return self._process.pid if self._process else None

    @property
    def is_congested(self) -> bool:
        """Whether the worker has stopped taking commands, so that no more should be sent."""
        return self._commands.qsize() >= _MAX_UNSENT_COMMANDS

    def start(self, callbacks: WorkerCallbacks) -> None:
        """Spawn the worker and carry its events to `callbacks` on the running loop."""
        loop = asyncio.get_running_loop()
        ours, theirs = multiprocessing.Pipe()
        self._process = self._spawn(theirs)
        theirs.close()
        self._threads = [
            threading.Thread(
                target=self._read, args=(ours, loop, callbacks), name="worker-events", daemon=True
            ),
            threading.Thread(target=self._write, args=(ours,), name="worker-commands", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def send(self, command: Command) -> None:
        """Queue a command; never waits. Commands to a dead worker go nowhere."""
        self._commands.put(command)

    def kill(self) -> None:
        """End the worker now; `on_exit` follows unless `stop` was called."""
        if self._process is not None:
            self._process.kill()

    def end_hung(self) -> None:
        """End a worker that does nothing, but first let it write to standard error what it is doing."""
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, TELL_WHERE)
        asyncio.get_running_loop().call_later(_LAST_WORDS_S, self.kill)

    async def stop(self) -> None:
        """End the worker and the threads; no callback follows."""
        self._stopping.set()
        self.kill()
        self._commands.put(None)
        await asyncio.to_thread(self._join)

    def _spawn(self, theirs: Connection) -> SpawnProcess:
        process = multiprocessing.get_context("spawn").Process(
            target=worker.main,
            args=(theirs, self._settings.model_dump_json(), self._load_engine, os.getpid()),
            name="layerskip-worker",
            daemon=True,
        )
        # The child inherits the mask, so that a Ctrl-C during its start does not print a traceback there.
        previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)
        return process

    def _join(self) -> None:
        if self._process is not None:
            self._process.join(_STOP_S)
        for thread in self._threads:
            thread.join(_STOP_S)

    def _read(self, ours: Connection, loop: asyncio.AbstractEventLoop, callbacks: WorkerCallbacks) -> None:
        assert self._process is not None
        decoder: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)
        try:
            while ours in wait([ours, self._process.sentinel]):
                self._pass_on(decoder.decode(ours.recv_bytes()), loop, callbacks)
        except (EOFError, OSError, msgspec.MsgspecError) as error:
            _log.debug("the worker's pipe ended: %r", error)
        # A worker whose pipe is gone, or says what nobody understands, is of no use even if its process lingers.
        self._process.kill()
        self._process.join()
        self._commands.put(None)
        self._call(loop, lambda: callbacks.on_exit(self._process.exitcode if self._process else None))

    def _pass_on(self, event: Event, loop: asyncio.AbstractEventLoop, callbacks: WorkerCallbacks) -> None:
        def deliver() -> None:
            self._unseen.release()
            callbacks.on_event(event)

        while not self._unseen.acquire(timeout=_STOP_S):
            if self._stopping.is_set():
                return
        self._call(loop, deliver)

    def _call(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
        if not self._stopping.is_set() and not loop.is_closed():
            loop.call_soon_threadsafe(callback)

    def _write(self, ours: Connection) -> None:
        encoder = msgspec.msgpack.Encoder()
        while (command := self._commands.get()) is not None:
            try:
                ours.send_bytes(encoder.encode(command))
            except OSError:
                # The reader sees the same end and tells the loop.
                return
