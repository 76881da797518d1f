"""Streams completions from a server, as a client on the same machine sees them.

Knows HTTP and clocks; knows nothing of who asks how often.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

import httpx2

_TIMEOUT_S: Final = 600.0
_EVENT: Final = "data: "


@dataclass(frozen=True, slots=True)
class Ask:
    """A completion of exactly `max_tokens` tokens. `draft_length` None leaves exit layer and length to the server.

    `prompt` may be token ids.
    """

    prompt: str | list[int]
    max_tokens: int
    draft_length: int | None = None
    temperature: float = 0.0

    def body(self) -> dict[str, object]:
        """What is sent."""
        auto: dict[str, object] = {"exit_layer": "auto", "draft_length": "auto"}
        return {
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "ignore_eos": True,
            "temperature": self.temperature,
            "top_p": 0.95 if self.temperature else 1.0,
            "seed": 7,
            "stream": True,
            # Otherwise some tokens have no text, and none is sent for them: what is a gap could not be told.
            "skip_special_tokens": False,
            "stream_options": {"include_usage": True},
            **(auto if self.draft_length is None else {"draft_length": self.draft_length}),
        }


@dataclass(slots=True)
class Exchange:
    """One request as its client saw it, in seconds of one clock. `arrivals_s` are the times of its runs of tokens.

    `error` is what went wrong: then the rest is what came until then.
    """

    sent_s: float
    arrivals_s: list[float] = field(default_factory=list)
    ended_s: float = 0.0
    num_tokens: int = 0
    num_cached_tokens: int = 0
    drafted: int = 0
    kept: int = 0
    error: str | None = None

    @property
    def ttft_s(self) -> float | None:
        """Until the first token; None without one."""
        return self.arrivals_s[0] - self.sent_s if self.arrivals_s else None

    @property
    def gaps_s(self) -> list[float]:
        """Between one run of tokens and the next: what a reader waits for, however many tokens came."""
        return [after - before for before, after in pairwise(self.arrivals_s)]

    @property
    def end_to_end_s(self) -> float:
        return self.ended_s - self.sent_s

    @property
    def per_token_s(self) -> float | None:
        """Time a token after the first; None with fewer than two."""
        if self.num_tokens < 2:
            return None
        return (self.arrivals_s[-1] - self.arrivals_s[0]) / (self.num_tokens - 1)


@asynccontextmanager
async def client(url: str) -> AsyncIterator[httpx2.AsyncClient]:
    """Connections to a server, as many as are needed."""
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx2.AsyncClient(base_url=url, timeout=_TIMEOUT_S, limits=limits, trust_env=False) as opened:
        yield opened


def _ignore(_exchange: Exchange) -> None:
    return


async def exchange(
    through: httpx2.AsyncClient, ask: Ask, on_run: Callable[[Exchange], None] = _ignore
) -> Exchange:
    """Ask and read to the end; a refusal or a failure is told in the exchange. `on_run` sees every run arrive."""
    found = Exchange(time.perf_counter())
    try:
        async with through.stream("POST", "/v1/completions", json=ask.body()) as response:
            if response.status_code != 200:
                await response.aread()
                found.error = f"HTTP {response.status_code}"
            else:
                await _read(response, found, on_run)
    except httpx2.HTTPError as error:
        found.error = type(error).__name__
    found.ended_s = time.perf_counter()
    if found.error is None and found.num_tokens != ask.max_tokens:
        found.error = f"{found.num_tokens} tokens for {ask.max_tokens}"
    return found


async def _read(response: httpx2.Response, found: Exchange, on_run: Callable[[Exchange], None]) -> None:
    async for line in response.aiter_lines():
        if not line.startswith(_EVENT) or line == f"{_EVENT}[DONE]":
            continue
        now = time.perf_counter()
        event = json.loads(line.removeprefix(_EVENT))
        if "error" in event:
            found.error = str(event["error"]["code"])
        elif event["choices"]:
            found.arrivals_s.append(now)
            on_run(found)
        else:
            _count(found, event)


def _count(found: Exchange, last: dict[str, dict[str, object]]) -> None:
    """The counts of the last event, which has no choices."""
    usage, drafts = last["usage"], last["metrics"]["speculative_decoding"]
    found.num_tokens = usage["completion_tokens"]
    found.num_cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
    found.drafted = drafts["num_draft_tokens"]
    found.kept = drafts["num_accepted_draft_tokens"]
