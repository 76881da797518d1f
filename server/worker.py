"""The worker process: takes commands from the pipe, lets the engine step, sends what came of it.

Knows processes and messages; knows neither HTTP nor text. It ends when its pipe does.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection
from typing import Final, NoReturn, Protocol

import msgspec

from config.errors import ShortOfMemory, StartupError
from config.settings import EngineSettings
from decoding.messages import Abort, Command, Event, Failed, Generate, Loading, Ready, StepReport
from server.orphans import end_with_parent
from server.ranks import EndingAtOnce, start_ranks

# An idle worker reports this often, so that silence means a step that hangs.
HEARTBEAT_S: Final = 1.0

Progress = Callable[[str, float], None]


class DecodingEngine(Protocol):
    """What the worker needs of an engine; `decoding.engine.Engine` is one."""

    @property
    def ready(self) -> Ready:
        """What to tell the API process once loaded."""

    @property
    def has_work(self) -> bool:
        """Whether a step would decode anything."""

    def submit(self, request: Generate) -> None:
        """Queue a sequence. Of those that wait one of lowest priority is admitted first, of several the oldest.

        While all have priority 0, no step computes anything of a sequence before which `max_num_seqs` others are
        open. From the first of another priority on, reports say which are running.
        """

    def abort(self, sequence_ids: Iterable[int]) -> None:
        """Drop sequences and free their blocks."""

    def step(self) -> StepReport:
        """Run one cycle."""

    def report(self) -> StepReport:
        """Say how full the engine is."""

    def check_integrity(self) -> None:
        """Assert that every KV block is accounted for."""


EngineLoader = Callable[[EngineSettings, Progress], DecodingEngine]


def load_engine(settings: EngineSettings, progress: Progress) -> DecodingEngine:
    """Load the real engine; the import of torch happens here, in the worker."""
    from decoding.engine import Engine
    from decoding.parallel import Ranks

    ranks = Ranks.first_of(start_ranks(settings.tensor_parallel_size))
    return Engine.load(settings, progress=progress, ranks=ranks)


def main(connection: Connection, settings_json: str, load: EngineLoader, parent_pid: int) -> None:
    """Entry of the spawned process: load, say so, then serve until the pipe ends."""
    end_with_parent(parent_pid)
    link = _Link(connection)
    try:
        with EndingAtOnce():
            settings = EngineSettings.model_validate_json(settings_json)
            engine = load(settings, lambda stage, fraction: link.send(Loading(stage, fraction)))
            link.send(engine.ready)
            serve(engine, link)
    except StartupError as error:
        link.send(Failed(" ".join(str(error).split()), may_pass=isinstance(error, ShortOfMemory)))
        os._exit(0)


class CommandLink(Protocol):
    """Where commands come from and events go."""

    def take(self, *, wait: bool) -> Sequence[Command]:
        """Everything that arrived; with `wait`, after at most a heartbeat's time something or nothing."""

    def send(self, event: Event) -> None:
        """Pass an event to the API process."""


def serve(engine: DecodingEngine, link: CommandLink) -> NoReturn:
    """Drain commands, step, send; while idle, report once a heartbeat.

    After work, the first quiet second checks that no block was lost: a worker that lost some ends, and another
    follows, while nobody waits.
    """
    num_taken, is_checked = 0, True
    while True:
        commands = link.take(wait=not engine.has_work)
        if not is_checked and not commands and not engine.has_work:
            engine.check_integrity()
            is_checked = True
        for command in commands:
            if isinstance(command, Abort):
                engine.abort(command.sequence_ids)
            else:
                engine.submit(command)
                num_taken += 1
                is_checked = False
        report = engine.step() if engine.has_work else engine.report()
        link.send(msgspec.structs.replace(report, num_taken=num_taken))


class _Link:
    """The worker's end of the pipe. Commands are read by a thread, also during a long step.

    Events go straight into the pipe: its buffer is the bounded queue, and a thread in between would wait for
    the interpreter lock just when the next step takes it.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="commands", daemon=True).start()

    def take(self, *, wait: bool) -> Sequence[Command]:
        commands: list[Command] = []
        try:
            if wait:
                commands.append(self._commands.get(timeout=HEARTBEAT_S))
            while True:
                commands.append(self._commands.get_nowait())
        except queue.Empty:
            return commands

    def send(self, event: Event) -> None:
        try:
            self._connection.send_bytes(self._encoder.encode(event))
        except OSError:
            os._exit(0)

    def _read(self) -> None:
        try:
            while True:
                self._commands.put(self._decoder.decode(self._connection.recv_bytes()))
        except (EOFError, OSError):
            # The API process is gone; nobody is left to decode for, whatever the main thread is doing.
            os._exit(0)
