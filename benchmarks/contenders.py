"""The ways of decoding that are compared: this engine, and transformers' `generate()` on the same checkpoint.

Knows how to drive each; knows nothing of rounds or medians.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaForCausalLM

from benchmarks.timing import Job, Prompt, Run, Sampled, Step
from decoding.engine import Engine
from decoding.messages import Drafter, Generate, SamplingParams, StepReport, sequence_seed

SEED: Final = 20240416


@dataclass(frozen=True, slots=True)
class Ours:
    """This engine at one exit layer and draft length; draft length 0 is plain decoding.

    `sequence_ids` never repeats an id; all that drive one engine draw from the same.
    """

    engine: Engine
    sequence_ids: Iterator[int]
    exit_layer: int
    draft_length: int
    every: int = 1

    @property
    def name(self) -> str:
        return f"ours E={self.exit_layer} γ={self.draft_length}" if self.draft_length else "ours γ=0"

    def run(self, job: Job) -> Run:
        """Submit all prompts, then step until they have ended."""
        return _run(self, job)


@dataclass(frozen=True, slots=True)
class OursAuto:
    """This engine where its controller chooses for every step. The engine serves nobody else: what it has learned
    it keeps from run to run, as a server does.
    """

    engine: Engine
    sequence_ids: Iterator[int]
    every: int = 1
    name: str = "ours auto"
    exit_layer: None = None
    draft_length: None = None

    def run(self, job: Job) -> Run:
        """Submit all prompts, then step until they have ended."""
        return _run(self, job)


def _run(ours: Ours | OursAuto, job: Job) -> Run:
    requests = [
        request_for(
            prompt,
            job,
            next(ours.sequence_ids),
            exit_layer=ours.exit_layer,
            draft_length=ours.draft_length,
        )
        for prompt in job.prompts
    ]
    return run_to_end(ours.engine, requests)


def run_to_end(engine: Engine, requests: Sequence[Generate]) -> Run:
    """Submit all of these to an idle engine, then step until they have ended."""
    reports: list[StepReport] = []
    started = time.perf_counter()
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        reports.append(engine.step())
    wall_s = time.perf_counter() - started
    token_ids: dict[int, list[int]] = {request.sequence_id: [] for request in requests}
    for report in reports:
        for event in report.decoded:
            # A prompt found in the prefix cache would be timed without its prefill.
            assert not event.num_cached_tokens
            token_ids[event.sequence_id] += event.token_ids
    return Run(tuple(map(tuple, token_ids.values())), wall_s, tuple(map(_step, reports)))


def request_for(
    prompt: Prompt,
    job: Job,
    sequence_id: int,
    *,
    exit_layer: int | None,
    draft_length: int | None,
    drafter: Drafter = Drafter.EARLY_EXIT,
) -> Generate:
    """One prompt of a job; what is None is left to the engine. The same prompt gets the same seed in every job."""
    sampled = job.sampled
    return Generate(
        sequence_id=sequence_id,
        prompt_ids=list(prompt.token_ids),
        max_new_tokens=job.new_tokens,
        sampling=SamplingParams(
            temperature=sampled.temperature, top_p=sampled.top_p if sampled.temperature else 1.0
        ),
        seed=sequence_seed(SEED, prompt_index=prompt.index, choice_index=0),
        stop_token_ids=[],
        exit_layer=exit_layer,
        draft_length=draft_length,
        drafter=drafter,
    )


@dataclass(frozen=True, slots=True)
class TransformersPlain:
    """`generate()` as it comes, prompts of a batch padded on the left."""

    model: LlamaForCausalLM
    every: int = 2
    name: str = "transformers plain"

    def run(self, job: Job) -> Run:
        """One `generate()` call for the whole job."""
        return generate(self.model, job)


@dataclass(frozen=True, slots=True)
class TransformersAssisted:
    """`generate(assistant_early_exit=E)`, which decodes one prompt at a time only."""

    model: LlamaForCausalLM
    exit_layer: int
    draft_length: int
    every: int = 2

    @property
    def name(self) -> str:
        return f"transformers E={self.exit_layer} γ={self.draft_length}"

    def run(self, job: Job) -> Run:
        """One `generate()` call; draft length and threshold are read from the model, not from arguments."""
        draft_always(self.model.generation_config, self.draft_length)
        return generate(self.model, job, assistant_early_exit=self.exit_layer)


def load_transformers(
    folder: str, *, revision: str | None, dtype: torch.dtype = torch.float32
) -> LlamaForCausalLM:
    """The checkpoint, with no token that ends a text."""
    model = LlamaForCausalLM.from_pretrained(folder, revision=revision, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = 0
    return model


def generate(model: LlamaForCausalLM, job: Job, **assistance: object) -> Run:
    """One `generate()` call for a whole job; `assistance` are further arguments of it."""
    ids_BT, mask_BT = _left_padded(job)
    choice = choice_of(job.sampled)
    torch.manual_seed(SEED + job.prompts[0].index)
    started = time.perf_counter()
    out_BT = model.generate(
        ids_BT, attention_mask=mask_BT, max_new_tokens=job.new_tokens, **choice, **assistance
    )
    wall_s = time.perf_counter() - started
    new = out_BT[:, ids_BT.shape[1] :].tolist()
    assert all(len(row) == job.new_tokens for row in new)
    return Run(tuple(map(tuple, new)), wall_s)


def draft_always(settings: GenerationConfig, draft_length: int) -> None:
    """Have an assistant draft so much in every cycle, however sure it is."""
    settings.num_assistant_tokens = draft_length
    settings.num_assistant_tokens_schedule = "constant"
    settings.assistant_confidence_threshold = 0


def choice_of(sampled: Sampled) -> dict[str, object]:
    """How transformers is to choose tokens."""
    if not sampled.temperature:
        return {"do_sample": False}
    # Its own default of top_k 50 would make it another distribution.
    return {"do_sample": True, "temperature": sampled.temperature, "top_p": sampled.top_p, "top_k": 0}


def _left_padded(job: Job) -> tuple[Tensor, Tensor]:
    width = max(len(prompt.token_ids) for prompt in job.prompts)
    ids_BT = torch.zeros(len(job.prompts), width, dtype=torch.int64)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(job.prompts):
        ids_BT[row, width - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
        mask_BT[row, width - len(prompt.token_ids) :] = 1
    return ids_BT, mask_BT


def _step(report: StepReport) -> Step:
    assert report.times is not None
    events = report.decoded
    return Step(
        draft_s=report.times.draft_s,
        verify_s=report.times.verify_s,
        host_s=report.times.host_s,
        num_rows=len(events),
        drafted=sum(event.drafted for event in events),
        kept=sum(event.kept for event in events),
        emitted=sum(len(event.token_ids) for event in events),
        is_decoding=bool(events) and all(event.queued_s is None for event in events),
    )
