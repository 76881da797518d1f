"""Measures every exit layer and draft length of checkpoints on prompts of several domains.

Knows engines, prompts and which run stands beside which; knows nothing of files that are written or drawn.
A setting's time is divided by that of plain decoding directly before and after its group, a group being all
draft lengths of one exit layer on one domain: a machine that slows down slows both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Final

from tokenizers import Tokenizer

from benchmarks.contenders import Ours
from benchmarks.sweep_inputs import LONGEST_DRAFT, Axes, Request, Work
from benchmarks.sweep_table import Row, Table
from benchmarks.timing import Costs, Job, Prompt, Step
from config.errors import SettingsError
from config.settings import EngineSettings
from decoding.checkpoint import open_checkpoint, text_assets
from decoding.engine import Engine

_WARM_UP_TOKENS: Final = 8
_LONGEST_BLOCK: Final = 1024


@dataclass(frozen=True, slots=True)
class Subject:
    """A checkpoint that is swept: its engine, and the prompts of each domain in its own tokens."""

    name: str
    engine: Engine
    sequence_ids: Iterator[int]
    prompts: Mapping[str, tuple[Prompt, ...]]

    @property
    def num_layers(self) -> int:
        return self.engine.ready.limits.num_layers

    def contender(self, exit_layer: int, draft_length: int) -> Ours:
        return Ours(self.engine, self.sequence_ids, exit_layer, draft_length)

    @property
    def plain(self) -> Ours:
        return self.contender(1, 0)


@dataclass(frozen=True, slots=True)
class Trial:
    """One contender on all prompts of a domain, one after the other."""

    wall_s: float
    texts: tuple[tuple[int, ...], ...]
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Round:
    """One trial of a setting between the two trials of plain decoding directly around its group."""

    trial: Trial
    before: Trial
    after: Trial

    @property
    def plain_s(self) -> float:
        return (self.before.wall_s + self.after.wall_s) / 2

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.trial.texts))

    @property
    def num_different(self) -> int:
        """Tokens that are not those of plain decoding at the same place."""
        texts = zip(self.trial.texts, self.before.texts, strict=True)
        return sum(one != other for text, same in texts for one, other in zip(text, same, strict=True))


@dataclass(frozen=True, slots=True)
class Setting:
    """One cell of the grid of one checkpoint on one domain."""

    subject: str
    domain: str
    exit_layer: int
    draft_length: int


def row_of(setting: Setting, rounds: Sequence[Round]) -> Row:
    """Reduce all rounds of a setting, at least one, to one row."""
    costs = Costs.of([s for r in rounds for s in r.trial.steps], draft_length=setting.draft_length)
    plain = Costs.of([s for r in rounds for t in (r.before, r.after) for s in t.steps], draft_length=0)
    decoding = [step for r in rounds for step in r.trial.steps if step.is_decoding]
    num_tokens = sum(r.num_tokens for r in rounds)
    return Row(
        domain=setting.domain,
        exit_layer=setting.exit_layer,
        draft_length=setting.draft_length,
        speed_ups=tuple(r.plain_s / r.trial.wall_s for r in rounds),
        tokens_per_s=num_tokens / sum(r.trial.wall_s for r in rounds),
        plain_tokens_per_s=num_tokens / sum(r.plain_s for r in rounds),
        predicted_speed_up=costs.predicted_speed_up(plain),
        acceptance_rate=costs.acceptance_rate or 0.0,
        tokens_per_cycle=costs.tokens_per_cycle,
        draft_step_ms=costs.draft_step_ms,
        verify_ms=costs.verify_ms,
        plain_step_ms=plain.cycle_ms,
        drafted=sum(step.drafted for step in decoding),
        kept=sum(step.kept for step in decoding),
        tokens_compared=num_tokens,
        tokens_different=sum(r.num_different for r in rounds),
    )


@dataclass(slots=True)
class Sweep:
    """Checkpoints, the grid and the work; `run` fills the tables, and what it has done so far stays."""

    subjects: tuple[Subject, ...]
    axes: Axes
    work: Work
    _rounds: dict[Setting, tuple[Round, ...]] = field(default_factory=dict, init=False)

    @property
    def num_trials(self) -> int:
        """How often `run` will call back."""
        groups = len(self.domains) * len(self.subjects) * len(self.axes.exit_layers) * self.work.repeats
        return groups * (len(self.axes.draft_lengths) + 2)

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(self.subjects[0].prompts)

    def run(self, on_trial: Callable[[str], None]) -> None:
        """Measure everything; `on_trial` gets the name of every trial when it has ended.

        Interrupted at any point, the tables hold all groups that were finished.
        """
        for subject in self.subjects:
            self._warm_up(subject)
        for repeat in range(self.work.repeats):
            for exit_layer in self.axes.exit_layers:
                for domain in self.domains:
                    for subject in self.subjects:
                        self._measure_group(subject, domain, exit_layer, repeat, on_trial)

    def tables(self) -> tuple[Table, ...]:
        """What has been measured so far, by checkpoint."""
        return tuple(
            Table(
                checkpoint=subject.name,
                num_layers=subject.num_layers,
                domains=self.domains,
                rows=tuple(row_of(*cell) for domain in self.domains for cell in self._cells(subject, domain)),
            )
            for subject in self.subjects
        )

    def _cells(self, subject: Subject, domain: str) -> list[tuple[Setting, tuple[Round, ...]]]:
        """What has been measured of a checkpoint on a domain, by exit layer and draft length."""
        mine = [
            cell
            for cell in self._rounds.items()
            if (cell[0].subject, cell[0].domain) == (subject.name, domain)
        ]
        return sorted(mine, key=lambda cell: (cell[0].exit_layer, cell[0].draft_length))

    def _warm_up(self, subject: Subject) -> None:
        prompt = subject.prompts[self.domains[0]][0]
        job = Job((prompt,), min(_WARM_UP_TOKENS, self.work.new_tokens), self.work.sampled)
        subject.plain.run(job)
        for exit_layer in self.axes.exit_layers:
            for draft_length in self.axes.draft_lengths:
                subject.contender(exit_layer, draft_length).run(job)

    def _measure_group(
        self, subject: Subject, domain: str, exit_layer: int, repeat: int, on_trial: Callable[[str], None]
    ) -> None:
        def timed(contender: Ours) -> Trial:
            trial = self._trial(contender, subject.prompts[domain])
            on_trial(f"{subject.name}, {domain}, {contender.name.removeprefix('ours ')}")
            return trial

        # Every second repeat goes backwards, so that a drift within the groups falls on both ends alike.
        lengths = self.axes.draft_lengths[:: -1 if repeat % 2 else 1]
        before = timed(subject.plain)
        trials = {length: timed(subject.contender(exit_layer, length)) for length in lengths}
        after = timed(subject.plain)
        for length, trial in trials.items():
            setting = Setting(subject.name, domain, exit_layer, length)
            # One assignment, so that an interrupt leaves a round whole or out.
            self._rounds[setting] = (*self._rounds.get(setting, ()), Round(trial, before, after))

    def _trial(self, contender: Ours, prompts: Sequence[Prompt]) -> Trial:
        jobs = [Job((prompt,), self.work.new_tokens, self.work.sampled) for prompt in prompts]
        runs = [contender.run(job) for job in jobs]
        return Trial(
            wall_s=sum(run.wall_s for run in runs),
            texts=tuple(text for run in runs for text in run.token_ids),
            steps=tuple(step for run in runs for step in run.steps),
        )


def load_subject(model: str, prompts: Mapping[str, Sequence[str]], request: Request, *, name: str) -> Subject:
    """Load a checkpoint and tokenize the prompts. Raises StartupError."""
    new_tokens = request.work.new_tokens
    tokenizer = Tokenizer.from_str(text_assets(open_checkpoint(model, revision=None)).tokenizer_json)
    indices = count()
    encoded = {
        domain: tuple(Prompt(next(indices), tuple(tokenizer.encode(text).ids)) for text in texts)
        for domain, texts in prompts.items()
    }
    longest = max(len(prompt.token_ids) for group in encoded.values() for prompt in group) + new_tokens
    if longest > _LONGEST_BLOCK:
        raise SettingsError(
            f"the longest prompt and {new_tokens} new tokens are {longest} tokens; "
            f"at most {_LONGEST_BLOCK} can be measured: shorten prompts or lower --new-tokens"
        )
    settings = EngineSettings(
        model=model,
        device=request.device,
        num_threads=request.threads,
        max_num_seqs=1,
        max_model_len=longest,
        # Longer than any prompt: no prefix is ever found again, and every run computes its whole prompt.
        block_size=longest,
        max_draft_length=LONGEST_DRAFT,
        exit_layer=1,
        draft_length=1,
    )
    return Subject(name, Engine.load(settings), count(), encoded)
