"""A worker that hangs is ended and followed by another, as if it had died; one that only takes its time is not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from server.deadlines import Deadlines
from server.engine_client import WorkerState
from server.hang_watch import HangWatch
from tests.played_worker import Played, said
from tests.server_process import SCRIPTED, running, wait_until

LONGEST_S = 0.2


def play(scene: Callable[[Played], Awaitable[None]], *, step_timeout_s: float = LONGEST_S) -> None:
    async def run() -> None:
        stage = Played(deadlines=Deadlines(step_s=step_timeout_s), clock=time.monotonic)
        await scene(stage)
        await stage.client.stop()

    asyncio.run(run())


def test_a_worker_that_falls_silent_is_ended_and_its_request_goes_on_elsewhere() -> None:
    async def scene(played: Played) -> None:
        played.ready().submit(1)
        played.step(said(1, 5), num_running=1)
        await asyncio.sleep(LONGEST_S / 2)
        hung = played.process
        assert not hung.has_been_ended
        await asyncio.sleep(LONGEST_S)
        assert hung.has_been_ended
        played.die()
        assert played.client.state is WorkerState.RESTARTING
        assert played.notes.lines[2].startswith("the worker hung; another starts in 0.1 s: 1 requests wait")
        await played.restarted()
        assert played.process.given[0].resumed_ids == [5]
        assert not played.process.has_been_ended

    play(scene)


def test_a_worker_that_is_heard_now_and_then_is_left_alone() -> None:
    async def scene(played: Played) -> None:
        played.ready().submit(1)
        for _ in range(5):
            await asyncio.sleep(LONGEST_S / 2)
            played.step(said(1, 5), num_running=1)
        assert not played.process.has_been_ended

    play(scene)


def test_loading_and_warm_up_may_take_as_long_as_they_like() -> None:
    async def scene(played: Played) -> None:
        await asyncio.sleep(2 * LONGEST_S)
        assert not played.process.has_been_ended

    play(scene)


def test_no_limit_is_none() -> None:
    async def scene(played: Played) -> None:
        played.ready().submit(1)
        await asyncio.sleep(LONGEST_S)
        assert not played.process.has_been_ended

    play(scene, step_timeout_s=0.0)


@pytest.mark.parametrize("stood_still", [False, True])
def test_a_silence_in_which_this_process_stood_still_itself_does_not_count(stood_still: bool) -> None:
    silent_s, ended = 0.0, []

    async def scene() -> None:
        nonlocal silent_s
        watch = HangWatch(LONGEST_S, silent_s=lambda: silent_s, on_hang=lambda: ended.append(1))
        watch.start()
        silent_s = 2 * LONGEST_S
        if stood_still:
            time.sleep(LONGEST_S)
            await asyncio.sleep(0)
            # Now what came meanwhile is heard.
            silent_s = 0.0
        await asyncio.sleep(LONGEST_S / 2)
        watch.stop()

    asyncio.run(scene())
    assert bool(ended) is not stood_still


def test_who_hangs_every_worker_fails_alone_and_where_it_hung_is_told(tmp_path) -> None:
    with running(SCRIPTED, tmp_path, "--step-timeout-s", "2") as server, ThreadPoolExecutor() as pool:
        server.wait_ready()
        alone = server.text(prompt="!slow and long", max_tokens=60, draft_length=0)
        innocent = pool.submit(server.text, prompt="!slow and long", max_tokens=60, draft_length=0)
        wait_until(lambda: server.metric("vllm:num_requests_running") == 1)
        answer = server.post({"prompt": "!hang now", "max_tokens": 99})
        assert (answer.status, answer.json["error"]["code"]) == (500, "worker_lost")
        assert innocent.result() == alone
        wait_until(lambda: server.metric("layerskip_worker_restarts_total") == 2)
        assert "the worker hung; another starts" in server.stderr
        assert "in obey" in server.stderr
