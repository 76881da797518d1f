"""Kill the worker as you like: clients see a pause, and only who kills it every time sees an error."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import openai
import psutil
import pytest

from tests.server_process import REAL, SCRIPTED, Answer, Server, running, text_of, wait_until

LONG = {"prompt": "!slow and long", "max_tokens": 60, "draft_length": 0}
DRAFTERS = ("early_exit", "lookup", "hybrid", "none")

# Every one of them in a way of its own; the prompt of some repeats itself, for drafts that are looked up.
REQUESTS = [
    {
        "prompt": [318 + index, 290, 42, 7 + index, 290, 42, 7 + index] * (1 + index % 3),
        "max_tokens": 40 + index,
        "seed": index,
        "temperature": (0.0, 0.8, 1.2)[index % 3],
        "top_p": (1.0, 0.9)[index % 2],
        "exit_layer": (None, 1, 2, 3, 5)[index % 5],
        "draft_length": (None, 0, 1, 3, 6)[index % 4],
        "drafter": DRAFTERS[index % 4],
        "frequency_penalty": (0.0, 0.7)[index % 2],
        "repetition_penalty": (1.0, 1.2)[index // 2 % 2],
        "min_tokens": (0, 30)[index // 4 % 2],
        "logprobs": (None, 2)[index // 3 % 2],
        "ignore_eos": index % 4 > 0,
        "stop": ["\n\n"] if index % 5 == 0 else None,
        "n": 2 if index == 6 else 1,
        "return_token_ids": True,
        "stream_options": {"include_usage": True},
    }
    for index in range(16)
]


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The real server in float64, so that a text is what it is whatever it is decoded beside."""
    flags = ("--dtype", "float64", "--num-threads", "1", "--queue-timeout-s", "600")
    with running(REAL, tmp_path_factory.mktemp("exact"), *flags) as server:
        server.wait_ready()
        server.patience_s = 600
        yield server


def told(events: Sequence[str]):
    """All that a stream said, choice by choice and without the cuts between its events."""
    assert events[-1] == "[DONE]", events[-1]
    choices: dict[int, dict] = {}
    chunks = [json.loads(event) for event in events[:-1]]
    for chunk in chunks:
        for part in chunk["choices"]:
            choice = choices.setdefault(part["index"], {"text": "", "ids": [], "logprobs": {}})
            choice["text"] += part["text"]
            choice["ids"] += part["token_ids"] or []
            choice["finish"] = (part["finish_reason"], part["stop_reason"])
            for name, values in (part["logprobs"] or {}).items():
                choice["logprobs"].setdefault(name, []).extend(values)
    usage = {name: chunks[-1]["usage"][name] for name in ("prompt_tokens", "completion_tokens")}
    return choices, usage


def assert_alike(one, other) -> None:
    """Equal, but for what sums in another order do to the last digits of a log-probability."""
    if isinstance(one, float):
        assert one == pytest.approx(other, abs=1e-6)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_alike(one[name], other[name])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for each, counterpart in zip(one, other, strict=True):
            assert_alike(each, counterpart)
    else:
        assert one == other


def all_at_once(
    server: Server, requests: Sequence[dict], *, on_event: Callable[[], None] = lambda: None
) -> list[list[str]]:
    """The events of all these streams."""

    def read(request: dict) -> list[str]:
        events = []
        with server.streaming(**request) as arriving:
            for event in arriving:
                events.append(event)
                on_event()
        return events

    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(read, requests))


class KillAfter:
    """Kills the worker when so many events have come to all streams together."""

    def __init__(self, server: Server, num_events: int) -> None:
        self._pid = server.worker_pid
        self._left = num_events
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self._left -= 1
            if self._left == 0:
                os.kill(self._pid, signal.SIGKILL)


def num_resumed(server: Server) -> float:
    return server.metric("layerskip_requests_resumed_total")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sixteen_streams_say_the_same_whether_the_worker_was_killed_or_not(exact: Server) -> None:
    whole = all_at_once(exact, REQUESTS)
    expected = [told(events) for events in whole]
    assert any(usage["completion_tokens"] > 40 for _, usage in expected)
    for _ in range(2):
        before, restarts = num_resumed(exact), exact.metric("layerskip_worker_restarts_total")
        num_events = random.randint(1, sum(map(len, whole)) // 2)
        streams = all_at_once(exact, REQUESTS, on_event=KillAfter(exact, num_events))
        for index, events in enumerate(streams):
            choices, usage = told(events)
            assert_alike([*expected[index]], [choices, usage])
        assert num_resumed(exact) - before >= 4, num_events
        assert exact.metric("layerskip_worker_restarts_total") - restarts == 1
        exact.wait_idle()


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
