"""Every sequence ends exactly once, whatever happens to its worker or its client."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from config.settings import EngineSettings
from decoding.messages import (
    Abort,
    Command,
    Decoded,
    Failed,
    FinishReason,
    Generate,
    Load,
    Loading,
    Ready,
    SamplingParams,
    StepReport,
)
from server.engine_client import EngineClient, TokenStream, WorkerState
from server.errors import ApiError, QueueFull, SlowReader, Unavailable, WorkerLost
from server.supervisor import WorkerCallbacks
from tests.scripted_engine import scripted_ready


class RecordedProcess:
    """Stands at the edge: keeps what was sent, and lets the test play the worker."""

    pid = 1
    is_congested = False

    def __init__(self) -> None:
        self.sent: list[Command] = []

    def start(self, callbacks: WorkerCallbacks) -> None:
        self.callbacks = callbacks

    def send(self, command: Command) -> None:
        self.sent.append(command)

    async def stop(self) -> None:
        self.sent.clear()


class Notes:
    """Observer and listener in one: remembers what it was told."""

    def __init__(self) -> None:
        self.discarded_tokens = 0
        self.lines: list[str] = []

    def worker_ready(self, ready: Ready) -> None:
        self.lines.append("worker ready")

    def step(self, report: StepReport) -> None:
        pass

    def discarded(self, num_tokens: int) -> None:
        self.discarded_tokens += num_tokens

    def loading(self, stage: str, fraction: float) -> None:
        self.lines.append(f"{stage} {fraction}")

    def ready(self, ready: Ready) -> None:
        self.lines.append("ready")

    def failed(self, message: str) -> None:
        self.lines.append(message)


class Played:
    """A client whose worker is the test."""

    def __init__(self, *, max_queued: int = 0, max_num_seqs: int = 4) -> None:
        self.process, self.notes = RecordedProcess(), Notes()
        self.client = EngineClient(
            self.process, max_queued=max_queued, observer=self.notes, listener=self.notes, clock=lambda: 0.0
        )
        self.client.start()
        self.settings = EngineSettings(max_num_seqs=max_num_seqs)

    def ready(self) -> Played:
        self.process.callbacks.on_event(scripted_ready(self.settings, "{}"))
        return self

    def step(self, *decoded: Decoded, num_running: int = 0) -> None:
        self.process.callbacks.on_event(StepReport(list(decoded), Load(num_running=num_running)))

    def submit(self, *sequence_ids: int) -> TokenStream:
        return self.client.submit([generate(sequence_id) for sequence_id in sequence_ids])


def generate(sequence_id: int) -> Generate:
    return Generate(sequence_id, [1], 8, SamplingParams(), 0, [0], 4, 3)


def said(sequence_id: int, *token_ids: int, finish: FinishReason | None = None) -> Decoded:
    return Decoded(sequence_id, list(token_ids), 0, 0, 4, finish)


async def drain(stream: TokenStream) -> tuple[list[Decoded], ApiError | None]:
    events: list[Decoded] = []
    try:
        while True:
            events += [arrival.decoded for arrival in await asyncio.wait_for(stream.next(), 0.01)]
    except TimeoutError:
        return events, None
    except ApiError as error:
        return events, error


def test_events_reach_their_stream_in_order():
    async def play() -> None:
        played = Played().ready()
        one, two = played.submit(1), played.submit(2, 3)
        played.step(said(1, 5), said(3, 6))
        played.step(said(2, 7), said(1, 8, finish=FinishReason.LENGTH))
        assert await drain(one) == ([said(1, 5), said(1, 8, finish=FinishReason.LENGTH)], None)
        assert await drain(two) == ([said(3, 6), said(2, 7)], None)
        assert played.client.num_open == 2

    asyncio.run(play())


def test_closing_a_stream_aborts_what_is_open_and_only_once():
    async def play() -> None:
        played = Played().ready()
        stream = played.submit(1, 2, 3)
        played.step(said(1, 5, finish=FinishReason.LENGTH))
        stream.end(2)
        stream.close()
        stream.close()
        assert played.process.sent[3:] == [Abort([2]), Abort([3])]
        assert played.client.num_open == 0

    asyncio.run(play())


def test_tokens_that_come_after_an_abort_are_discarded_and_counted():
    async def play() -> None:
        played = Played().ready()
        stream = played.submit(1)
        stream.close()
        played.step(said(1, 5, 6, 7))
        assert (await drain(stream))[0] == []
        assert played.notes.discarded_tokens == 3

    asyncio.run(play())


def test_worker_death_ends_open_streams_after_what_had_come():
    async def play() -> None:
        played = Played().ready()
        stream, ended = played.submit(1), played.submit(2)
        played.step(said(1, 5), said(2, 5, finish=FinishReason.STOP))
        played.process.callbacks.on_exit(-9)
        events, error = await drain(stream)
        assert events == [said(1, 5)]
        assert isinstance(error, WorkerLost)
        assert (await drain(ended))[0] == [said(2, 5, finish=FinishReason.STOP)]
        assert played.client.state is WorkerState.DEAD
        assert played.notes.lines[-1] == "the worker died (exit code -9)"
        stream.close()
        assert not [command for command in played.process.sent if isinstance(command, Abort)]

    asyncio.run(play())


def test_waiting_reader_is_woken_by_worker_death():
    async def play() -> None:
        played = Played().ready()
        reader = asyncio.ensure_future(played.submit(1).next())
        await asyncio.sleep(0)
        played.process.callbacks.on_exit(1)
        with pytest.raises(WorkerLost):
            await asyncio.wait_for(reader, 1)

    asyncio.run(play())


def test_nothing_is_let_in_beyond_the_batch_and_the_queue():
    async def play() -> None:
        played = Played(max_queued=2, max_num_seqs=2).ready()
        stream = played.submit(1, 2, 3)
        with pytest.raises(QueueFull) as caught:
            played.submit(4, 5)
        assert caught.value.retry_after_s is not None
        assert caught.value.retry_after_s >= 1
        assert len(played.process.sent) == 3
        played.submit(4)
        played.step(num_running=2)
        assert played.client.num_waiting == 2
        stream.close()
        played.submit(5, 6, 7)

    asyncio.run(play())


def test_no_work_is_taken_while_loading_after_death_or_while_stopping():
    async def play() -> None:
        loading, dead, stopping = Played(), Played().ready(), Played().ready()
        loading.process.callbacks.on_event(Loading("weights", 0.5))
        dead.process.callbacks.on_exit(1)
        stream = stopping.submit(1)
        stopping.client.refuse_work()
        for played, word in ((loading, "weights, 50%"), (dead, "gone"), (stopping, "shutting down")):
            with pytest.raises(Unavailable) as caught:
                played.submit(9)
            assert word in caught.value.message
        assert isinstance((await drain(stream))[1], Unavailable)

    asyncio.run(play())


def test_worker_that_takes_no_commands_gets_no_more():
    async def play() -> None:
        played = Played().ready()
        played.process.is_congested = True
        with pytest.raises(Unavailable):
            played.submit(1)
        assert played.client.num_open == 0

    asyncio.run(play())


def test_stream_that_nobody_reads_is_dropped():
    async def play() -> None:
        played = Played().ready()
        stream = played.submit(1)
        for _ in range(5000):
            played.step(said(1, 5))
        events, error = await drain(stream)
        assert isinstance(error, SlowReader)
        assert len(events) < 5000
        assert Abort([1]) in played.process.sent

    asyncio.run(play())


def events_of_start(*events: Loading | Ready | Failed, exit_code: int | None = None) -> Sequence[str]:
    async def play() -> Sequence[str]:
        played = Played()
        for event in events:
            played.process.callbacks.on_event(event)
        if exit_code is not None:
            played.process.callbacks.on_exit(exit_code)
        return played.notes.lines

    return asyncio.run(play())


def test_start_is_told_once_however_it_ends():
    assert events_of_start(Loading("a", 0.5), Failed("no"), exit_code=0) == ["a 0.5", "no"]
    assert events_of_start(exit_code=1) == ["the worker died while loading (exit code 1)"]
