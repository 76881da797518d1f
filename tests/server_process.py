"""Starts server processes for tests, talks to them over plain sockets, and reads their metrics.

Knows the command line and HTTP; imports nothing of the server.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[1]
REAL = ("-m", "server", "serve")
SCRIPTED = ("-m", "tests.scripted_server")


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def error(self):
        return self.json["error"]


@dataclass
class Server:
    """A server process. `stderr` is complete once it has ended. An answer may say nothing for `patience_s`."""

    process: subprocess.Popen[str]
    port: int
    log: Path
    samples: dict[str, float] = field(default_factory=dict)
    patience_s: float = 60

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def stderr(self) -> str:
        return self.log.read_text(encoding="utf-8")

    @property
    def worker_pid(self) -> int:
        return self.get("/server_info").json["worker_pid"]

    def get(self, path: str, headers: dict[str, str] | None = None) -> Answer:
        return self._ask(urllib.request.Request(self.url + path, headers=headers or {}))

    def post(
        self, body: object, *, path: str = "/v1/completions", headers: dict[str, str] | None = None
    ) -> Answer:
        payload = body if isinstance(body, bytes) else json.dumps(body).encode()
        all_headers = {"Content-Type": "application/json"} | (headers or {})
        return self._ask(urllib.request.Request(self.url + path, data=payload, headers=all_headers))

    def complete(self, **body: object):
        """The answer to a completion that must succeed."""
        answer = self.post(body)
        assert answer.status == 200, answer.body
        return answer.json

    def text(self, **body: object) -> str:
        return self.complete(**body)["choices"][0]["text"]

    @contextmanager
    def streaming(self, **body: object) -> Iterator[Iterator[str]]:
        """The `data:` fields of a stream, as they come; leaving the block closes the connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=self.patience_s)
        try:
            payload = json.dumps(body | {"stream": True})
            connection.request("POST", "/v1/completions", payload, {"Content-Type": "application/json"})
            response = connection.getresponse()
            assert response.status == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            yield (line[6:].decode().rstrip("\n") for line in response if line.startswith(b"data: "))
        finally:
            connection.close()

    def stream(self, **body: object) -> list[str]:
        with self.streaming(**body) as events:
            return list(events)

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a sample over every series with these labels."""
        total = 0.0
        for family in text_string_to_metric_families(self.get("/metrics").body.decode()):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    total += sample.value
        return total

    def wait_ready(self, timeout_s: float = 120) -> None:
        # Asked more often, a server that is loading would mostly answer.
        wait_until(
            lambda: self.process.poll() is not None or self.health() == 200,
            timeout_s=timeout_s,
            every_s=0.05,
        )
        assert self.process.poll() is None, self.stderr

    def health(self) -> int:
        try:
            return self.get("/health").status
        except (urllib.error.URLError, ConnectionError):
            return 0

    def wait_idle(self) -> None:
        """Until nothing runs, waits or holds a block."""
        wait_until(
            lambda: (
                not any(
                    self.metric(name)
                    for name in (
                        "vllm:num_requests_running",
                        "vllm:num_requests_waiting",
                        "vllm:kv_cache_usage_perc",
                    )
                )
            )
        )

    def end(self, sig: int = signal.SIGKILL) -> int:
        """Send a signal and wait; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(sig)
        return self.process.wait(timeout=20)

    def _ask(self, request: urllib.request.Request) -> Answer:
        try:
            with urllib.request.urlopen(request, timeout=self.patience_s) as response:
                return Answer(response.status, dict(response.headers), response.read())
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, dict(error.headers), error.read())


@contextmanager
def running(
    command: Sequence[str], folder: Path, *flags: str, environment: dict[str, str] | None = None
) -> Iterator[Server]:
    """A server on a free port, killed at the end with whatever it left."""
    port = free_port()
    log = folder / f"stderr-{port}.log"
    arguments = [sys.executable, *command, "--port", str(port), *flags]
    with log.open("w") as stderr:
        process = subprocess.Popen(
            arguments, cwd=ROOT, stderr=stderr, env=clean_environment() | (environment or {}), text=True
        )
        server = Server(process, port, log)
        try:
            yield server
        finally:
            server.end()


def run_to_end(
    *arguments: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS` in a clean environment."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=clean_environment() | (environment or {}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not re.match("LAYERSKIP_", name)}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def wait_until(condition: Callable[[], bool], *, timeout_s: float = 20, every_s: float = 0.01) -> None:
    """Poll until `condition` holds; an AssertionError after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not so within {timeout_s} s"
        time.sleep(every_s)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def text_of(events: Sequence[str], *, index: int = 0) -> str:
    """The text of one choice of a stream."""
    chunks = [json.loads(event) for event in events if event != "[DONE]"]
    return "".join(c["text"] for chunk in chunks for c in chunk["choices"] if c["index"] == index)
