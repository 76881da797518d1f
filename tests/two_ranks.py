"""An engine of two ranks on the CPU, with gloo between them: the first in this process, the other in its own.

Knows how to start and end them; the promises are in the tests that use it.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

from config.settings import EngineSettings
from decoding.engine import Engine
from decoding.graphs import Recorder
from decoding.messages import Decoded
from decoding.parallel import Ranks
from decoding.parallel_linear import MakeCollectives, ProcessGroup
from decoding.sharding import Shard
from server import ranks
from tests.mixes import MAX_LEN

CPU = torch.device("cpu")
VOCAB = 62
"""Even, and no less than what mixes ask for."""


class PlainChannel:
    """The first rank's channel in a test: nothing here ends because the other does."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def send_bytes(self, frame: bytes, /) -> None:
        self._connection.send_bytes(frame)

    def recv_bytes(self) -> bytes:
        frame = self._connection.recv_bytes()
        assert frame[:1] == b"f", frame
        return frame[1:]


# Other ranks are forks of a process that has imported what takes long.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__, "decoding.parallel_rank"])


def other_rank(connection: Connection) -> None:
    ranks.main(connection, 1, os.getppid())


@contextmanager
def two_ranks(
    settings: EngineSettings,
    other_rank: Callable[[Connection], None] = other_rank,
    *,
    gather: MakeCollectives = ProcessGroup,
    recorder: Recorder | None = None,
) -> Iterator[Engine]:
    """An engine whose other half runs in a process of its own."""
    ours, theirs = multiprocessing.Pipe()
    other = FORKS.Process(target=other_rank, args=(theirs,), daemon=True)
    other.start()
    theirs.close()
    try:
        first = Ranks(Shard(0, 2), [PlainChannel(ours)], gather)
        yield Engine.load(settings, ranks=first, recorder=recorder)
    finally:
        ours.close()
        other.join(20)
        if dist.is_initialized():
            dist.destroy_process_group()
        assert other.exitcode == 0


def shared_out(folder: Path, **more: object) -> EngineSettings:
    """Settings of an engine with two ranks that measures nothing at its start."""
    sizes = {"block_size": 4, "num_blocks": 512, "max_model_len": MAX_LEN, "num_threads": 1}
    fixed = {"exit_layer": 2, "draft_length": 2, "device": "cpu", "tensor_parallel_size": 2}
    return EngineSettings(model=str(folder), **(sizes | fixed | more))


def tokens(events: dict[int, list[Decoded]]) -> dict[int, list[int]]:
    return {i: [token for event in own for token in event.token_ids] for i, own in events.items()}
