"""Kill the worker as you like: clients see a pause, and only who kills it every time sees an error."""

from __future__ import annotations

import json
import os
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor

import openai
import psutil
import pytest

from tests.server_process import SCRIPTED, Answer, Server, running, text_of, wait_until

LONG = {"prompt": "!slow and long", "max_tokens": 60, "draft_length": 0}


def num_resumed(server: Server) -> float:
    return server.metric("layerskip_requests_resumed_total")


def ask(pool: ThreadPoolExecutor, server: Server, **body: object) -> Future[Answer]:
    return pool.submit(server.post, body)


def wait_running(server: Server, number: int) -> None:
    wait_until(lambda: server.metric("vllm:num_requests_running") == number)


def test_clients_of_a_killed_worker_see_a_pause(tmp_path) -> None:
    with running(SCRIPTED, tmp_path) as server, ThreadPoolExecutor(8) as pool:
        server.wait_ready()
        whole = server.complete(**LONG)
        streams = [pool.submit(server.stream, **LONG) for _ in range(3)]
        answers = [ask(pool, server, **LONG, n=2), ask(pool, server, **LONG)]
        wait_running(server, 6)
        os.kill(server.worker_pid, signal.SIGKILL)
        wait_until(lambda: server.health() == 503)
        health = server.get("/health")
        assert health.json["status"] == "restarting"
        assert health.json["models"] == {"python-8m": "restarting"}
        assert server.get("/health/ready").status == 503
        assert server.get("/health/live").status == 200
        refusal = server.post({"prompt": "a"})
        assert (refusal.status, refusal.error["code"]) == (503, "unavailable")
        assert int(refusal.headers["retry-after"]) >= 1
        for stream in streams:
            events = stream.result(60)
            assert events[-1] == "[DONE]"
            assert text_of(events) == whole["choices"][0]["text"]
        for answer in answers:
            got = answer.result(60).json
            assert {choice["text"] for choice in got["choices"]} == {whole["choices"][0]["text"]}
            assert got["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"]
            assert got["usage"]["completion_tokens"] == 60 * len(got["choices"])
        assert server.metric("layerskip_worker_restarts_total") == 1
        assert num_resumed(server) == 5
        assert server.metric("vllm:request_success_total", finished_reason="error") == 0
        line = "layerskip: the worker died (exit code -9); another starts in 0.1 s: 5 requests wait to be resumed"
        assert line in server.stderr


@pytest.mark.parametrize("killer", ["!die", "!choke"])
def test_a_request_that_kills_every_worker_fails_alone(tmp_path, killer: str) -> None:
    with running(SCRIPTED, tmp_path) as server, ThreadPoolExecutor(8) as pool:
        server.wait_ready()
        text = server.text(**LONG)
        innocent = [ask(pool, server, **LONG, n=1 + index % 2) for index in range(5)]
        wait_running(server, 7)
        fatal = server.post({"prompt": killer, "max_tokens": 20})
        assert (fatal.status, fatal.error["code"]) == (500, "worker_lost")
        assert fatal.headers["x-should-retry"] == "false"
        for answer in innocent:
            assert {choice["text"] for choice in answer.result(60).json["choices"]} == {text}
        server.wait_ready()
        assert server.metric("layerskip_worker_restarts_total") == 2
        assert server.metric("vllm:request_success_total", finished_reason="error") == 1


def test_a_stream_that_had_begun_ends_with_an_error(tmp_path) -> None:
    with running(SCRIPTED, tmp_path) as server:
        server.wait_ready()
        events = server.stream(prompt="!die", max_tokens=20)
        assert len(events) > 1
        assert json.loads(events[-1])["error"]["code"] == "worker_lost"
        assert "[DONE]" not in events
        server.wait_ready()
        with (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=5) as client,
            pytest.raises(openai.InternalServerError),
        ):
            client.completions.create(model="python-8m", prompt="!die", max_tokens=20)
        # Sent once, although the client would have tried five times more.
        assert server.metric("vllm:request_success_total", finished_reason="error") == 2
        server.wait_ready()
        assert server.text(prompt="a", max_tokens=3)


@pytest.mark.slow
def test_a_second_kill_from_outside_costs_one_request(tmp_path) -> None:
    with running(SCRIPTED, tmp_path) as server, ThreadPoolExecutor(16) as pool:
        server.wait_ready()
        text = server.text(**LONG)
        answers = [ask(pool, server, **LONG) for _ in range(16)]
        wait_running(server, 16)
        os.kill(server.worker_pid, signal.SIGKILL)
        wait_running(server, 0)
        wait_running(server, 1)
        os.kill(server.worker_pid, signal.SIGKILL)
        statuses = sorted(answer.result(120).status for answer in answers)
        assert statuses == [200] * 15 + [500]
        assert {a.result().json["choices"][0]["text"] for a in answers if a.result().status == 200} == {text}


def test_a_worker_that_dies_again_and_again_ends_the_server_with_exit_code_1(tmp_path) -> None:
    with running(SCRIPTED, tmp_path) as server:
        for _ in range(5):
            server.wait_ready()
            pid = server.worker_pid
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: server.health() != 200)
        assert server.process.wait(20) == 1
        assert "Traceback" not in server.stderr
        died = [line for line in server.stderr.splitlines() if "the worker died" in line]
        assert len(died) == 5
        assert died[-1].endswith("the last of 5 times in which it finished no request; no other is started")


def test_a_checkpoint_that_is_gone_at_the_restart_ends_the_server(tmp_path) -> None:
    folder = tmp_path / "fleeting"
    folder.mkdir()
    with running(SCRIPTED, tmp_path, "--model", str(folder)) as server:
        server.wait_ready()
        folder.rmdir()
        with server.streaming(**LONG) as events:
            next(events)
            os.kill(server.worker_pid, signal.SIGKILL)
            *_, last = events
        assert json.loads(last)["error"]["code"] == "worker_lost"
        assert server.process.wait(20) == 1
        assert "layerskip: fleeting: no such checkpoint" in server.stderr


def test_sigterm_during_a_restart_still_lets_everyone_finish(tmp_path) -> None:
    with running(SCRIPTED, tmp_path) as server:
        server.wait_ready()
        with server.streaming(**LONG) as events:
            next(events)
            os.kill(server.worker_pid, signal.SIGKILL)
            wait_until(lambda: server.health() == 503)
            server.process.send_signal(signal.SIGTERM)
            *_, last = events
        assert last == "[DONE]"
        assert server.process.wait(20) == 0


@pytest.mark.slow
def test_restarts_leave_no_process_thread_or_descriptor_behind(tmp_path) -> None:
    with running(SCRIPTED, tmp_path) as server:
        server.wait_ready()
        process = psutil.Process(server.process.pid)

        def held() -> tuple[int, int, int]:
            """What it has but for connections, which come and go with the test's own requests."""
            num_files = process.num_fds() - len(process.net_connections("tcp"))
            return len(process.children()), process.num_threads(), num_files

        def settled() -> list[int]:
            """The least of each within half a second: what is about to end is not counted."""
            samples = []
            for _ in range(10):
                samples.append(held())
                time.sleep(0.05)
            return [min(column) for column in zip(*samples, strict=True)]

        counts = []
        for _ in range(5):
            assert server.text(prompt="a", max_tokens=3)
            os.kill(server.worker_pid, signal.SIGKILL)
            wait_until(lambda: server.health() == 503)
            server.wait_ready()
            counts.append(settled())
        # What one restart leaves behind, four leave four times; a pool of threads may still have grown by one.
        growth = [last - first for first, last in zip(counts[0], counts[-1], strict=True)]
        assert growth[0] <= 0
        assert max(growth) < 4
