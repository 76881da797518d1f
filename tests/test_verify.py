"""`verify` finds out whether drafts change a text, and says so when it cannot."""

from __future__ import annotations

import json
import shlex
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from server.commands.verify import verify
from tests.server_process import Server, free_port

INFO = {
    "model": "fake",
    "vocab_size": 50,
    "allowed_exit_layers": [2, 4],
    "limits": {
        "max_model_len": 64,
        "max_draft_length": 4,
        "max_n": 2,
        "max_sequences_per_request": 2,
        "max_stop_strings": 1,
    },
}
Body = dict[str, object]


@dataclass
class Fake:
    """A server whose answers repeat the prompt, with the faults that a test plants."""

    diverges: Callable[[Body], bool] = lambda _: False
    drafted: int = 3
    kept: int = 1
    drafts_always: bool = False
    key: str | None = None
    info: object = field(default_factory=lambda: INFO)
    num_busy: int = 0
    bodies: list[Body] = field(default_factory=list)
    url: str = ""

    def answer(self, path: str, authorization: str | None, body: Body | None) -> tuple[int, object]:
        if self.key is not None and authorization != f"Bearer {self.key}":
            return 401, {"error": {"message": "no"}}
        if path == "/server_info":
            return (404, {}) if self.info is None else (200, self.info)
        assert path == "/v1/completions"
        assert body is not None
        if self.num_busy:
            self.num_busy -= 1
            return 429, {"error": {"message": "full"}}
        self.bodies.append(body)
        return 200, self._completion(body)

    def _completion(self, body: Body) -> Body:
        is_speculative = bool(body["draft_length"])
        text = f"{body['prompt']}{body.get('seed')}"
        text = text[:-1] + "?" if is_speculative and self.diverges(body) else text
        drafted = self.drafted if is_speculative or self.drafts_always else 0
        choices = [{"index": i, "text": text, "finish_reason": "length"} for i in range(body.get("n", 1))]
        counts = {"num_draft_tokens": drafted, "num_accepted_draft_tokens": min(drafted, self.kept)}
        return {"choices": choices[::-1], "metrics": {"speculative_decoding": counts}}


@contextmanager
def serving(fake: Fake) -> Iterator[Fake]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply(None)

        def do_POST(self):
            self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def reply(self, body):
            status, answer = fake.answer(self.path, self.headers["Authorization"], body)
            payload = json.dumps(answer).encode()
            self.send_response(status)
            if status == 429:
                self.send_header("Retry-After", "0")
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        thread = threading.Thread(target=listener.serve_forever)
        thread.start()
        fake.url = f"http://127.0.0.1:{listener.server_address[1]}"
        try:
            yield fake
        finally:
            listener.shutdown()
            thread.join()


def run(url: str, *flags: str) -> Result:
    app = typer.Typer()
    app.command()(verify)
    return CliRunner().invoke(app, [url, *flags])


def asked(fake: Fake, *flags: str) -> Result:
    with serving(fake):
        return run(fake.url, *flags)


def undecided(result: Result) -> str:
    """The reason given for not knowing."""
    assert result.exit_code == 2, result.output
    return result.stderr


def test_real_server_answers_alike_with_and_without_drafts(server: Server):
    result = run(server.url, "--requests", "10", "--max-tokens", "16", "--concurrency", "4", "--seed", "1")
    assert result.exit_code == 0, result.output
    first, rest = result.stdout.split(", 0 differences, ")
    assert first == "10 requests"
    assert int(rest.removesuffix(" drafts refused\n")) > 0


def test_every_random_request_is_one_that_the_server_allows(scripted: Server):
    result = run(scripted.url, "--requests", "150", "--max-tokens", "8", "--seed", "2")
    assert result.exit_code == 0, result.output


def test_requests_are_of_every_kind_and_each_has_a_twin_without_drafts():
    fake = Fake()
    assert asked(fake, "--requests", "80").exit_code == 0
    drafting = [body for body in fake.bodies if body["draft_length"]]
    assert {body["draft_length"] for body in drafting} == {1, 2, 3, 4}
    assert {body["exit_layer"] for body in drafting} == {2, 4}
    assert {type(body["prompt"]) for body in drafting} == {str, list}
    assert {body["temperature"] > 0 for body in drafting} == {True, False}
    used = {name for body in drafting for name in body}
    assert used >= {"top_p", "top_k", "min_p", "seed", "n", "stop", "ignore_eos", "min_tokens"}
    assert used >= {"drafter", "logit_bias", "presence_penalty", "frequency_penalty", "repetition_penalty"}
    assert all("seed" in body for body in fake.bodies if body["temperature"])
    for body in drafting:
        assert {**body, "draft_length": 0} in fake.bodies
    twins = [bool(body["draft_length"]) for body in fake.bodies]
    assert len(twins) == 160
    assert sum(a != b for a, b in pairwise(twins)) > 40, "both kinds are mixed"


def test_same_seed_sends_the_same_requests():
    first, second, other = Fake(), Fake(), Fake()
    for fake, seed in ((first, "7"), (second, "7"), (other, "8")):
        asked(fake, "--requests", "10", "--seed", seed)
    assert sorted(map(str, first.bodies)) == sorted(map(str, second.bodies))
    assert sorted(map(str, first.bodies)) != sorted(map(str, other.bodies))


def test_planted_divergence_is_found_and_its_curl_lines_show_it_again():
    fake = Fake(diverges=lambda body: body["exit_layer"] == 4)
    result = asked(fake, "--requests", "40")
    assert result.exit_code == 1, result.output
    num_differing = sum(body["exit_layer"] == 4 and body["draft_length"] > 0 for body in fake.bodies) - 1
    assert f"40 requests, {num_differing} differences, " in result.stdout
    lines = [shlex.split(line) for line in result.stdout.splitlines() if line.startswith("curl ")]
    assert [line[1] for line in lines] == [f"{fake.url}/v1/completions"] * 2
    speculative, plain = (json.loads(line[line.index("-d") + 1]) for line in lines)
    assert speculative["draft_length"] > 0
    assert speculative["exit_layer"] == 4
    assert plain == {**speculative, "draft_length": 0}
    assert "each alone, the two differ as well" in result.stdout


def test_divergence_that_does_not_come_again_is_said_to_need_company():
    seen: list[str] = []

    def once(body: Body) -> bool:
        seen.append(str(body))
        return seen.count(str(body)) == 1

    result = asked(Fake(diverges=once), "--requests", "4")
    assert result.exit_code == 1
    assert "each alone, the two are the same" in result.stdout


def test_difference_is_found_although_nothing_was_refused():
    assert asked(Fake(diverges=lambda _: True, kept=3)).exit_code == 1


@pytest.mark.parametrize(
    ("fake", "reason"),
    [
        (Fake(drafted=0), "no draft was made"),
        (Fake(kept=3), "no draft was refused"),
        (Fake(drafts_always=True), "draft_length 0"),
        (Fake(info=None), "no layerskip server"),
        (Fake(info={"object": "list"}), "no layerskip server"),
        (Fake(key="secret"), "wants a key; pass --api-key"),
    ],
    ids=["none-drafted", "none-refused", "always-drafts", "no-such-route", "foreign", "locked"],
)
def test_what_cannot_be_found_out_is_said_and_is_no_success(fake: Fake, reason: str):
    assert reason in undecided(asked(fake, "--requests", "20"))


def test_unreachable_server_is_said_to_be_so():
    assert "cannot be reached" in undecided(run(f"http://127.0.0.1:{free_port()}"))


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "file:///etc/passwd", "http://", "http://[", "http://a b"])
def test_address_that_is_none_is_refused(url: str):
    assert "pass http://HOST:PORT" in undecided(run(url))


def test_key_is_sent_and_never_shown():
    fake = Fake(key="secret", diverges=lambda _: True)
    result = asked(fake, "--requests", "20", "--api-key", "secret")
    assert result.exit_code == 1
    assert "$LAYERSKIP_API_KEY" in result.stdout
    assert "secret" not in result.output
    assert "refuses this key" in undecided(asked(fake, "--api-key", "wrong"))


def test_busy_server_is_asked_again():
    assert asked(Fake(num_busy=5), "--requests", "20").exit_code == 0
