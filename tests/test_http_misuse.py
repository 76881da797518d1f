"""Bad input gets a 4xx in OpenAI's shape that names the parameter, and never reaches the worker."""

from __future__ import annotations

import json
import socket

import pytest

from tests.server_process import SCRIPTED, running, wait_until

BAD_BODIES = [
    (b'{"prompt": "a", "temperature": NaN}', "temperature"),
    (b'{"prompt": "a", "temperature": Infinity}', "temperature"),
    (b'{"prompt": "a", "max_tokens": 0}', "max_tokens"),
    (b'{"prompt": "a", "max_tokens": -1}', "max_tokens"),
    (b'{"prompt": "a", "max_tokens": 1000000000}', "max_tokens"),
    (b'{"prompt": "a", "max_tokens": ' + b"9" * 4000 + b"}", "max_tokens"),
    (b'{"prompt": "a", "exit_layer": 0}', "exit_layer"),
    (b'{"prompt": "a", "exit_layer": 99}', "exit_layer"),
    (b'{"prompt": "a", "exit_layer": "x"}', "exit_layer"),
    (b'{"prompt": "a", "draft_length": 99}', "draft_length"),
    (b'{"prompt": ""}', "prompt"),
    (b'{"prompt": []}', "prompt"),
    (b'{"prompt": [[]]}', "prompt"),
    (b'{"prompt": [4096]}', "prompt"),
    (b'{"prompt": [-1]}', "prompt"),
    (b'{"prompt": "\\ud800"}', "prompt"),
    (b'{"max_tokens": 1}', "prompt"),
    (b'{"prompt": "' + b"a b " * 3000 + b'"}', "prompt"),
    (b'{"prompt": "' + b"a" * 500_000 + b'"}', "prompt"),
    (b'{"prompt": "a", "logprobs": 21}', "logprobs"),
    (b'{"prompt": "a", "logit_bias": {"4096": 1}}', "logit_bias"),
    (b'{"prompt": "a", "logit_bias": {"x": 1}}', "logit_bias"),
    (b'{"prompt": "a", "allowed_token_ids": []}', "allowed_token_ids"),
    (b'{"prompt": "a", "allowed_token_ids": [4096]}', "allowed_token_ids"),
    (b'{"prompt": "a", "stop_token_ids": [-1]}', "stop_token_ids"),
    (b'{"prompt": "a", "bad_words": [' + b'"x",' * 200 + b'"x"]}', "bad_words"),
    (b'{"prompt": "a", "min_tokens": 17}', "min_tokens"),
    (b'{"prompt": "a", "max_tokens": 4, "min_tokens": 5}', "min_tokens"),
    (b'{"prompt": "a", "truncate_prompt_tokens": 0}', "truncate_prompt_tokens"),
    (b'{"prompt": "a", "truncate_prompt_tokens": 1025}', "truncate_prompt_tokens"),
    (b'{"prompt": "a", "prompt_logprobs": 1, "stream": true}', "prompt_logprobs"),
    (b'{"prompt": "a", "best_of": 2}', "best_of"),
    (b'{"prompt": "a", "suffix": "b"}', "suffix"),
    (b'{"prompt": "a", "priority": 1}', "priority"),
    (b'{"prompt": "a", "priority": 0.5}', "priority"),
    (b'{"prompt": "a", "priority": 2147483648}', "priority"),
    (b'{"prompt": "a", "repetition_penalty": 0}', "repetition_penalty"),
    (b'{"prompt": "a", "n": 1000}', "n"),
    (b'{"prompt": "a", "stop": ["1", "2", "3", "4", "5"]}', "stop"),
    (b'{"prompt": "a"', None),
    (b"[" * 100_000, None),
    (b'{"prompt": "\xff"}', None),
    (b"[]", None),
    (b"3", None),
    (b"", None),
]


@pytest.mark.parametrize(("body", "param"), BAD_BODIES, ids=[repr(body[:40]) for body, _ in BAD_BODIES])
def test_bad_input_is_a_400_that_names_the_parameter(server, body, param):
    before = server.stderr.count("Traceback")
    answer = server.post(body)
    assert answer.status == 400, answer.body
    assert set(answer.error) == {"message", "type", "param", "code"}
    assert answer.error["type"] == "invalid_request_error"
    assert answer.error["param"] == param
    assert len(answer.error["message"]) < 400
    assert server.stderr.count("Traceback") == before
    assert server.metric("vllm:num_requests_running") == 0


def test_limits_stand_in_the_message(server):
    assert "1023" in server.post({"prompt": "a b " * 3000}).error["message"]
    assert server.post({"prompt": "a b " * 3000}).error["code"] == "context_length_exceeded"
    assert "at most 1023" in server.post({"prompt": "a", "max_tokens": 1024}).error["message"]
    assert "1, 2, 3" in server.post({"prompt": "a", "exit_layer": 99}).error["message"]


def test_unknown_model_is_a_404(server):
    answer = server.post({"prompt": "a", "model": "gpt-4"})
    assert answer.status == 404
    assert (answer.error["code"], answer.error["param"]) == ("model_not_found", "model")
    assert server.get("/v1/models/gpt-4").status == 404


def test_wrong_path_and_method_have_the_same_shape(server):
    assert server.get("/v1/nothing").error["message"] == "Not Found"
    assert server.get("/v1/completions").status == 405


def test_body_without_json_content_type_is_refused_with_the_remedy(server):
    answer = server.post({"prompt": "a"}, headers={"Content-Type": "application/x-www-form-urlencoded"})
    assert answer.status == 400
    assert "Content-Type: application/json" in answer.error["message"]


def raw(server, request: bytes) -> bytes:
    """What the server sends for these bytes until it closes or falls silent."""
    answer = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(request)
        connection.settimeout(2)
        try:
            while part := connection.recv(65536):
                answer += part
        except (TimeoutError, ConnectionResetError):
            pass
    return answer


def head(*headers: str) -> bytes:
    lines = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, "", ""]).encode()


def test_body_over_the_limit_is_a_413_whether_declared_or_chunked(server):
    before = server.metric("layerskip_rejected_requests_total", reason="too_large")
    declared = raw(server, head("Content-Length: 5000000") + b"x" * 100_000)
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    chunked = raw(server, head("Transfer-Encoding: chunked") + chunk * 80)
    for answer in (declared, chunked):
        assert answer.startswith(b"HTTP/1.1 413")
        error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
        assert error["code"] == "body_too_large"
        assert "1048576" in error["message"]
    assert server.metric("layerskip_rejected_requests_total", reason="too_large") == before + 2


def test_endless_headers_are_cut_off(server):
    answer = raw(server, b"GET /health HTTP/1.1\r\nX: " + b"a" * 200_000)
    assert b"200 OK" not in answer
    assert server.health() == 200


def test_full_queue_is_a_429_with_retry_after_and_drains(tmp_path):
    with running(SCRIPTED, tmp_path, "--max-num-seqs", "1", "--max-queued-requests", "1") as server:
        server.wait_ready()
        slow = {"prompt": "!slow", "max_tokens": 200}
        with server.streaming(**slow) as first, server.streaming(**slow) as second:
            next(first)
            next(second)
            refusal = server.post(slow)
            assert refusal.status == 429
            assert int(refusal.headers["retry-after"]) >= 1
            assert refusal.error["code"] == "queue_full"
            assert server.metric("layerskip_rejected_requests_total", reason="queue_full") == 1
        wait_until(lambda: server.post({"prompt": "a", "max_tokens": 1}).status == 200)


def test_prompts_are_not_in_the_log(server):
    server.complete(prompt="a very secret prompt", max_tokens=4)
    server.post({"prompt": "a very secret prompt", "max_tokens": 0})
    assert "secret" not in server.stderr
    assert "POST /v1/completions 200" in server.stderr
    assert "/metrics" not in server.stderr.partition("/v1/completions -H")[2].partition("layerskip.access")[2]
