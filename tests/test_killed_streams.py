"""Streams of the real engine say the same whether its worker was killed or not."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.server_process import REAL, Server, running

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
    flags = ("--dtype", "float64", "--num-threads", "1", "--num-blocks", "1024", "--queue-timeout-s", "600")
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


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("num_kills", [1, pytest.param(6, marks=pytest.mark.exhaustive)])
def test_sixteen_streams_say_the_same_whether_the_worker_was_killed_or_not(
    exact: Server, num_kills: int
) -> None:
    whole = all_at_once(exact, REQUESTS)
    expected = [told(events) for events in whole]
    assert any(usage["completion_tokens"] > 40 for _, usage in expected)
    for _ in range(num_kills):
        resumed, restarts = (
            exact.metric("layerskip_requests_resumed_total"),
            exact.metric("layerskip_worker_restarts_total"),
        )
        num_events = random.randint(1, sum(map(len, whole)) // 2)
        streams = all_at_once(exact, REQUESTS, on_event=KillAfter(exact, num_events))
        for index, events in enumerate(streams):
            choices, usage = told(events)
            assert_alike([*expected[index]], [choices, usage])
        assert exact.metric("layerskip_requests_resumed_total") - resumed >= 4, num_events
        assert exact.metric("layerskip_worker_restarts_total") - restarts == 1
        exact.wait_idle()
