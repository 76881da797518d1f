"""What `/openapi.json` says is what the real server does, and no request makes it fail."""

from __future__ import annotations

import http.client
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.schemathesis_hooks import CHAT_TEMPLATE, FLAGS
from tests.server_process import REAL, ROOT, Server, clean_environment, running

# A request may fit the document and still ask for what this model or operator does not allow.
NOT_PROMISED = "positive_data_acceptance"
TEXT_PARAMETERS = ("model", "user", "request_id", "stop", "bad_words", "prompt", "drafter", "exit_layer")


@pytest.fixture(scope="module")
def bounded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The real server with a chat template and a context so short that no request can ask for much."""
    folder = tmp_path_factory.mktemp("bounded")
    (folder / "chat.jinja").write_text(CHAT_TEMPLATE)
    flags = {"chat_template": folder / "chat.jinja", "num_threads": 1} | FLAGS
    words = [word for name, value in flags.items() for word in ("--" + name.replace("_", "-"), str(value))]
    with running(REAL, folder, *words) as server:
        server.wait_ready()
        yield server


def fuzz(server: Server, folder: Path, *, max_examples: int, seed: int) -> int:
    """Cases that schemathesis sent; it must find fault with none."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"),
            *("--phases", "examples,coverage,fuzzing", "--max-examples", str(max_examples)),
            *("--seed", str(seed), "--exclude-checks", NOT_PROMISED),
            *("--generation-database", "none", "--warnings", "off", "--no-color"),
        ],
        # Its hooks come from the repository; what it writes goes elsewhere.
        cwd=folder,
        env=clean_environment() | {"PYTHONPATH": str(ROOT), "SCHEMATHESIS_HOOKS": "tests.schemathesis_hooks"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"(\d+) generated, \1 passed", done.stdout)
    assert found, done.stdout
    return int(found[1])


def check_unharmed(server: Server) -> None:
    """Nothing of what was asked is left, and no failure in the log."""
    server.wait_idle()
    assert server.metric("layerskip_kv_blocks", state="used") == 0
    assert "Traceback" not in server.stderr
    assert server.health() == 200


def check_decoded(server: Server, *, at_least: int) -> None:
    """Requests reached the worker, and drafts were made and refused."""
    assert server.metric("vllm:request_success_total", finished_reason="length") >= at_least
    kept = server.metric("vllm:spec_decode_num_accepted_tokens_total")
    assert 0 < kept < server.metric("vllm:spec_decode_num_draft_tokens_total")


def test_server_does_what_its_document_says(bounded: Server, tmp_path: Path) -> None:
    assert fuzz(bounded, tmp_path, max_examples=10, seed=1) > 500
    check_decoded(bounded, at_least=20)
    check_unharmed(bounded)


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [2, 3, 4])
def test_server_does_what_its_document_says_at_length(bounded: Server, tmp_path: Path, seed: int) -> None:
    assert fuzz(bounded, tmp_path, max_examples=300, seed=seed) > 2000
    check_decoded(bounded, at_least=200)
    check_unharmed(bounded)


@pytest.mark.parametrize("name", TEXT_PARAMETERS)
def test_nul_bytes_are_text_like_any_other_or_refused(bounded: Server, name: str) -> None:
    for text in ("\0", "a\0b", "\0" * 20):
        value = [text] if name == "bad_words" else text
        for path, prompt in (("completions", "prompt"), ("chat/completions", "messages")):
            said = "a\0" if prompt == "prompt" else [{"role": "user", "content": "a\0", "name": "\0"}]
            answer = bounded.post({prompt: said, "max_tokens": 2, name: value}, path=f"/v1/{path}")
            assert answer.status in {200, 400, 404}, answer.body
    assert bounded.get("/v1/models/%00").status == 404
    check_unharmed(bounded)


def test_every_route_is_described_with_its_answers(bounded: Server) -> None:
    document = bounded.get("/openapi.json").json
    for path, methods in document["paths"].items():
        for method, described in methods.items():
            answers = described["responses"]
            assert described["description"], path
            assert "422" not in answers, path
            assert shapes(answers["200"]) != [{}], (method, path)
            assert shapes(answers["4XX"]) == [{"$ref": "#/components/schemas/ErrorAnswer"}], path


def shapes(answer: dict[str, object]) -> list[object]:
    content = answer["content"]
    assert isinstance(content, dict)
    return [described.get("schema") for described in content.values()]


@pytest.mark.parametrize("path", ["/ping", "/v1/completions", "/v1/models/any"])
def test_refused_method_comes_with_all_that_are_allowed(bounded: Server, path: str) -> None:
    described = bounded.get("/openapi.json").json["paths"]
    methods = described.get(path, described["/v1/models/{name}"]).keys()
    connection = http.client.HTTPConnection("127.0.0.1", bounded.port, timeout=20)
    try:
        connection.request("DELETE", path)
        answer = connection.getresponse()
        assert answer.status == 405
        assert answer.headers["allow"] == ", ".join(map(str.upper, methods))
    finally:
        connection.close()
