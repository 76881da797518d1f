"""One line for each request that ended, with what it came to and nothing that was said."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.server_process import SCRIPTED, Server, running, wait_until

SECRET = "zebra"


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A scripted server that logs JSON."""
    with running(SCRIPTED, tmp_path_factory.mktemp("logged"), "--log-format", "json") as server:
        server.wait_ready()
        yield server


def lines(server: Server, request_id: str) -> list[dict[str, object]]:
    every = [json.loads(line) for line in server.stderr.splitlines()]
    return [line for line in every if line.get("id") == request_id]


def line(server: Server, request_id: str) -> dict[str, object]:
    wait_until(lambda: bool(lines(server, request_id)))
    (only,) = lines(server, request_id)
    return only


def test_line_says_what_the_answer_says(logged):
    body = {"prompt": SECRET, "max_tokens": 24, "exit_layer": 2, "draft_length": 4, "n": 2}
    answer = logged.post(body, headers={"X-Request-Id": "one"})
    usage, drafts = answer.json["usage"], answer.json["metrics"]["speculative_decoding"]
    written = line(logged, "one")
    assert {key: written[key] for key in ("method", "route", "status", "level", "logger")} == {
        "method": "POST",
        "route": "/v1/completions",
        "status": 200,
        "level": "info",
        "logger": "layerskip.access",
    }
    assert written["model"] == answer.json["model"]
    assert written["prompt_tokens"] == usage["prompt_tokens"]
    assert written["completion_tokens"] == usage["completion_tokens"] == 48
    assert (written["exit_layer"], written["draft_length"]) == (2, 4)
    assert 0 < drafts["draft_acceptance_rate"] < 1
    assert written["acceptance"] == pytest.approx(drafts["draft_acceptance_rate"], abs=0.001)
    assert written["finish_reason"] == "length"
    assert 0 < written["ttft_ms"] <= written["total_ms"]


def test_stream_has_the_same_line_as_a_whole_answer(logged):
    body = {"prompt": SECRET, "max_tokens": 24, "stop": "no such"}
    logged.post(body, headers={"X-Request-Id": "whole"})
    logged.post(body | {"stream": True}, headers={"X-Request-Id": "streamed"})
    whole, streamed = line(logged, "whole"), line(logged, "streamed")
    passing = {"id", "time", "ttft_ms", "total_ms"}
    assert {key: whole[key] for key in whole.keys() - passing} == {
        key: streamed[key] for key in streamed.keys() - passing
    }


def test_stop_string_and_a_client_that_left_are_told_apart(logged):
    logged.post({"prompt": SECRET, "max_tokens": 24, "stop": SECRET[2:]}, headers={"X-Request-Id": "stopped"})
    assert line(logged, "stopped")["finish_reason"] == "stop"
    with logged.streaming(prompt=f"!slow {SECRET}", max_tokens=300) as events:
        answer_id = json.loads(next(events))["id"]
    left = line(logged, answer_id.removeprefix("cmpl-"))
    assert left["finish_reason"] == "abort"
    assert 0 < left["completion_tokens"] < 300


def test_refused_request_has_a_line_without_an_answer(logged):
    logged.post({"prompt": SECRET, "temperature": -1}, headers={"X-Request-Id": "refused"})
    written = line(logged, "refused")
    assert written["status"] == 400
    assert not {"model", "completion_tokens", "finish_reason"} & written.keys()


def test_id_that_would_break_a_line_is_replaced(logged):
    answer = logged.post({"prompt": "a"}, headers={"X-Request-Id": 'x" {injected}'})
    assert line(logged, answer.headers["x-request-id"])["status"] == 200
    assert "injected" not in logged.stderr


def test_probes_have_no_line_and_no_line_holds_a_text(logged):
    for path in ("/health", "/health/live", "/metrics", "/ping", "/version"):
        logged.get(path, {"X-Request-Id": f"probe{path.replace('/', '-')}"})
    line(logged, "probe-version")
    assert "probe-health" not in logged.stderr
    assert "probe-metrics" not in logged.stderr
    assert SECRET not in logged.stderr


def test_every_line_from_the_start_on_is_json(logged):
    every = [json.loads(each) for each in logged.stderr.splitlines()]
    assert any("ready" in str(each.get("message")) for each in every)
    assert all({"time", "level", "logger"} <= each.keys() for each in every)


def test_text_has_the_same_fields(scripted):
    scripted.post({"prompt": SECRET, "max_tokens": 5}, headers={"X-Request-Id": "as-text"})
    wait_until(lambda: "id=as-text" in scripted.stderr)
    (written,) = [each for each in scripted.stderr.splitlines() if "id=as-text" in each]
    assert "POST /v1/completions 200 " in written
    assert "completion_tokens=5 exit_layer=4 draft_length=3 acceptance=" in written
    assert written.endswith("finish_reason=length")
    assert SECRET not in written
