"""Runs contenders against each other in turns, and reduces what they took to medians.

Knows wall times and counted tokens; knows nothing of models or of how a contender decodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Final, Protocol

_WARM_UP_TOKENS: Final = 8


@dataclass(frozen=True, slots=True)
class Prompt:
    """One beginning to complete; `index` names it in every batch and run."""

    index: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sampled:
    """How tokens are chosen; temperature 0 is greedy, and then `top_p` means nothing."""

    temperature: float
    top_p: float

    @property
    def label(self) -> str:
        return f"T={self.temperature:g}" + (f" top_p={self.top_p:g}" if self.temperature else "")


@dataclass(frozen=True, slots=True)
class Job:
    """Prompts to complete together, each by exactly `new_tokens` tokens."""

    prompts: tuple[Prompt, ...]
    new_tokens: int
    sampled: Sampled


@dataclass(frozen=True, slots=True)
class Step:
    """One step of an engine. `is_decoding`: every row of it had already given its first token."""

    draft_s: float
    verify_s: float
    host_s: float
    num_rows: int
    drafted: int
    kept: int
    emitted: int
    is_decoding: bool

    @property
    def total_s(self) -> float:
        return self.draft_s + self.verify_s + self.host_s


@dataclass(frozen=True, slots=True)
class Run:
    """What one job gave: new tokens of each prompt in order, wall time, and the steps where known."""

    token_ids: tuple[tuple[int, ...], ...]
    wall_s: float
    steps: tuple[Step, ...] = ()


class Contender(Protocol):
    """One way of decoding a job. `every` 2 sits out every second round, to keep a slow rival affordable."""

    @property
    def name(self) -> str: ...

    @property
    def every(self) -> int: ...

    def run(self, job: Job) -> Run:
        """Complete the job's prompts."""
        ...


@dataclass(slots=True)
class Record:
    """A contender's wall seconds in each of its rounds, over the same tokens each time, and all its steps."""

    num_tokens: int
    rounds_s: list[float] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / median(self.rounds_s)

    @property
    def range_tokens_per_s(self) -> tuple[float, float]:
        return self.num_tokens / max(self.rounds_s), self.num_tokens / min(self.rounds_s)


Witness = Callable[[Contender, Job, Run], None]


def race(
    contenders: Sequence[Contender], jobs: Sequence[Job], *, num_rounds: int, witness: Witness
) -> dict[str, Record]:
    """Time every contender on the same jobs, by name, after one short warm-up each.

    Contenders take turns at every single job, so that a machine which slows down slows all of them.
    `witness` sees every timed run.
    """
    warm_up = Job(jobs[0].prompts, min(_WARM_UP_TOKENS, jobs[0].new_tokens), jobs[0].sampled)
    num_tokens = sum(len(job.prompts) * job.new_tokens for job in jobs)
    records = {contender.name: Record(num_tokens) for contender in contenders}
    for contender in contenders:
        contender.run(warm_up)
    for round_index in range(num_rounds):
        present = [contender for contender in contenders if round_index % contender.every == 0]
        for contender in present:
            records[contender.name].rounds_s.append(0.0)
        for job in jobs:
            for contender in present:
                run = contender.run(job)
                witness(contender, job, run)
                records[contender.name].rounds_s[-1] += run.wall_s
                records[contender.name].steps += run.steps
    return records


@dataclass(frozen=True, slots=True)
class Costs:
    """What an engine's cycles cost and gave at one exit layer and draft length, medians over full cycles.

    At draft length 0 `verify_ms` is the plain step, `draft_step_ms` 0 and `acceptance_rate` None.
    """

    draft_length: int
    draft_step_ms: float
    verify_ms: float
    tokens_per_cycle: float
    acceptance_rate: float | None
    host_share: float
    prefill_share: float

    @classmethod
    def of(cls, steps: Sequence[Step], *, draft_length: int) -> Costs:
        """Reduce all steps of some runs. Full cycles have all rows present and none near its last token."""
        decoding = [step for step in steps if step.is_decoding]
        num_rows = max(step.num_rows for step in decoding)
        full = [s for s in decoding if s.num_rows == num_rows and s.drafted == num_rows * draft_length]
        drafted = sum(step.drafted for step in decoding)
        decoding_s = sum(step.total_s for step in decoding)
        # What a plain step spends before its verification is part of the step.
        plain_s = 0.0 if draft_length else median(step.draft_s for step in full)
        return cls(
            draft_length=draft_length,
            draft_step_ms=1e3 * median(s.draft_s for s in full) / draft_length if draft_length else 0.0,
            verify_ms=1e3 * (plain_s + median(step.verify_s for step in full)),
            tokens_per_cycle=sum(s.emitted for s in decoding) / sum(s.num_rows for s in decoding),
            acceptance_rate=sum(step.kept for step in decoding) / drafted if drafted else None,
            host_share=sum(step.host_s for step in decoding) / decoding_s,
            prefill_share=1 - decoding_s / sum(step.total_s for step in steps),
        )

    @property
    def cycle_ms(self) -> float:
        return self.draft_length * self.draft_step_ms + self.verify_ms

    def predicted_speed_up(self, plain: Costs) -> float:
        """Tokens per cycle × plain step / (γ × draft step + verify pass)."""
        return self.tokens_per_cycle * plain.cycle_ms / self.cycle_ms
