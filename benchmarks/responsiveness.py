"""How fast the API process answers `/health` while its worker decodes and megabytes of prompts arrive.

Starts a server of its own with one worker thread; each phase lasts a few seconds. Prints a table and ends
with one JSON line. Times are milliseconds, seen by a client on a kept-alive connection on the same machine.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

PROBE_INTERVAL_S = 0.005
NUM_STREAMS = 8
# Every text but the last fits, so that all are tokenised before the request is refused; ids have to be parsed.
FITTING_TEXT = "def f(x):\n    return x\n" * 150
TEXT_BODY = json.dumps({"prompt": [FITTING_TEXT] * 63 + [FITTING_TEXT * 10]}).encode()
NUM_TEXT_CLIENTS = 5_000_000 // len(TEXT_BODY)
IDS_BODY = json.dumps({"prompt": [[7] * 2000] * 170}).encode()
STREAM_BODY = json.dumps({"prompt": "def f(", "max_tokens": 200, "ignore_eos": True, "stream": True}).encode()


@dataclass(frozen=True, slots=True)
class Latencies:
    """What one phase's probes saw, sorted."""

    milliseconds: Sequence[float]

    def quantile(self, share: float) -> float:
        return self.milliseconds[min(len(self.milliseconds) - 1, int(share * len(self.milliseconds)))]

    @property
    def summary(self) -> dict[str, float]:
        p50, p99, longest = self.quantile(0.5), self.quantile(0.99), self.milliseconds[-1]
        return {
            "n": len(self.milliseconds),
            "p50_ms": round(p50, 2),
            "p99_ms": round(p99, 2),
            "max_ms": round(longest, 2),
        }


@contextmanager
def server() -> Iterator[int]:
    """A ready server; gives its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "server", "serve", "--port", str(port), "--num-threads", "1"]
    process = subprocess.Popen([*command, "--log-level", "warning"], stderr=subprocess.DEVNULL)
    try:
        while probe_once(port) != 200:
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait()


def probe_once(port: int) -> int:
    try:
        return request(port, "GET", "/health")
    except OSError:
        return 0


def request(port: int, method: str, path: str, body: bytes | None = None) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.read()
        return response.status
    finally:
        connection.close()


def probe(port: int, seconds: float) -> Latencies:
    """Ask for `/health` again and again."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    found = []
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        started = time.perf_counter()
        connection.request("GET", "/health")
        connection.getresponse().read()
        found.append(1000 * (time.perf_counter() - started))
        time.sleep(PROBE_INTERVAL_S)
    connection.close()
    return Latencies(sorted(found))


@contextmanager
def repeating(actions: Sequence[Callable[[], object]]) -> Iterator[list[int]]:
    """Each action over and over in a thread of its own; gives how often each ended."""
    counts = [0] * len(actions)
    ended = threading.Event()

    def repeat(index: int) -> None:
        while not ended.is_set():
            actions[index]()
            counts[index] += 1

    threads = [threading.Thread(target=repeat, args=(index,)) for index in range(len(actions))]
    for thread in threads:
        thread.start()
    try:
        yield counts
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def measure(port: int, seconds: float) -> dict[str, dict[str, float]]:
    """Latencies by phase."""
    decoding = [lambda: request(port, "POST", "/v1/completions", STREAM_BODY)] * NUM_STREAMS
    phases: dict[str, list[Callable[[], object]]] = {
        "idle": [],
        f"decoding {NUM_STREAMS} streams": decoding,
        f"… and {NUM_TEXT_CLIENTS} bodies of {len(TEXT_BODY) / 1e6:.1f} MB of text": [
            *decoding,
            *[lambda: request(port, "POST", "/v1/completions", TEXT_BODY)] * NUM_TEXT_CLIENTS,
        ],
        f"… and a body of {len(IDS_BODY) / 1e6:.1f} MB of token ids": [
            *decoding,
            lambda: request(port, "POST", "/v1/completions", IDS_BODY),
        ],
    }
    results = {}
    for name, actions in phases.items():
        with repeating(actions) as counts:
            results[name] = probe(port, seconds).summary
            results[name]["bodies"] = sum(counts[NUM_STREAMS:])
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="length of a phase")
    seconds = parser.parse_args().seconds
    with server() as port:
        results = measure(port, seconds)
    for name, result in results.items():
        print(
            f"{name:45} p50 {result['p50_ms']:7.2f}   p99 {result['p99_ms']:7.2f}   max {result['max_ms']:7.2f} ms"
        )
    print(
        json.dumps(
            {
                "benchmark": "responsiveness",
                "cores": os.cpu_count(),
                "machine": platform.machine(),
                "phases": results,
            }
        )
    )


if __name__ == "__main__":
    main()
