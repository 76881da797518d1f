"""Load on a server over HTTP, with drafts and without in turns; prints a table and ends with one JSON line.

Streams are read by this process, on the same machine, as any client would read them. A closed loop keeps a
number of requests under way; an open one lets them arrive at random times of a given rate, whether the server
keeps up or not. "auto" leaves exit layer and draft length to the server, "plain" asks for draft length 0: both are
requests to one server, which keeps what it has learned as it would in use. No two prompts begin alike, so the
prefix cache helps neither. The front end's cost is what a request for one token takes beyond the engine's own
seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import httpx2
from tqdm import tqdm

from benchmarks.load import Burst, closed_loop, open_loop, unlike_prompts
from benchmarks.load_client import Ask, client, exchange
from benchmarks.machine import machine
from benchmarks.serve_report import Level, Pairing, Side, as_text, draw
from benchmarks.started_server import StartedServer, engine_seconds, server_info, started_server
from benchmarks.summaries import Percentiles

_SPECULATION = {"auto": None, "plain": 0}
_REQUESTS_AT_ONCE = 2
"""In a closed loop each place sends so many requests a round: its end, where places stand empty, is short."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured on a server."""

    levels: tuple[Level, ...]
    rounds: int
    requests: int
    tokens: int
    temperature: float
    front_end_requests: int

    @property
    def num_requests(self) -> int:
        """Of all rounds and both sides."""
        return 2 * self.rounds * sum(map(self.requests_of, self.levels))

    def requests_of(self, level: Level) -> int:
        """Of one side of one round."""
        if level.kind == "rate":
            return self.requests
        return max(self.requests, _REQUESTS_AT_ONCE * int(level.value))


@dataclass(slots=True)
class Session:
    """One client process at one server."""

    through: httpx2.AsyncClient
    plan: Plan
    prompts: Iterator[str]
    bar: tqdm

    async def measure(self) -> list[Pairing]:
        """All levels, the sides of each in turns."""
        for speculation in _SPECULATION:
            await self._burst(Level("concurrency", 2), speculation, num_requests=4, seed=0)
        pairings = [Pairing(level, Side("auto"), Side("plain")) for level in self.plan.levels]
        for pairing in pairings:
            for number in range(self.plan.rounds):
                # Every second round begins with the other side: neither always follows a warm machine.
                for side in (pairing.auto, pairing.plain)[:: 1 if number % 2 else -1]:
                    self.bar.set_postfix_str(f"{pairing.level.label}, {side.speculation}", refresh=False)
                    count = self.plan.requests_of(pairing.level)
                    burst = await self._burst(
                        pairing.level, side.speculation, num_requests=count, seed=number
                    )
                    side.bursts.append(burst)
        return pairings

    async def _burst(self, level: Level, speculation: str, *, num_requests: int, seed: int) -> Burst:
        asks = [self._ask(prompt, speculation) for prompt in islice(self.prompts, num_requests)]
        if level.kind == "rate":
            return await open_loop(
                self.through, asks, per_second=level.value, seed=seed, on_end=self.bar.update
            )
        return await closed_loop(self.through, asks, concurrency=int(level.value), on_end=self.bar.update)

    def _ask(self, prompt: str, speculation: str) -> Ask:
        return Ask(prompt, self.plan.tokens, _SPECULATION[speculation], self.plan.temperature)

    async def front_end(self, url: str, num_requests: int) -> dict[str, object]:
        """What one token takes beyond the engine's steps, one request after the other; milliseconds."""
        before_s = engine_seconds(url)
        found = [
            await exchange(self.through, Ask(prompt, 1, 0)) for prompt in islice(self.prompts, num_requests)
        ]
        engine_ms = 1e3 * (engine_seconds(url) - before_s) / len(found)
        ttfts = Percentiles.of([1e3 * each.ttft_s for each in found if each.ttft_s is not None])
        mean_ms = 1e3 * sum(each.ttft_s or 0.0 for each in found) / len(found)
        return {
            "requests": len(found),
            "ttft_ms": ttfts and ttfts.as_json(),
            "engine_mean_ms": round(engine_ms, 3),
            "front_end_mean_ms": round(mean_ms - engine_ms, 3),
        }


async def measure(url: str, plan: Plan) -> tuple[list[Pairing], dict[str, object]]:
    """Pairings by level, and the front end's cost."""
    async with client(url) as through:
        with tqdm(total=plan.num_requests + 8, unit="request", mininterval=1, dynamic_ncols=True) as bar:
            session = Session(through, plan, unlike_prompts(), bar)
            pairings = await session.measure()
            return pairings, await session.front_end(url, plan.front_end_requests)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, draw, and end with one line of JSON."""
    parser = _parser()
    options = parser.parse_args(arguments)
    levels = [Level("concurrency", value) for value in options.concurrency]
    levels += [Level("rate", value) for value in options.rates]
    if not levels or min(level.value for level in levels) <= 0:
        parser.error("pass a --concurrency or --rates, above 0")
    plan = Plan(
        levels=tuple(levels),
        rounds=options.rounds,
        requests=options.requests,
        tokens=options.tokens,
        temperature=options.temperature,
        front_end_requests=options.front_end_requests,
    )
    flags = ["--num-threads", str(options.threads), *(["--model", options.model] if options.model else [])]
    started = time.perf_counter()
    given = nullcontext(StartedServer(options.url, None)) if options.url else started_server(flags)
    with given as server:
        info = server_info(server.url)
        pairings, front_end = asyncio.run(measure(server.url, plan))
    document = {
        "benchmark": "serve",
        "hardware": machine(),
        "settings": {
            "model": info["model"],
            "dtype": info["dtype"],
            "device": info["device"],
            "threads": None if options.url else options.threads,
            **{name: getattr(options, name) for name in ("rounds", "requests", "tokens", "temperature")},
            "seconds": round(time.perf_counter() - started, 1),
        },
        "front_end": front_end,
        "levels": [pairing.as_json() for pairing in pairings],
    }
    print(as_text(pairings), f"front end: {json.dumps(front_end)}", sep="\n\n", end="\n\n")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.concurrency:
        draw(pairings, options.out / "serve.png")
    line = json.dumps(document)
    (options.out / "serve.json").write_text(line + "\n", encoding="utf-8")
    print(line)
    if any(side.errors for pairing in pairings for side in (pairing.auto, pairing.plain)):
        sys.exit("some requests failed: see errors")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serve",
        description="Load on a running server, or on one started here; ends with one line of JSON. "
        "With the defaults about 5 minutes on 2 idle cores.",
    )
    add = parser.add_argument
    add("url", nargs="?", help="a running server (default: one is started)")
    add("--model", help="checkpoint of the server that is started (default: the bundled one)")
    add("--threads", type=int, default=1, help="worker threads of the server that is started (default 1)")
    add("--concurrency", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32], metavar="N", help="closed loop")
    add("--rates", type=float, nargs="*", default=[2.0, 8.0], metavar="PER_SECOND", help="open loop")
    add("--rounds", type=int, default=3, help="pairs at every level (default 3)")
    add("--requests", type=int, default=16, help="least requests of a round (default 16)")
    add("--front-end-requests", type=int, default=40, metavar="N", help="of one token each (default 40)")
    add("--tokens", type=int, default=64, help="tokens of every answer (default 64)")
    add("--temperature", type=float, default=0.0, help="0 is greedy; above it top-p is 0.95")
    add("--out", type=Path, default=Path("serve"), metavar="DIR", help="folder of serve.json and serve.png")
    return parser


if __name__ == "__main__":
    main()
