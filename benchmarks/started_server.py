"""Starts a server for a benchmark to talk to, and reads what its processes take of the machine.

Knows the command line and processes; knows nothing of requests.
"""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

import psutil
from prometheus_client.parser import text_string_to_metric_families

_START_S = 300.0


@dataclass(frozen=True, slots=True)
class StartedServer:
    """A ready server. `process_id` is the API process's; None for one that somebody else runs."""

    url: str
    process_id: int | None

    def usage(self, seconds: float) -> dict[str, float]:
        """Resident MB of the API process, and the CPU share that it takes during `seconds`, 100 being a core."""
        assert self.process_id is not None
        process = psutil.Process(self.process_id)
        process.cpu_percent()
        time.sleep(seconds)
        share = process.cpu_percent()
        return {"cpu_percent": round(share, 2), "rss_mb": round(process.memory_info().rss / 1e6, 1)}


@contextmanager
def started_server(
    flags: Sequence[str] = (), *, command: Sequence[str] = ("server", "serve")
) -> Iterator[StartedServer]:
    """A server on a free port with these flags, ended at the end. Raises RuntimeError if it does not start."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    words = [sys.executable, "-m", *command, "--port", str(port), "--log-level", "warning", *flags]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    server = StartedServer(f"http://127.0.0.1:{port}", process.pid)
    deadline = time.monotonic() + _START_S
    try:
        while not is_ready(server.url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start: {' '.join(words[2:])}")
            time.sleep(0.1)
        yield server
    finally:
        process.terminate()
        process.wait()


def is_ready(url: str) -> bool:
    """Whether a server answers there and serves."""
    try:
        return ask(url, "GET", "/health")[0] == 200
    except OSError:
        return False


def server_info(url: str) -> dict[str, object]:
    """What the server says of itself."""
    status, body = ask(url, "GET", "/server_info")
    assert status == 200, body
    info: dict[str, object] = json.loads(body)
    return info


def engine_seconds(url: str) -> float:
    """What the engine has spent in steps so far: drafting, verifying, and on the host."""
    status, body = ask(url, "GET", "/metrics")
    assert status == 200, body
    families = {family.name: family for family in text_string_to_metric_families(body.decode())}
    parts = [families[f"layerskip_{part}_seconds"] for part in ("draft", "verify", "host")]
    return sum(s.value for family in parts for s in family.samples if s.name.endswith("_total"))


def ask(url: str, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    """Status and body of one answer on a connection of its own."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=120)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()
