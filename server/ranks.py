"""The processes of a model that is spread over several devices: the worker starts the others, all end together.

Knows processes and pipes; knows nothing of what ranks tell each other. Steps of one rank wait for all: so the
worker ends as soon as another rank does, and the others end with the worker.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import sys
import threading
import traceback
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Final

from config.errors import ShortOfMemory, StartupError
from server.orphans import end_with_parent

_FRAME: Final = b"f"
_FAILED: Final = b"!"
"""What a frame from another rank begins with: it carries what that rank tells, or why it cannot start."""

_LAST_WORDS_S: Final = 0.5


def start_ranks(size: int) -> list[RankChannel]:
    """Start the ranks 1 … size − 1 of a model whose rank 0 this process is."""
    if size > 1:
        # Its parent has set this, to end it with itself; here it would only forbid children.
        multiprocessing.current_process().daemon = False
    return [RankChannel.to_new(rank) for rank in range(1, size)]


class RankChannel:
    """The first rank's channel to another. If that ends, so does this process, at once.

    Frames are read by a thread, so that the end is noticed whatever the main thread waits for.
    """

    def __init__(self, connection: Connection, process: SpawnProcess) -> None:
        self.pid = process.pid
        self._connection = connection
        self._process = process
        self._frames: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._read, name=process.name, daemon=True).start()

    @classmethod
    def to_new(cls, rank: int) -> RankChannel:
        """Start this rank."""
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(
            target=main, args=(theirs, rank, os.getpid()), name=f"layerskip-rank-{rank}", daemon=True
        )
        process.start()
        theirs.close()
        return cls(ours, process)

    def send_bytes(self, frame: bytes, /) -> None:
        """Send a frame."""
        self._connection.send_bytes(frame)

    def recv_bytes(self) -> bytes:
        """Wait for the next frame. Raises StartupError if the rank cannot start."""
        frame = self._frames.get()
        if frame[:1] == _FAILED:
            raise StartupError(frame[1:].decode())
        return frame[1:]

    def _read(self) -> None:
        try:
            while self._connection in wait([self._connection, self._process.sentinel]):
                frame = self._connection.recv_bytes()
                self._frames.put(frame)
                if frame[:1] == _FAILED:
                    # It is the main thread's to say why this one cannot start either.
                    return
        except (EOFError, OSError):
            pass
        self._process.join(_LAST_WORDS_S)
        end = f"{self._process.name} ended (exit code {self._process.exitcode})"
        print(f"layerskip: {end}, and with it the worker", file=sys.stderr, flush=True)
        os._exit(1)


class _Channel:
    """Another rank's channel to the first."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def send_bytes(self, frame: bytes, /) -> None:
        self._connection.send_bytes(_FRAME + frame)

    def recv_bytes(self) -> bytes:
        try:
            return self._connection.recv_bytes()
        except (EOFError, ConnectionError):
            # The first rank is gone, and nobody else says what to do.
            os._exit(0)


def main(connection: Connection, rank: int, parent_pid: int) -> None:
    """Entry of a spawned rank: load its share, then do as it is told until the pipe ends."""
    end_with_parent(parent_pid)
    try:
        with EndingAtOnce():
            _run(_Channel(connection), rank)
    except ShortOfMemory as error:
        # The others may wait for this one in the middle of a step: nothing but its end is heard there.
        print(f"layerskip: layerskip-rank-{rank}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    except StartupError as error:
        connection.send_bytes(_FAILED + " ".join(str(error).split()).encode())
        os._exit(0)


class EndingAtOnce:
    """Around what a process does. What is raised within, but for a StartupError, is written to standard error and
    ends the process; nothing waits for a device or for ranks that are gone.
    """

    def __enter__(self) -> None:
        return

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, StartupError):
            traceback.print_exception(error)
            os._exit(1)


def _run(channel: _Channel, rank: int) -> None:
    """The import of torch happens here, in a process of its own."""
    from decoding.parallel_rank import run_rank

    run_rank(channel, rank=rank)
