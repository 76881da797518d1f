"""Puts load on a server: so many requests under way at once, or arrivals that wait for nobody.

Knows requests and their order in time; knows nothing of what is made of the findings.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import httpx2
import numpy as np

from benchmarks.load_client import Ask, Exchange, exchange
from benchmarks.prompts import PROMPTS


@dataclass(frozen=True, slots=True)
class Burst:
    """All requests of one setting in one round, and the seconds from the first sent to the last ended."""

    exchanges: tuple[Exchange, ...]
    wall_s: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens of answers that came whole, over all of the time."""
        return sum(each.num_tokens for each in self.exchanges if each.error is None) / self.wall_s


def unlike_prompts() -> Iterator[str]:
    """Beginnings of Python of which no two begin alike, so that none is found in a prefix cache."""
    number = 0
    while True:
        yield f"# {number:05}\n{PROMPTS[number % len(PROMPTS)]}"
        number += 1


async def closed_loop(
    through: httpx2.AsyncClient,
    asks: Sequence[Ask],
    *,
    concurrency: int,
    on_end: Callable[[], object],
) -> Burst:
    """Send all, `concurrency` under way at once: who gets an answer sends the next."""
    waiting = iter(asks)
    found: list[Exchange] = []

    async def reader() -> None:
        for ask in waiting:
            found.append(await exchange(through, ask))
            on_end()

    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(reader())
    return Burst(tuple(found), time.perf_counter() - started)


async def open_loop(
    through: httpx2.AsyncClient,
    asks: Sequence[Ask],
    *,
    per_second: float,
    seed: int,
    on_end: Callable[[], object],
) -> Burst:
    """Send at the times of a Poisson process of so many requests a second, however slow the answers are.

    The same seed gives the same times.
    """
    times_s = np.random.default_rng(seed).exponential(1 / per_second, len(asks)).cumsum()

    async def at(time_s: float, ask: Ask) -> Exchange:
        await asyncio.sleep(time_s - (time.perf_counter() - started))
        found = await exchange(through, ask)
        on_end()
        return found

    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(at(*each)) for each in zip(times_s.tolist(), asks, strict=True)]
    return Burst(tuple(task.result() for task in tasks), time.perf_counter() - started)
