"""Times one checkpoint with every kind of assistant that there is for it, task by task, against no assistant.

Knows engines, tasks and turns; knows nothing of how a table looks. Each assistant is one variant: a new kind of
drafter needs one line in `_variants`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from statistics import median
from typing import Final

import torch
from tokenizers import Tokenizer

from benchmarks.contenders import request_for, run_to_end
from benchmarks.model_costs import ModelCosts, flops_per_token
from benchmarks.timing import Contender, Job, Prompt, Record, Run, Sampled, race
from benchmarks.variants_table import ALL_TASKS, Memory, Row
from config.settings import Dtype, EngineSettings
from decoding.checkpoint import open_checkpoint
from decoding.engine import Engine
from decoding.linear import HalfStoredLinear
from decoding.messages import Drafter
from decoding.panels import PanelLinear

TASKS: Final = Path(__file__).parent / "task_prompts.jsonl"

_DEPTHS: Final = (1 / 8, 3 / 16, 1 / 4, 3 / 8)
_BLOCK: Final = 1024


@dataclass(frozen=True, slots=True)
class TableRequest:
    """What the operator asked for. `exit_layers` empty: by the checkpoint's depth."""

    model: str
    draft_model: str | None
    exit_layers: tuple[int, ...]
    draft_length: int
    tokens: int
    rounds: int
    threads: int | None
    device: str
    dtype: str = "auto"


@dataclass(frozen=True, slots=True)
class Variant:
    """One assistant, or none, at work in one engine. `draft_flops` is what it takes for a draft."""

    assistant: str
    engine: Engine
    sequence_ids: Iterator[int]
    drafter: Drafter
    exit_layer: int | None
    draft_length: int | None
    draft_flops: int = 0
    every: int = 1

    @property
    def name(self) -> str:
        return self.assistant

    def run(self, job: Job) -> Run:
        """Complete the job's prompts together."""
        choice = {"exit_layer": self.exit_layer, "draft_length": self.draft_length}
        return run_to_end(
            self.engine,
            [
                request_for(prompt, job, next(self.sequence_ids), drafter=self.drafter, **choice)
                for prompt in job.prompts
            ],
        )


@dataclass(slots=True)
class Witness:
    """Holds every text against the first that was seen of its prompt, which is that of no assistant."""

    texts: dict[int, tuple[int, ...]] = field(default_factory=dict)
    num_tokens: int = 0
    num_different: int = 0

    def see(self, _contender: Contender, job: Job, run: Run) -> None:
        """Compare the texts of one run, as far as it went."""
        for prompt, token_ids in zip(job.prompts, run.token_ids, strict=True):
            reference = self.texts.setdefault(prompt.index, token_ids)
            self.num_tokens += len(token_ids)
            self.num_different += token_ids != reference


@dataclass(frozen=True, slots=True)
class Bench:
    """The variants, plain decoding first, and the tasks in the checkpoint's tokens."""

    variants: tuple[Variant, ...]
    tasks: Mapping[str, tuple[Prompt, ...]]
    costs: ModelCosts
    draft_costs: ModelCosts | None
    request: TableRequest

    def measure(self, witness: Witness) -> Iterator[Row]:
        """A row of every variant for each task as it is measured, then for all tasks together."""
        gathered: dict[str, list[Record]] = {variant.name: [] for variant in self.variants}
        for task, prompts in self.tasks.items():
            jobs = [Job((prompt,), self.request.tokens, Sampled(0.0, 1.0)) for prompt in prompts]
            self.variants[0].run(jobs[0])
            for job in jobs:
                witness.see(self.variants[0], job, self.variants[0].run(job))
            records = race(self.variants, jobs, num_rounds=self.request.rounds, witness=witness.see)
            for variant in self.variants:
                gathered[variant.name].append(records[variant.name])
                yield self._row(task, variant, records[variant.name], records[self.variants[0].name])
        plain = _together(gathered[self.variants[0].name])
        for variant in self.variants:
            yield self._row(ALL_TASKS, variant, _together(gathered[variant.name]), plain)

    def _row(self, task: str, variant: Variant, record: Record, plain: Record) -> Row:
        decoding = [step for step in record.steps if step.is_decoding]
        drafted = sum(step.drafted for step in decoding)
        pairs = zip(plain.rounds_s, record.rounds_s, strict=True)
        return Row(
            task=task,
            assistant=variant.assistant,
            ms_per_token=1e3 / record.tokens_per_s,
            plain_ms_per_token=1e3 / plain.tokens_per_s,
            speed_up=median(before / after for before, after in pairs),
            acceptance_rate=sum(step.kept for step in decoding) / drafted if drafted else None,
            memory=self._memory(variant, longest_draft=max(step.drafted for step in decoding)),
            flops_per_token=flops_per_token(
                self.costs,
                row_steps=sum(step.num_rows for step in decoding),
                drafted=drafted,
                emitted=sum(step.emitted for step in decoding),
                draft_flops=variant.draft_flops,
            ),
        )

    def _memory(self, variant: Variant, *, longest_draft: int) -> Memory:
        """At the longest text, one row. A separate draft model has weights and a cache of its own."""
        runtime, ready = variant.engine.runtime, variant.engine.ready
        itemsize = getattr(torch, ready.dtype).itemsize
        stored = _stored_itemsize(runtime.model.weights.head, itemsize)
        models = [self.costs]
        if variant.drafter is Drafter.MODEL and self.draft_costs is not None:
            models.append(self.draft_costs)
        longest = max(len(prompt.token_ids) for prompts in self.tasks.values() for prompt in prompts)
        num_tokens = longest + self.request.tokens
        return Memory(
            weight_bytes=sum(each.weight_bytes(itemsize, stored) for each in models),
            kv_bytes=sum(each.kv_bytes(num_tokens, itemsize) for each in models),
            scratch_bytes=self.costs.scratch_bytes(1 + longest_draft, itemsize),
        )


def _together(records: Sequence[Record]) -> Record:
    """Several tasks as one: rounds add up."""
    whole = Record(sum(record.num_tokens for record in records))
    whole.rounds_s = [sum(rounds) for rounds in zip(*(record.rounds_s for record in records), strict=True)]
    whole.steps = [step for record in records for step in record.steps]
    return whole


def prepare(request: TableRequest, tasks: Mapping[str, Sequence[str]]) -> Bench:
    """Load everything. A draft model goes into an engine of its own: others pay nothing. Raises StartupError."""
    costs = ModelCosts(open_checkpoint(request.model, revision=None).shape)
    draft_costs = None
    if request.draft_model is not None:
        draft_costs = ModelCosts(open_checkpoint(request.draft_model, revision=None).shape)
    engine = Engine.load(_settings(request))
    assisted = None if request.draft_model is None else Engine.load(_settings(request, request.draft_model))
    tokenizer = Tokenizer.from_str(engine.ready.text.tokenizer_json)
    indices = count()
    return Bench(
        variants=tuple(_variants(request, engine, assisted, costs, draft_costs)),
        tasks={
            task: tuple(Prompt(next(indices), tuple(tokenizer.encode(text).ids)) for text in texts)
            for task, texts in tasks.items()
        },
        costs=costs,
        draft_costs=draft_costs,
        request=request,
    )


def _variants(
    request: TableRequest,
    engine: Engine,
    assisted: Engine | None,
    costs: ModelCosts,
    draft_costs: ModelCosts | None,
) -> Iterator[Variant]:
    ids, length = count(), request.draft_length
    yield Variant("none", engine, ids, Drafter.NONE, 1, 0)
    for layer in request.exit_layers or default_exit_layers(costs.shape.num_layers):
        name = f"early exit E={layer} γ={length}"
        yield Variant(name, engine, ids, Drafter.EARLY_EXIT, layer, length, costs.head_flops)
    yield Variant("early exit, auto", engine, ids, Drafter.EARLY_EXIT, None, None, costs.head_flops)
    yield Variant(f"lookup γ={length}", engine, ids, Drafter.LOOKUP, 1, length)
    # What is looked up is counted as if the head had drafted it: a step does not tell which drafts were.
    yield Variant("hybrid, auto", engine, ids, Drafter.HYBRID, None, None, costs.head_flops)
    if assisted is not None and draft_costs is not None:
        size = f"{draft_costs.num_parameters / 1e6:.1f} M parameters"
        flops = draft_costs.layer_flops + draft_costs.head_flops
        yield Variant(f"draft model of {size} γ={length}", assisted, count(), Drafter.MODEL, 1, length, flops)


def default_exit_layers(num_layers: int) -> tuple[int, ...]:
    """Early exits worth a row, shallow ones first."""
    return tuple(sorted({min(max(1, round(depth * num_layers)), num_layers - 1) for depth in _DEPTHS}))


def usual_exit_layers(model: str) -> tuple[int, ...]:
    """The two that drafts most often do best at; of a shallow checkpoint all there are. Raises StartupError."""
    layers = default_exit_layers(open_checkpoint(model, revision=None).shape.num_layers)
    return layers[1:3] or layers


def _settings(request: TableRequest, draft_model: str | None = None) -> EngineSettings:
    return EngineSettings(
        model=request.model,
        draft_model=draft_model,
        device=request.device,
        dtype=Dtype(request.dtype),
        num_threads=request.threads,
        max_num_seqs=1,
        # Longer than any prompt: no prefix is ever found again, and every run computes its whole prompt.
        block_size=_BLOCK,
    )


def _stored_itemsize(linear: object, itemsize: int) -> int:
    """Bytes of a number of a matrix as it lies in memory."""
    if isinstance(linear, HalfStoredLinear):
        return 2
    return linear.panels.element_size() if isinstance(linear, PanelLinear) else itemsize
