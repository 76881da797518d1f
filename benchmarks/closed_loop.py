"""Keeps a number of requests under way in an engine, and tells what its steps took.

Knows one engine and one way of drafting; knows nothing of rounds or rivals.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from msgspec import structs

from benchmarks.contenders import request_for
from benchmarks.timing import Job
from decoding.engine import Engine
from decoding.messages import StepReport


@dataclass(frozen=True, slots=True)
class Drafting:
    """Who chooses: None leaves exit layer and draft length to the engine; draft length 0 is plain decoding."""

    exit_layer: int | None
    draft_length: int | None

    @property
    def name(self) -> str:
        if self.draft_length is None:
            return "auto"
        return f"E={self.exit_layer} γ={self.draft_length}" if self.draft_length else "γ=0"


AUTO = Drafting(None, None)
# An exit layer is named, so that plain rows do not even ask what would be worth drafting.
PLAIN = Drafting(1, 0)


@dataclass(frozen=True, slots=True)
class Pass:
    """One job run once: the new tokens of each prompt in order, and what the `num_timed` first of all took, which
    came before the batch ran dry.
    """

    token_ids: tuple[tuple[int, ...], ...]
    wall_s: float
    num_timed: int
    drafted: int
    kept: int

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.token_ids))

    @property
    def tokens_per_s(self) -> float:
        """Tokens over time, prompts included, while as many requests were under way as there should be.

        A batch that runs dry says nothing of a server that has more to do, and more of who ends unevenly.
        """
        return self.num_timed / self.wall_s


@dataclass(frozen=True, slots=True)
class Driver:
    """An engine that is kept from job to job, as a server keeps it. `sequence_ids` never repeats an id."""

    engine: Engine
    sequence_ids: Iterator[int]

    def run(self, job: Job, drafting: Drafting, *, concurrency: int) -> Pass:
        """Decode the job's prompts, so many at once: where one ends, the next begins. Timed until none is left.

        The first ones ask for ever more tokens, up to the job's own number: so a server finds its requests, each
        at another point of its text. If all began together, those that decode alike would end together, too, and
        their successors' prompts be computed in one piece.
        """
        ids = [next(self.sequence_ids) for _ in job.prompts]
        requests = [
            request_for(
                prompt, job, number, exit_layer=drafting.exit_layer, draft_length=drafting.draft_length
            )
            for prompt, number in zip(job.prompts, ids, strict=True)
        ]
        for place, request in enumerate(requests[:concurrency]):
            num_tokens = max(1, job.new_tokens * (place + 1) // concurrency)
            requests[place] = structs.replace(request, max_new_tokens=num_tokens)
        waiting = deque(requests)
        reports: list[StepReport] = []
        num_running = num_timed = 0
        wall_s = 0.0
        started = time.perf_counter()
        while waiting or self.engine.has_work:
            while waiting and num_running < concurrency:
                self.engine.submit(waiting.popleft())
                num_running += 1
            is_full = num_running == concurrency
            report = self.engine.step()
            num_running -= sum(event.finish_reason is not None for event in report.decoded)
            reports.append(report)
            if is_full:
                wall_s = time.perf_counter() - started
                num_timed += sum(len(event.token_ids) for event in report.decoded)
        return _pass(ids, reports, wall_s, num_timed)


def _pass(ids: Sequence[int], reports: Sequence[StepReport], wall_s: float, num_timed: int) -> Pass:
    token_ids: dict[int, list[int]] = {number: [] for number in ids}
    drafted = kept = 0
    for report in reports:
        for event in report.decoded:
            # A prompt found in the prefix cache would be timed without its prefill.
            assert not event.num_cached_tokens
            token_ids[event.sequence_id] += event.token_ids
            drafted += event.drafted
            kept += event.kept
    return Pass(tuple(map(tuple, token_ids.values())), wall_s, num_timed, drafted, kept)
