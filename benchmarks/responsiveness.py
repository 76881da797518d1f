"""How fast the API process answers `/health` while its worker decodes, megabytes of prompts arrive or many wait.

Starts servers of its own with one worker thread; each phase lasts a few seconds. Prints a table and ends with one
JSON line. Times are milliseconds, seen by a client on a kept-alive connection on the same machine. The last phase
holds hundreds of streams open, of which the batch has room for few: it tells the API process's memory and its
share of a core, beside the same with no stream at all.
"""

from __future__ import annotations

import argparse
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

from benchmarks.machine import machine
from benchmarks.started_server import ask, started_server

PROBE_INTERVAL_S = 0.005
SETTLING_S = 3.0
FLAGS = ("--num-threads", "1")
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


def request(port: int, path: str, body: bytes) -> int:
    return ask(f"http://127.0.0.1:{port}", "POST", path, body)[0]


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
    decoding = [lambda: request(port, "/v1/completions", STREAM_BODY)] * NUM_STREAMS
    phases: dict[str, list[Callable[[], object]]] = {
        "idle": [],
        f"decoding {NUM_STREAMS} streams": decoding,
        f"… and {NUM_TEXT_CLIENTS} bodies of {len(TEXT_BODY) / 1e6:.1f} MB of text": [
            *decoding,
            *[lambda: request(port, "/v1/completions", TEXT_BODY)] * NUM_TEXT_CLIENTS,
        ],
        f"… and a body of {len(IDS_BODY) / 1e6:.1f} MB of token ids": [
            *decoding,
            lambda: request(port, "/v1/completions", IDS_BODY),
        ],
    }
    results = {}
    for name, actions in phases.items():
        with repeating(actions) as counts:
            results[name] = probe(port, seconds).summary
            results[name]["bodies"] = sum(counts[NUM_STREAMS:])
    return results


@contextmanager
def held_streams(port: int, count: int) -> Iterator[None]:
    """Streams that nobody reads, so that holding them open costs this process nothing; closed at the end."""
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    message = f"{head}Content-Length: {len(STREAM_BODY)}\r\n\r\n".encode() + STREAM_BODY
    with ExitStack() as opened:
        for _ in range(count):
            opened.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60)).sendall(message)
        yield


def measure_held(seconds: float, count: int) -> dict[str, dict[str, float]]:
    """A server without streams, then with many open ones of which few decode."""
    with started_server([*FLAGS, "--max-num-seqs", str(NUM_STREAMS)]) as server:
        port = urlsplit(server.url).port
        assert port is not None
        results = {"no stream": server.usage(seconds)}
        with held_streams(port, count):
            # Requests are taken in before anything is measured.
            time.sleep(SETTLING_S)
            latencies = probe(port, seconds).summary
            usage = server.usage(seconds)
            results[f"{count} open streams, {NUM_STREAMS} of them decoding"] = usage | latencies
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="length of a phase")
    parser.add_argument("--streams", type=int, default=500, help="open streams of the last phase")
    options = parser.parse_args()
    with started_server(FLAGS) as server:
        port = urlsplit(server.url).port
        assert port is not None
        results = measure(port, options.seconds)
    held = measure_held(options.seconds, options.streams)
    for name, result in (results | held).items():
        shown = "   ".join(f"{key} {value:.2f}" for key, value in result.items())
        print(f"{name:50} {shown}")
    print(json.dumps({"benchmark": "responsiveness", **machine(), "phases": results, "held": held}))


if __name__ == "__main__":
    main()
