"""Every sequence ends exactly once, whatever happens to its worker or its client."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from decoding.messages import Abort, Failed, FinishReason, Loading, Ready
from server.errors import QueueFull, SlowReader, Unavailable
from tests.played_worker import Played, drain, said


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


def test_no_work_is_taken_while_loading_restarting_or_stopping_or_after_a_start_that_failed():
    async def play() -> None:
        loading, failed, restarting, stopping = Played(), Played(), Played().ready(), Played().ready()
        loading.process.callbacks.on_event(Loading("weights", 0.5))
        failed.die()
        restarting.die()
        stream = stopping.submit(1)
        stopping.client.refuse_work()
        words = {loading: "weights, 50%", failed: "gone", restarting: "restarted", stopping: "shutting down"}
        for played, word in words.items():
            with pytest.raises(Unavailable) as caught:
                played.submit(9)
            assert word in caught.value.message
            assert caught.value.headers == {"Retry-After": "1"}
        assert isinstance((await drain(stream))[1], Unavailable)
        await restarting.client.stop()

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
