"""SIGTERM: what runs comes to its end, nothing new begins, and the process ends with 0."""

from __future__ import annotations

import http.client
import json
import signal
import threading

import pytest

from tests.server_process import SCRIPTED, Answer, Server, is_alive, running, wait_until

SLOW = {"prompt": "!slow and steady", "max_tokens": 200}
LONG = {"prompt": "!slow and long", "max_tokens": 400}


def drain(server: Server) -> None:
    server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: server.get("/health").json["status"] == "draining")


def test_running_requests_finish_whether_streamed_or_not(tmp_path):
    with running(SCRIPTED, tmp_path) as server:
        server.wait_ready()
        worker = server.worker_pid
        whole = server.stream(**SLOW)
        answers: list[Answer] = []
        asking = threading.Thread(target=lambda: answers.append(server.post(SLOW)))
        with server.streaming(**SLOW) as events:
            first = next(events)
            asking.start()
            wait_until(lambda: server.metric("vllm:num_requests_running") == 2)
            drain(server)
            streamed = [first, *events]
        asking.join(20)
        assert len(streamed) == len(whole)
        assert streamed[-1] == "[DONE]"
        assert answers[0].status == 200
        assert answers[0].json["usage"]["completion_tokens"] == 200
        assert server.process.wait(20) == 0
        assert not is_alive(worker)
        assert "Traceback" not in server.stderr


def test_nothing_new_begins_while_readiness_says_why(tmp_path):
    with running(SCRIPTED, tmp_path) as server:
        server.wait_ready()
        with server.streaming(**LONG) as events:
            next(events)
            kept = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
            kept.request("GET", "/version")
            kept.getresponse().read()
            drain(server)
            for path in ("/health", "/health/ready", "/ping"):
                answer = server.get(path)
                assert (answer.status, answer.json["status"]) == (503, "draining")
            assert server.get("/health/live").status == 200
            assert server.metric("vllm:num_requests_running") == 1
            for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
                refusal = server.post({"prompt": "a"}, path=path)
                assert (refusal.status, refusal.error["code"]) == (503, "draining")
                assert int(refusal.headers["retry-after"]) >= 1
                assert {name.lower(): value for name, value in refusal.headers.items()}[
                    "connection"
                ] == "close"
            assert server.metric("layerskip_rejected_requests_total", reason="draining") == 3
            kept.request("GET", "/version")
            assert kept.getresponse().getheader("connection") == "close"
            kept.close()
            assert next(events)
            assert server.process.poll() is None


def test_what_outlasts_the_timeout_ends_with_an_error(tmp_path):
    with running(SCRIPTED, tmp_path, "--drain-timeout-s", "0.3") as server:
        server.wait_ready()
        with server.streaming(**LONG) as events:
            next(events)
            server.process.send_signal(signal.SIGTERM)
            *_, last = events
        assert json.loads(last)["error"]["code"] == "unavailable"
        assert server.process.wait(20) == 0
        assert "Traceback" not in server.stderr


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_does_not_wait(tmp_path, second):
    with running(SCRIPTED, tmp_path) as server:
        server.wait_ready()
        worker = server.worker_pid
        with server.streaming(**LONG) as events:
            next(events)
            drain(server)
            server.process.send_signal(second)
            *_, last = events
        assert json.loads(last)["error"]["code"] == "unavailable"
        assert server.process.wait(3) == 0
        assert not is_alive(worker)
        assert "Traceback" not in server.stderr


def test_idle_server_ends_at_once(tmp_path):
    with running(SCRIPTED, tmp_path) as server:
        server.wait_ready()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(5) == 0


def test_loading_server_ends_at_once(tmp_path):
    with running(SCRIPTED, tmp_path, "--model", "slow") as server:
        wait_until(lambda: server.health() == 503)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(5) == 0
        assert "Traceback" not in server.stderr
