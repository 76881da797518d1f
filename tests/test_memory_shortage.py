"""Memory that runs out during a start is told in one line that names what would do; other errors stay theirs."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch
import torch.distributed as dist

from config.errors import SettingsError, ShortOfMemory
from config.settings import EngineSettings
from decoding.engine import Engine
from decoding.memory_shortage import needing_memory
from decoding.messages import Failed, FinishReason
from decoding.parallel import OutOfStep, Ranks
from decoding.sharding import Shard
from server.engine_client import WorkerState
from tests.graph_tape import Moment
from tests.played_worker import Played, error_of, play, said
from tests.tiny import make_checkpoint
from tests.two_ranks import FORKS, VOCAB, PlainChannel, other_rank, shared_out

TOO_MANY = 10**12


def out_of_step() -> NoReturn:
    raise OutOfStep("memory ran out on one of several ranks") from torch.OutOfMemoryError("scripted")


def scripted(error: BaseException) -> Callable[[], NoReturn]:
    def fail() -> NoReturn:
        raise error

    return fail


CUDA = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 1 GiB"
)


@pytest.mark.parametrize(
    ("work", "amount"),
    [
        (lambda: torch.empty(1 << 50), " (4503599627370496 bytes more were asked for)"),
        (lambda: np.empty(1 << 50), " (8.00 PiB more were asked for)"),
        (scripted(CUDA), " (20.00 MiB more were asked for)"),
        (scripted(MemoryError()), ""),
        (out_of_step, ""),
    ],
)
def test_whatever_says_that_memory_ran_out_is_one_line(work: Callable[[], object], amount: str) -> None:
    with pytest.raises(ShortOfMemory) as told, needing_memory("while it was tried", remedy="lower this"):
        work()
    assert str(told.value) == f"memory ran out while it was tried{amount}: lower this"


@pytest.mark.parametrize(
    "work",
    [lambda: torch.zeros(2) @ torch.zeros(3), scripted(OSError("no")), scripted(SettingsError("wrong"))],
)
def test_other_errors_stay_as_they_are(work: Callable[[], object]) -> None:
    with (
        pytest.raises((RuntimeError, OSError, SettingsError)) as told,
        needing_memory("while it was tried", remedy="lower this"),
    ):
        work()
    assert not isinstance(told.value, ShortOfMemory)
    assert "lower this" not in str(told.value)


def test_a_cache_that_does_not_fit_names_its_size(tmp_path: Path) -> None:
    settings = EngineSettings(model=str(make_checkpoint(tmp_path)), num_blocks=TOO_MANY)
    with pytest.raises(ShortOfMemory, match=r"^memory ran out for the KV cache \(.*\): lower num_blocks$"):
        Engine.load(settings)


def test_weights_that_do_not_fit_name_what_makes_them_smaller(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": TOO_MANY}))
    settings = EngineSettings(model=str(tmp_path), load_format="dummy")
    with pytest.raises(
        ShortOfMemory, match=r"^memory ran out while the weights were loaded \(.*\): pass .*dtype"
    ):
        Engine.load(settings)


class FullDevice:
    """A device whose memory runs out when a step is recorded."""

    def record(self, work: Callable[[], None]) -> NoReturn:
        raise CUDA

    def mark(self) -> Moment:
        return Moment()


def test_a_warm_up_that_does_not_fit_names_what_makes_room(tmp_path: Path) -> None:
    settings = EngineSettings(model=str(make_checkpoint(tmp_path)), num_threads=1)
    with pytest.raises(
        ShortOfMemory, match=r"^memory ran out while steps were measured .*: lower memory_fraction"
    ):
        Engine.load(settings, recorder=FullDevice())


def test_a_rank_that_is_not_the_first_says_so_itself_and_ends(tmp_path: Path) -> None:
    """The first may wait for it in the middle of a step, where it hears nothing but that end."""
    folder, said = make_checkpoint(tmp_path, vocab=VOCAB), tmp_path / "stderr"
    settings = shared_out(folder, num_blocks=TOO_MANY)
    ours, theirs = Pipe()
    other = FORKS.Process(target=loud_rank, args=(theirs, said), daemon=True)
    other.start()
    theirs.close()
    try:
        with pytest.raises(ShortOfMemory):
            Engine.load(settings, ranks=Ranks(Shard(0, 2), [PlainChannel(ours)]))
        other.join(20)
    finally:
        ours.close()
        if dist.is_initialized():
            dist.destroy_process_group()
    assert other.exitcode == 1
    [line] = said.read_text().splitlines()
    assert line.startswith("layerskip: layerskip-rank-1: memory ran out for the KV cache")
    assert line.endswith(": lower num_blocks")


def loud_rank(connection: Connection, said: Path) -> None:
    sys.stderr = said.open("w")
    other_rank(connection)


def test_a_start_that_failed_for_want_of_memory_is_tried_again_where_a_worker_was_before() -> None:
    """What that one held may not be free yet. A first start that fails so is the end: the operator is asked."""

    async def scene(played: Played) -> None:
        stream = played.submit(1)
        played.die()
        while len(played.workers) == 1:
            await asyncio.sleep(0.01)
        played.process.callbacks.on_event(Failed("memory ran out", may_pass=True))
        assert played.client.state is WorkerState.RESTARTING
        played.die(0)
        await played.restarted()
        played.step(said(1, 8, finish=FinishReason.LENGTH))
        assert await error_of(stream) is None

    play(scene)


def test_a_first_start_that_fails_for_want_of_memory_is_the_end() -> None:
    async def scene() -> None:
        played = Played()
        played.process.callbacks.on_event(Failed("memory ran out", may_pass=True))
        assert played.client.state is WorkerState.DEAD
        await played.client.stop()

    asyncio.run(scene())
