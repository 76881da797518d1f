"""OpenAI's own client can do with this server all that it does with OpenAI's, failures and retries included."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

from tests.server_process import SCRIPTED, Server, run_to_end, running, wait_until

FLAGS = ("--served-model-name", "scripted", "--max-num-seqs", "1", "--max-queued-requests", "0")


@dataclass
class Held:
    """A server that loads until its file `released` exists."""

    server: Server
    release: Path


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Held]:
    folder = tmp_path / "held"
    folder.mkdir()
    (tmp_path / "chat.jinja").write_text("{{ messages[-1].content }}")
    flags = ("--model", str(folder), "--chat-template", str(tmp_path / "chat.jinja"), *FLAGS)
    with running(SCRIPTED, tmp_path, *flags) as server:
        wait_until(lambda: server.health() == 503, timeout_s=60)
        yield Held(server, folder / "released")


def test_openais_client_is_served_by_every_route_it_knows(held: Held) -> None:
    done = run_to_end("tests/openai_client.py", held.server.url, str(held.release))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"openai": openai.__version__, "num_checks": 11}
    rejected = "layerskip_rejected_requests_total"
    assert held.server.metric(rejected, reason="unavailable") >= 1
    assert held.server.metric(rejected, reason="queue_full") >= 1
