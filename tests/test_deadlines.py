"""Nobody waits, decodes or holds memory for longer than the operator allows."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import weakref
from collections.abc import Iterator

import psutil
import pytest

from decoding.messages import Abort, FinishReason
from server.deadlines import Deadlines
from server.edge import CONNECTION, Connection, Edge
from server.errors import QueueTimeout, RequestTimeout
from tests.played_worker import Played, drain, said
from tests.server_process import REAL, SCRIPTED, Server, running, wait_until

LONG = {"prompt": "!slow and long", "max_tokens": 400}
# The scripted engine keeps at most two of three drafts in a step.
MOST_TOKENS_OF_A_STEP = 3
STEP_MS = 20


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A scripted server whose answers may take a second and a half."""
    flags = ("--request-timeout-s", "1.5")
    with running(SCRIPTED, tmp_path_factory.mktemp("hasty"), *flags) as server:
        server.wait_ready()
        yield server


def rejected(server: Server, reason: str) -> float:
    return server.metric("layerskip_rejected_requests_total", reason=reason)


def test_request_that_waits_too_long_is_aborted_and_those_in_the_batch_are_not():
    async def play() -> None:
        played = Played(max_queued=2, deadlines=Deadlines(queue_s=0.02)).ready()
        silent, spoken, half, waiting = (played.submit(*ids) for ids in ([1], [2], [3, 4], [5, 6]))
        # The first three have a place; the first says nothing yet, because its prompt is long.
        played.step(said(2, 5), num_running=3)
        await asyncio.sleep(0.1)
        assert isinstance((await drain(waiting))[1], QueueTimeout)
        assert played.process.sent[6:] == [Abort([5, 6])]
        for stream in (silent, spoken, half):
            assert (await drain(stream))[1] is None
        assert played.notes.expiries == ["queue_timeout"]

    asyncio.run(play())


def test_only_request_never_waits_for_a_place():
    async def play() -> None:
        played = Played(deadlines=Deadlines(queue_s=0.02)).ready()
        stream = played.submit(1)
        await asyncio.sleep(0.1)
        assert await drain(stream) == ([], None)

    asyncio.run(play())


def test_answer_that_takes_too_long_ends_after_what_had_come():
    async def play() -> None:
        played = Played(deadlines=Deadlines(total_s=0.02)).ready()
        late, done = played.submit(1), played.submit(2)
        played.step(said(1, 5), said(2, 6, finish=FinishReason.STOP), num_running=2)
        await asyncio.sleep(0.1)
        events, error = await drain(late)
        assert events == [said(1, 5)]
        assert isinstance(error, RequestTimeout)
        assert await drain(done) == ([said(2, 6, finish=FinishReason.STOP)], None)
        assert played.process.sent[2:] == [Abort([1])]
        assert played.notes.expiries == ["request_timeout"]

    asyncio.run(play())


def test_closed_stream_has_no_deadline_left():
    async def play() -> None:
        played = Played(deadlines=Deadlines(queue_s=0.02, total_s=0.02)).ready()
        stream = played.submit(1)
        stream.close()
        await asyncio.sleep(0.1)
        assert played.notes.expiries == []
        assert played.process.sent[1:] == [Abort([1])]

    asyncio.run(play())


def test_closed_stream_is_not_kept_until_its_deadline():
    async def play() -> None:
        played = Played(deadlines=Deadlines(queue_s=1000, total_s=1000)).ready()
        stream = played.submit(1)
        stream.close()
        kept = weakref.ref(stream)
        del stream
        gc.collect()
        assert kept() is None

    asyncio.run(play())


def test_connection_that_takes_nothing_is_cut_off_and_counted():
    async def answer(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def play() -> None:
        cut_off, never = asyncio.Event(), asyncio.Event()
        reasons: list[str] = []
        edge = Edge(
            answer,
            max_body_bytes=1024,
            slow_reader_timeout_s=0.02,
            count=lambda reason, _: reasons.append(reason),
        )
        state = {CONNECTION: Connection(cut_off.set)}
        scope = {"type": "http", "method": "GET", "raw_path": b"/", "headers": [], "state": state}
        await edge(scope, never.wait, lambda _: never.wait())
        assert cut_off.is_set()
        assert reasons == ["slow_reader"]

    asyncio.run(play())


def test_whole_answer_that_takes_too_long_is_a_504_that_is_not_retried(hasty):
    before = rejected(hasty, "request_timeout")
    answer = hasty.post(LONG)
    assert answer.status == 504
    assert answer.error["code"] == "request_timeout"
    assert answer.headers["x-should-retry"] == "false"
    assert rejected(hasty, "request_timeout") == before + 1


def test_stream_that_takes_too_long_ends_with_an_error_and_frees_its_blocks_within_100_ms(hasty):
    hasty.wait_idle()
    before = hasty.metric("layerskip_discarded_tokens_total")
    events = hasty.stream(**LONG)
    assert len(events) > 2
    assert json.loads(events[-1])["error"]["code"] == "request_timeout"
    hasty.wait_idle()
    # By the engine's own clock: had it held the sequence for longer, it would have decoded more of it.
    late_tokens = hasty.metric("layerskip_discarded_tokens_total") - before
    assert late_tokens <= MOST_TOKENS_OF_A_STEP * 100 / STEP_MS
    assert hasty.metric("layerskip_kv_blocks", state="used") == 0


def test_answer_in_time_is_whole(hasty):
    assert hasty.complete(prompt="a", max_tokens=50)["usage"]["completion_tokens"] == 50


def test_client_that_reads_nothing_is_dropped_and_its_blocks_are_freed(tmp_path):
    flags = ("--slow-reader-timeout-s", "0.5", "--max-prompts", "64")
    with running(SCRIPTED, tmp_path, *flags) as server, socket.socket() as client:
        server.wait_ready()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        prompts = ["!slow and long", *["talkative"] * 60]
        body = json.dumps({"prompt": prompts, "max_tokens": 490, "stream": True, "return_token_ids": True})
        head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n"
        client.sendall(f"{head}Content-Type: application/json\r\n\r\n{body}".encode())
        wait_until(lambda: server.metric("layerskip_kv_blocks", state="used") > 0)
        wait_until(lambda: rejected(server, "slow_reader") == 1)
        server.wait_idle()
        assert server.metric("layerskip_aborted_requests_total") > 0
        assert "remark=slow_reader" in server.stderr
        ports = [c.raddr.port for c in psutil.Process(server.process.pid).net_connections() if c.raddr]
        assert client.getsockname()[1] not in ports


def test_request_without_a_place_in_time_is_a_503_and_never_decoded(tmp_path):
    flags = ("--num-threads", "1", "--num-blocks", "512", "--max-num-seqs", "1", "--queue-timeout-s", "0.2")
    with running(REAL, tmp_path, *flags) as server:
        server.wait_ready()
        max_tokens = server.get("/v1/models").json["data"][0]["max_model_len"] - 8
        with server.streaming(
            prompt=[1] * 8, max_tokens=max_tokens, ignore_eos=True, draft_length=0
        ) as ahead:
            next(ahead)
            for stream in (False, True):
                late = server.post({"prompt": "a", "stream": stream})
                assert (late.status, late.error["code"]) == (503, "queue_timeout")
                assert int(late.headers["retry-after"]) >= 1
            assert next(ahead)
        assert rejected(server, "queue_timeout") == 2
        server.wait_idle()
        # The scheduler counts a prompt when it gets its place.
        assert server.metric("vllm:prefix_cache_queries_total") == 8
