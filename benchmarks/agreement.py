"""Compares every timed text with plain decoding of the same prompt alone, and keeps where they part.

Knows token ids; knows nothing of time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from benchmarks.contenders import Ours, OursAuto
from benchmarks.timing import Contender, Job, Run


@dataclass(frozen=True, slots=True)
class Parting:
    """The first token at which a contender's text is not the reference's."""

    contender: str
    temperature: float
    num_rows: int
    prompt: int
    position: int


@dataclass(slots=True)
class Tally:
    """Texts and tokens compared, and how many of the texts differ; repeats of a run count again."""

    num_texts: int = 0
    num_tokens: int = 0
    num_different: int = 0


@dataclass(slots=True)
class Agreement:
    """Reference texts by (temperature, prompt), and how everybody else's compare.

    Sampled texts of other programs come from another noise and are not compared.
    """

    references: dict[tuple[float, int], tuple[int, ...]] = field(default_factory=dict)
    tallies: dict[str, Tally] = field(default_factory=dict)
    partings: dict[Parting, None] = field(default_factory=dict)

    def refer_to(self, plain: Ours, jobs: Sequence[Job]) -> None:
        """Decode each job of one prompt plainly; what it gives is the reference for that prompt."""
        for job in jobs:
            (prompt,) = job.prompts
            (self.references[job.sampled.temperature, prompt.index],) = plain.run(job).token_ids

    def witness(self, contender: Contender, job: Job, run: Run) -> None:
        """Compare each text of the run with its reference, over the run's length."""
        temperature = job.sampled.temperature
        is_ours = isinstance(contender, Ours | OursAuto)
        if temperature and not is_ours:
            return
        label = f"{contender.name.partition(' ')[0]} {job.sampled.label}"
        tally = self.tallies.setdefault(label, Tally())
        for prompt, token_ids in zip(job.prompts, run.token_ids, strict=True):
            reference = self.references[temperature, prompt.index][: job.new_tokens]
            assert len(token_ids) == len(reference)
            tally.num_texts += 1
            tally.num_tokens += len(reference)
            if token_ids != reference:
                tally.num_different += 1
                pairs = zip(token_ids, reference, strict=True)
                position = next(i for i, (one, other) in enumerate(pairs) if one != other)
                parting = Parting(contender.name, temperature, len(job.prompts), prompt.index, position)
                self.partings[parting] = None

    def as_json(self) -> dict[str, object]:
        """Tallies by kind, and the distinct partings."""
        return {
            "tallies": {label: asdict(tally) for label, tally in self.tallies.items()},
            "partings": [asdict(parting) for parting in self.partings],
        }
