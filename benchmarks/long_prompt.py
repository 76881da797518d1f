"""What a long prompt that arrives does to streams that run, and what it waits itself; ends with one JSON line.

Some streams run; then a prompt of 1,500 tokens (or what the context holds) arrives, and later the same again. In
every round: the largest gap between two runs of tokens of any running stream while the prompt is computed, in
units of the streams' median gap before; the prompt's time to first token over that of one like it at an idle
server; and the second arrival's over the first's, which the prefix cache shortens. Prompts are random ids, so that
nothing else is found in the cache.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Final

import httpx2
import numpy as np
from tqdm import tqdm

from benchmarks.load import unlike_prompts
from benchmarks.load_client import Ask, Exchange, client, exchange
from benchmarks.machine import aligned, machine
from benchmarks.started_server import StartedServer, server_info, started_server

_RUNS_BEFORE: Final = 24
"""So many runs of tokens every stream has had before the prompt arrives: their gaps are the usual ones."""

_NEW_TOKENS: Final = 4
_LONGEST_STREAM_PROMPT: Final = 200
_POLL_S: Final = 0.002


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the server allows, and how long the prompt is."""

    vocab_size: int
    max_model_len: int
    prompt_tokens: int

    @property
    def stream_tokens(self) -> int:
        """As long as streams may be: they must outlast two arrivals."""
        return self.max_model_len - _LONGEST_STREAM_PROMPT


@dataclass(frozen=True, slots=True)
class Arrival:
    """One round, in milliseconds: the streams' median gap before the prompt came, the largest while it lasted."""

    solo_ttft_ms: float
    first_ttft_ms: float
    second_ttft_ms: float
    second_cached_tokens: int
    median_gap_ms: float
    largest_gap_ms: float

    @property
    def gap_ratio(self) -> float:
        return self.largest_gap_ms / self.median_gap_ms

    @property
    def ttft_ratio(self) -> float:
        return self.first_ttft_ms / self.solo_ttft_ms

    @property
    def second_ratio(self) -> float:
        return self.second_ttft_ms / self.first_ttft_ms

    def as_json(self) -> dict[str, float]:
        ratios = {name: getattr(self, name) for name in ("gap_ratio", "ttft_ratio", "second_ratio")}
        return {name: round(value, 3) for name, value in (asdict(self) | ratios).items()}


def largest_gap_s(streams: Sequence[Sequence[float]], start_s: float, end_s: float) -> float:
    """The longest wait of any stream that overlaps a span of time; streams are times of arrivals, in order."""
    waits = [
        after - before
        for arrivals in streams
        for before, after in pairwise(arrivals)
        if after > start_s and before < end_s
    ]
    return max(waits)


@dataclass(frozen=True, slots=True)
class Bench:
    """One client at one server."""

    through: httpx2.AsyncClient
    bounds: Bounds
    num_streams: int
    draft_length: int | None
    random: np.random.Generator

    async def round(self) -> Arrival:
        """A prompt at the idle server, then another twice among streams. Raises RuntimeError if one fails."""
        solo = await self._arrive(self._prompt())
        prompt = self._prompt()
        async with self._streams() as streams:
            before = [gap for stream in streams for gap in stream.gaps_s]
            first = await self._arrive(prompt)
            await _runs(streams, 2)
            second = await self._arrive(prompt)
            assert first.ttft_s is not None
            largest_s = largest_gap_s(
                [stream.arrivals_s for stream in streams], first.sent_s, first.sent_s + first.ttft_s
            )
        solo_ms, first_ms, second_ms = (1e3 * (each.ttft_s or 0.0) for each in (solo, first, second))
        return Arrival(
            solo_ttft_ms=solo_ms,
            first_ttft_ms=first_ms,
            second_ttft_ms=second_ms,
            second_cached_tokens=second.num_cached_tokens,
            median_gap_ms=1e3 * median(before),
            largest_gap_ms=1e3 * largest_s,
        )

    def _prompt(self) -> list[int]:
        ids = self.random.integers(
            self.bounds.vocab_size // 2, self.bounds.vocab_size, self.bounds.prompt_tokens
        )
        return [int(each) for each in ids]

    async def _arrive(self, prompt: list[int]) -> Exchange:
        found = await exchange(self.through, Ask(prompt, _NEW_TOKENS, self.draft_length))
        if found.error is not None:
            raise RuntimeError(f"the long prompt was not answered: {found.error}")
        return found

    @asynccontextmanager
    async def _streams(self) -> AsyncIterator[list[Exchange]]:
        """Streams that have had some runs of tokens; given up at the end."""
        running: dict[int, Exchange] = {}
        prompts = unlike_prompts()
        asks = [
            Ask(next(prompts), self.bounds.stream_tokens, self.draft_length) for _ in range(self.num_streams)
        ]
        tasks = [
            asyncio.create_task(exchange(self.through, ask, lambda found: running.update({id(found): found})))
            for ask in asks
        ]
        try:
            while len(running) < len(tasks):
                _refuse_ended(tasks)
                await asyncio.sleep(_POLL_S)
            streams = list(running.values())
            await _runs(streams, _RUNS_BEFORE)
            yield streams
            _refuse_ended(tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _refuse_ended(tasks: Sequence[asyncio.Task[Exchange]]) -> None:
    ended = [task.result() for task in tasks if task.done()]
    if ended:
        raise RuntimeError(
            f"a stream ended too early ({ended[0].error or 'all its tokens came'}): pass fewer"
        )


async def _runs(streams: Sequence[Exchange], count: int) -> None:
    """Wait until every stream has had so many more runs of tokens, or has ended."""
    wanted = [len(stream.arrivals_s) + count for stream in streams]
    while any(
        len(stream.arrivals_s) < least and not stream.ended_s
        for stream, least in zip(streams, wanted, strict=True)
    ):
        await asyncio.sleep(_POLL_S)


async def measure(url: str, bounds: Bounds, options: argparse.Namespace) -> list[Arrival]:
    """All rounds, after one that warms up."""
    draft_length = 0 if options.plain else None
    async with client(url) as through:
        bench = Bench(through, bounds, options.streams, draft_length, np.random.default_rng())
        rounds = [await bench.round() for _ in tqdm(range(options.rounds + 1), unit="round")]
    return rounds[1:]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, and end with one line of JSON."""
    options = _parser().parse_args(arguments)
    flags = ["--num-threads", str(options.threads), "--dtype", options.dtype]
    flags += ["--model", options.model] if options.model else []
    given = nullcontext(StartedServer(options.url, None)) if options.url else started_server(flags)
    started = time.perf_counter()
    with given as server:
        info = server_info(server.url)
        longest = int(info["limits"]["max_model_len"])
        bounds = Bounds(int(info["vocab_size"]), longest, min(options.prompt_tokens, longest - _NEW_TOKENS))
        try:
            rounds = asyncio.run(measure(server.url, bounds, options))
        except RuntimeError as error:
            sys.exit(str(error))
    names = ["gap_ratio", "ttft_ratio", "second_ratio"]
    medians = {name: round(median(getattr(each, name) for each in rounds), 3) for name in names}
    document = {
        "benchmark": "long_prompt",
        "hardware": machine(),
        "settings": {
            "model": info["model"],
            "dtype": info.get("dtype", options.dtype),
            "prompt_tokens": bounds.prompt_tokens,
            "streams": options.streams,
            "drafts": "plain" if options.plain else "auto",
            "rounds": options.rounds,
            "seconds": round(time.perf_counter() - started, 1),
        },
        "medians": medians,
        "rounds": [each.as_json() for each in rounds],
    }
    shown = [each.as_json() for each in rounds]
    print(
        aligned(list(shown[0]), [[f"{value:.2f}" for value in each.values()] for each in shown]), end="\n\n"
    )
    line = json.dumps(document)
    if options.json is not None:
        options.json.write_text(line + "\n", encoding="utf-8")
    print(line)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.long_prompt",
        description="A long prompt arrives among running streams; ends with one line of JSON. About a minute.",
    )
    add = parser.add_argument
    add("url", nargs="?", help="a running server (default: one is started)")
    add("--model", help="checkpoint of the server that is started (default: the bundled one)")
    add("--threads", type=int, default=1, help="worker threads of the server that is started (default 1)")
    add("--dtype", default="auto", help="number format of the server that is started (default auto)")
    add("--streams", type=int, default=4, help="running streams (default 4)")
    add("--prompt-tokens", type=int, default=1500, help="as far as the context allows (default 1500)")
    add("--rounds", type=int, default=7)
    add("--plain", action="store_true", help="without drafts")
    add("--json", type=Path, metavar="FILE", help="also write the JSON line there")
    return parser


if __name__ == "__main__":
    main()
