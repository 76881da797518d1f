"""A worker that dies is followed by another, which goes on where it was; only who kills it twice fails."""

from __future__ import annotations

import asyncio
import time

import pytest
from msgspec.structs import replace

from decoding.messages import Abort, Failed, FinishReason, Load, StepReport
from server.deadlines import Deadlines
from server.engine_client import WorkerState
from server.errors import QueueTimeout, WorkerLost, WorkerLostTwice
from server.restarts import MAX_FRUITLESS_DEATHS
from tests.played_worker import Played, drain, error_of, generate, given_ids, play, said
from tests.scripted_engine import scripted_ready

LENGTH = FinishReason.LENGTH


def test_what_was_open_goes_on_behind_what_had_come() -> None:
    async def scene(played: Played) -> None:
        stream = played.submit(1)
        played.step(said(1, 5, 6))
        played.step(said(1, 7))
        played.die()
        assert played.client.state is WorkerState.RESTARTING
        await played.restarted()
        assert played.process.sent == [replace(generate(1), resumed_ids=[5, 6, 7])]
        played.step(said(1, 8, finish=LENGTH))
        ids = [decoded.token_ids for decoded in (await drain(stream))[0]]
        assert ids == [[5, 6], [7], [8]]
        assert (played.notes.num_restarts, played.notes.num_resumed) == (1, 1)
        assert played.notes.lines[2] == (
            "the worker died (exit code -9); another starts in 0.1 s: 1 requests wait to be resumed, 0 failed"
        )

    play(scene)


def test_prompt_logprobs_come_once() -> None:
    async def scene(played: Played) -> None:
        asked = [replace(generate(sequence_id), prompt_logprobs=2) for sequence_id in (1, 2)]
        played.client.submit(asked)
        played.step(said(1, 5))
        played.die()
        await played.restarted()
        assert [sequence.prompt_logprobs for sequence in played.process.given] == [None, 2]

    play(scene)


def test_the_ended_and_the_aborted_are_not_resumed() -> None:
    async def scene(played: Played) -> None:
        streams = [played.submit(sequence_id) for sequence_id in (1, 2, 3, 4)]
        played.step(said(1, 5, finish=LENGTH), said(2, 5))
        streams[1].close()
        played.die()
        streams[2].close()
        await played.restarted()
        assert given_ids(played) == [4]
        assert not [command for command in played.process.sent if isinstance(command, Abort)]
        assert [decoded.token_ids for decoded in (await drain(streams[0]))[0]] == [[5]]
        assert played.client.num_open == 1

    play(scene)


def test_suspects_run_one_by_one_and_newcomers_after_them() -> None:
    async def scene(played: Played) -> None:
        played.submit(1), played.submit(2, 3)
        played.die()
        await played.restarted()
        played.submit(4)
        assert given_ids(played) == [1]
        played.step(said(1, 5), num_running=1)
        assert given_ids(played) == [1]
        played.step(said(1, 6, finish=LENGTH))
        assert given_ids(played) == [1, 2, 3]
        played.step(said(2, 5, finish=LENGTH), num_running=1)
        assert given_ids(played) == [1, 2, 3]
        played.step(said(3, 5, finish=LENGTH))
        assert given_ids(played) == [1, 2, 3, 4]
        played.submit(5)
        assert given_ids(played) == [1, 2, 3, 4, 5]
        assert played.notes.num_resumed == 2

    play(scene, lambda: Played(max_queued=9))


def test_the_next_suspect_waits_until_nothing_of_an_aborted_one_is_left() -> None:
    async def scene(played: Played) -> None:
        first, _ = played.submit(1), played.submit(2)
        played.die()
        await played.restarted()
        played.step(num_running=1)
        first.close()
        assert given_ids(played) == [1]
        played.step(num_running=1)
        assert given_ids(played) == [1]
        played.step()
        assert given_ids(played) == [1, 2]

    play(scene)


def test_an_aborted_suspect_that_was_not_taken_yet_is_not_thought_to_have_left() -> None:
    async def scene(played: Played) -> None:
        first, _ = played.submit(1), played.submit(2)
        played.die()
        await played.restarted()
        first.close()
        idle = StepReport([], Load(), num_taken=0)
        played.process.callbacks.on_event(idle)
        assert given_ids(played) == [1]
        played.process.callbacks.on_event(replace(idle, num_taken=1))
        assert given_ids(played) == [1, 2]

    play(scene)


def test_who_is_there_at_two_deaths_fails_alone_and_is_not_to_be_sent_again() -> None:
    async def scene(played: Played) -> None:
        killer, innocent = played.submit(1, 2), played.submit(3)
        played.step(said(1, 5), said(3, 5))
        played.die()
        await played.restarted()
        played.step(said(2, 6), num_running=2)
        played.die()
        events, error = await drain(killer)
        assert events == [said(1, 5), said(2, 6)]
        assert isinstance(error, WorkerLostTwice)
        assert (error.status, error.code, error.headers) == (500, "worker_lost", {"x-should-retry": "false"})
        await played.restarted()
        assert played.process.given == [replace(generate(3), resumed_ids=[5])]
        played.step(said(3, 6, finish=LENGTH))
        assert await error_of(innocent) is None
        assert "0 requests wait" not in " ".join(played.notes.lines)
        assert played.notes.lines[5].endswith("1 requests wait to be resumed, 1 failed")

    play(scene)


def test_who_only_waited_behind_a_full_batch_is_no_suspect() -> None:
    async def scene(played: Played) -> None:
        for sequence_id in range(1, 7):
            played.submit(sequence_id)
        played.step(num_running=2)
        played.submit(7)
        played.die()
        await played.restarted()
        # 1 and 2 had the places of the batch; nobody knows whether 7 killed the worker when it was taken.
        for count, suspect in enumerate((1, 2, 7), start=1):
            assert len(played.process.given) == count
            assert given_ids(played)[-1] == suspect
            played.step(said(suspect, 5, finish=LENGTH))
        assert given_ids(played) == [1, 2, 7, 3, 4, 5, 6]

    play(scene, lambda: Played(max_num_seqs=2, max_queued=9))


def test_death_of_an_idle_worker_is_nobodys_fault() -> None:
    async def scene(played: Played) -> None:
        played.die()
        await played.restarted()
        assert played.client.state is WorkerState.READY
        played.submit(1), played.submit(2)
        assert given_ids(played) == [1, 2]
        assert played.notes.num_resumed == 0

    play(scene)


def test_it_gives_up_when_nothing_is_ever_finished() -> None:
    async def scene(played: Played) -> None:
        streams = [played.submit(sequence_id) for sequence_id in range(1, 5)]
        for _ in range(MAX_FRUITLESS_DEATHS - 1):
            played.die(7)
            await played.restarted()
        last = played.submit(9)
        played.die(7)
        assert played.client.state is WorkerState.DEAD
        assert played.client.is_gone
        # The killers of the second death and after fail for themselves; who came last, with the worker.
        assert [type(await error_of(stream)) for stream in streams] == [WorkerLostTwice] * 4
        assert type(await error_of(last)) is WorkerLost
        assert played.notes.lines[-1].startswith("the worker died (exit code 7), the last of 5 times")

    play(scene)


def test_it_goes_on_where_something_was_finished() -> None:
    async def scene(played: Played) -> None:
        for _ in range(MAX_FRUITLESS_DEATHS - 1):
            played.die(7)
            await played.restarted()
        played.submit(1)
        played.step(said(1, 5, finish=LENGTH))
        played.die(7)
        assert played.client.state is WorkerState.RESTARTING

    play(scene)


def test_a_restart_that_is_refused_is_the_end() -> None:
    async def scene(played: Played) -> None:
        stream = played.submit(1)
        played.die()
        num_workers = len(played.workers)
        while len(played.workers) == num_workers:
            await asyncio.sleep(0.01)
        played.process.callbacks.on_event(Failed("no such checkpoint"))
        played.die(0)
        assert played.client.is_gone
        assert type(await error_of(stream)) is WorkerLost
        assert played.notes.lines[-1] == "no such checkpoint"

    play(scene)


def test_a_worker_that_dies_while_it_is_restarted_is_followed_by_another() -> None:
    async def scene(played: Played) -> None:
        played.submit(1)
        played.die()
        for num_workers in (2, 3):
            while len(played.workers) < num_workers:
                await asyncio.sleep(0.01)
            played.die(1)
        await played.restarted()
        assert given_ids(played) == [1]
        assert [line.split(": ")[0].split()[-2] for line in played.notes.lines[2:5]] == ["0.1", "0.2", "0.4"]

    play(scene)


@pytest.mark.parametrize("change", [{"revision": "other"}, {"text": "other"}])
def test_nothing_is_resumed_on_another_checkpoint(change: dict[str, str]) -> None:
    async def scene(played: Played) -> None:
        stream = played.submit(1)
        played.die()
        ready = scripted_ready(played.settings, "{}")
        if "text" in change:
            change["text"] = replace(ready.text, tokenizer_json="{ }")
        while len(played.workers) < 2:
            await asyncio.sleep(0.01)
        played.process.callbacks.on_event(replace(ready, **change))
        assert type(await error_of(stream)) is WorkerLost
        assert played.process.given == []
        played.submit(2)
        assert given_ids(played) == [2]

    play(scene)


def test_stopping_starts_no_other_worker() -> None:
    async def scene(played: Played) -> None:
        stream = played.submit(1)
        played.die()
        await played.client.stop()
        await asyncio.sleep(0.2)
        assert len(played.workers) == 1
        assert (await error_of(stream)).code == "unavailable"

    play(scene)


def test_the_time_in_which_suspects_run_alone_is_not_waited_for_a_place() -> None:
    async def scene(played: Played) -> None:
        suspects = [played.submit(1), played.submit(2)]
        played.step(num_running=2)
        played.die()
        await played.restarted()
        newcomers = [played.submit(sequence_id) for sequence_id in (3, 4, 5)]
        for suspect in (1, 2):
            await asyncio.sleep(0.3)
            assert given_ids(played)[-1] == suspect
            played.step(said(suspect, 5, finish=LENGTH))
        # Now all are in line again: two have places, the last waits as long as anyone may.
        played.step(num_running=2)
        await asyncio.sleep(0.1)
        assert [await error_of(stream) for stream in (*suspects, *newcomers)] == [None] * 5
        await asyncio.sleep(0.3)
        assert [await error_of(stream) for stream in newcomers[:2]] == [None] * 2
        assert isinstance(await error_of(newcomers[2]), QueueTimeout)

    play(
        scene,
        lambda: Played(max_num_seqs=2, max_queued=9, deadlines=Deadlines(queue_s=0.2), clock=time.monotonic),
    )
