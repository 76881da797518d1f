"""A tiny model in float64 beside its oracle, and random mixes of requests to compare them on.

Knows how to run and compare; the promises are in the tests that use it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace as replace_fields

from config.settings import EngineSettings
from decoding.blocks import BlockPool
from decoding.choice import DraftChooser
from decoding.engine import Engine
from decoding.messages import (
    Decoded,
    Drafter,
    FinishReason,
    Generate,
    LogitEdits,
    SamplingParams,
    TokenLogprob,
)
from decoding.planning import StepLimits
from decoding.scheduler import Scheduler
from tests.choosers import NUM_LAYERS, RandomChooser, RestlessController
from tests.oracle import NaiveDecoder
from tests.tiny import make_checkpoint

VOCAB, MAX_LEN = 61, 384


@dataclass
class Lab:
    """A tiny model in float64 with one runtime for each block size, and its oracle."""

    engines: dict[int, Engine]
    oracle: NaiveDecoder
    model_draft_length: int | None = None

    def fresh_engine(
        self,
        *,
        block_size: int,
        num_blocks: int,
        max_num_seqs: int,
        budget: int,
        chooser: DraftChooser | None = None,
        promotes: bool = False,
    ) -> Engine:
        """A new scheduler over an old cache: whatever earlier runs left in it must not matter."""
        loaded = self.engines[block_size]
        scheduler = Scheduler(
            BlockPool(num_blocks=num_blocks, block_size=block_size),
            StepLimits(max_num_seqs, budget, promotes, self.model_draft_length),
            chooser or RandomChooser(0),
            device=torch.device("cpu"),
            clock=lambda: 0.0,
        )
        return Engine(loaded.ready, loaded.runtime, scheduler, clock=lambda: 0.0)


def make_lab(folder: Path, *, transparent_from: int | None = None) -> Lab:
    """A checkpoint in `folder`, its engines and its oracle."""
    make_checkpoint(
        folder,
        num_layers=NUM_LAYERS,
        vocab=VOCAB,
        dtype=torch.float64,
        transparent_from=transparent_from,
    )
    return Lab(load_engines(folder), NaiveDecoder(folder))


def load_engines(folder: Path, **more: object) -> dict[int, Engine]:
    """Engines of a checkpoint in float64, by the size of their blocks."""
    return {
        size: Engine.load(
            EngineSettings(
                **{"model": str(folder), "dtype": "float64", "device": "cpu", "num_threads": 1},
                **{"block_size": size, "num_blocks": 2048 // size, "max_model_len": MAX_LEN},
                **more,
            )
        )
        for size in (4, 16)
    }


def random_edits(rng: np.random.Generator) -> LogitEdits:
    def few(most: int) -> list[int]:
        return rng.integers(0, VOCAB, size=int(rng.integers(1, most))).tolist()

    def or_none(value, chance: float = 0.4):
        return value if rng.random() < chance else None

    return LogitEdits(
        allowed_token_ids=or_none(few(40), 0.2) or [],
        bad_words=or_none([few(4) for _ in range(int(rng.integers(1, 20)))]) or [],
        min_tokens=or_none(int(rng.integers(1, 12))) or 0,
        logit_bias=or_none({i: float(rng.normal(0, 4)) for i in few(10)}) or {},
        repetition_penalty=or_none(float(rng.uniform(0.8, 1.6))) or 1.0,
        frequency_penalty=or_none(float(rng.uniform(-1, 2))) or 0.0,
        presence_penalty=or_none(float(rng.uniform(-2, 2))) or 0.0,
    )


def random_request(rng: np.random.Generator, sequence_id: int, block_size: int) -> Generate:
    num_prompt = int(rng.integers(1, 300)) if rng.random() < 0.3 else int(rng.integers(1, 24))
    num_new = int(rng.integers(1, 28))
    if rng.random() < 0.3:  # The last commit falls on a block boundary.
        num_new += -(num_prompt + num_new) % block_size
    temperature = float(rng.choice([0.0, 0.7, 1.2]))
    sampling = SamplingParams(
        temperature=temperature,
        top_k=int(rng.choice([0, 0, 1, 5, 40])),
        top_p=float(rng.choice([1.0, 1.0, 0.9, 0.3])),
        min_p=float(rng.choice([0.0, 0.0, 0.05, 0.3])),
    )
    stops = rng.integers(0, VOCAB, size=2).tolist() if rng.random() < 0.4 else []
    request = Generate(
        sequence_id=sequence_id,
        prompt_ids=rng.integers(0, VOCAB, size=num_prompt).tolist(),
        max_new_tokens=num_new,
        sampling=sampling,
        seed=int(rng.integers(0, 2**63 - 1)),
        stop_token_ids=stops,
        exit_layer=int(rng.integers(1, NUM_LAYERS)) if rng.random() < 0.7 else None,
        draft_length=int(rng.integers(0, 9)) if rng.random() < 0.7 else None,
    )
    return with_extras(request, np.random.default_rng(request.seed))


def with_extras(request: Generate, rng: np.random.Generator) -> Generate:
    """The same with some drafter, half of the time with edits, and now and then with a prompt that repeats
    itself and with reports.
    """
    prompt_ids = request.prompt_ids
    if rng.random() < 0.4:
        prompt_ids = (prompt_ids[: int(rng.integers(2, 9))] * len(prompt_ids))[: len(prompt_ids)]
    edits = random_edits(rng) if rng.random() < 0.5 else None
    return replace_fields(
        request,
        prompt_ids=prompt_ids,
        drafter=Drafter(rng.choice(["early_exit", "early_exit", "lookup", "hybrid", "none"])),
        sampling=replace_fields(request.sampling, edits=edits),
        logprobs=int(rng.integers(0, 6)) if rng.random() < 0.4 else None,
        prompt_logprobs=int(rng.integers(0, 6)) if rng.random() < 0.2 else None,
        traces_drafts=bool(rng.random() < 0.4),
        priority=int(rng.choice([0, 0, -3, 4])),
    )


@dataclass
class Mix:
    """What a run of one random mix gave."""

    events: dict[int, list[Decoded]]
    left: set[int]

    def has_ended(self, sequence_id: int) -> bool:
        return any(event.finish_reason is not None for event in self.events[sequence_id])

    def tokens(self, sequence_id: int) -> list[int]:
        return [token_id for event in self.events[sequence_id] for token_id in event.token_ids]


def run_mix(engine: Engine, requests: list[Generate], rng: np.random.Generator) -> Mix:
    """Rows join at random steps, and some leave before their end."""
    mix = Mix({request.sequence_id: [] for request in requests}, set())
    coming = list(requests)
    submitted: set[int] = set()
    while coming or engine.has_work:
        while coming and rng.random() < 0.4:
            submitted.add(coming[0].sequence_id)
            engine.submit(coming.pop(0))
        if rng.random() < 0.03:
            leaver = int(rng.choice([request.sequence_id for request in requests]))
            is_under_way = leaver in submitted and not mix.has_ended(leaver)
            engine.abort([leaver])
            mix.left |= {leaver} if is_under_way else set()
        for event in engine.step().decoded:
            mix.events[event.sequence_id].append(event)
        engine.check_integrity()
    return mix


def check_mix(lab: Lab, seed: int) -> Counter[str]:
    """One random mix against the oracle, and what happened in it: drafts by drafter, preemptions and the like."""
    rng = np.random.default_rng(seed)
    block_size = int(rng.choice([4, 16]))
    smallest = MAX_LEN // block_size
    # Rows that outgrow the pool together, so that some must give way.
    is_crowded = rng.random() < 0.2
    engine = lab.fresh_engine(
        block_size=block_size,
        num_blocks=smallest if is_crowded or rng.random() < 0.5 else 2048 // block_size,
        max_num_seqs=8 if is_crowded else int(rng.integers(1, 9)),
        budget=int(rng.choice([9, 32, 512])),
        chooser=RestlessController(seed) if seed % 2 else RandomChooser(seed),
        promotes=seed % 3 == 0,
    )
    num_rows = 8 if is_crowded else int(rng.integers(2, 9))
    requests = [random_request(rng, i, block_size) for i in range(num_rows)]
    if is_crowded:
        requests = [replace_fields(r, prompt_ids=r.prompt_ids[:40], max_new_tokens=60) for r in requests]
    if rng.random() < 0.5:  # A follow-up that shares its prompt with another, for the prefix cache.
        first = requests[0]
        shared = replace_prompt(first, lab.oracle.decode(first), sequence_id=len(requests))
        requests.append(shared)
    mix = run_mix(engine, requests, rng)
    for request in requests:
        got = mix.tokens(request.sequence_id)
        expected, logprobs = lab.oracle.decode_with_logprobs(request, guess=got)
        check_reports(lab, request, mix.events[request.sequence_id], logprobs)
        if request.sequence_id in mix.left:
            assert got == expected[: len(got)], f"mix {seed}, row {request.sequence_id}"
            continue
        assert got == expected, f"mix {seed}, row {request.sequence_id}"
        ending = mix.events[request.sequence_id][-1].finish_reason
        stopped = expected[-1] in request.stop_token_ids
        assert ending is (FinishReason.STOP if stopped else FinishReason.LENGTH)
    load = engine.report().load
    assert load.num_used_blocks == 0
    happened = Counter(preemptions=load.num_preemptions_total, hits=load.prefix_cache_hit_tokens_total)
    for event in (event for events in mix.events.values() for event in events):
        happened += Counter({"drafted": event.drafted, "kept": event.kept, event.drafter: event.drafted})
    return happened


def check_reports(lab: Lab, request: Generate, events: list[Decoded], expected: list[np.ndarray]) -> None:
    """Log-probabilities within 1e-9 of the oracle's, and traces that tell which drafts stood."""
    given = [t for event in events for t in event.token_ids]
    if request.logprobs is None:
        assert all(event.logprobs is None for event in events)
    else:
        own = [logprob for event in events for logprob in event.logprobs or []]
        for token_id, logprob, logprobs_V in zip(given, own, expected[: len(given)], strict=True):
            check_logprob(logprob, token_id, logprobs_V, num_top=request.logprobs)
    if events and request.prompt_logprobs is not None:
        targets, found = request.prompt_ids[1:], events[0].prompt_logprobs
        assert found is not None
        oracle = lab.oracle.prompt_logprobs(request.prompt_ids)
        for token_id, logprob, logprobs_V in zip(targets, found, oracle, strict=True):
            check_logprob(logprob, token_id, logprobs_V, num_top=request.prompt_logprobs)
    assert all(event.prompt_logprobs is None for event in events[1:])
    for event in events:
        assert (event.drafted_ids is not None) == request.traces_drafts
        if event.drafted_ids is not None:
            assert len(event.drafted_ids) == event.drafted
            assert event.drafted_ids[: event.kept] == event.token_ids[: event.kept]
            refused = event.kept < min(event.drafted, len(event.token_ids))
            assert not refused or event.drafted_ids[event.kept] != event.token_ids[event.kept]


def check_logprob(found: TokenLogprob, token_id: int, logprobs_V: np.ndarray, *, num_top: int) -> None:
    assert found.logprob == pytest.approx(logprobs_V[token_id], abs=1e-9)
    assert found.rank == 1 + int((logprobs_V > logprobs_V[token_id] + 1e-12).sum())
    assert len(found.top_ids) == num_top
    assert found.top_logprobs == pytest.approx(sorted(logprobs_V, reverse=True)[:num_top], abs=1e-9)
    assert found.top_logprobs == pytest.approx(logprobs_V[found.top_ids].tolist(), abs=1e-9)


def replace_prompt(request: Generate, answer: list[int], *, sequence_id: int) -> Generate:
    return replace_fields(request, prompt_ids=[*request.prompt_ids, *answer], sequence_id=sequence_id)


def check_mixes(lab: Lab, seeds: range) -> Counter[str]:
    """Mixes in which everything that could make a difference happened."""
    happened = sum((check_mix(lab, seed) for seed in seeds), Counter[str]())
    assert 0 < happened["kept"] < happened["drafted"]
    assert min(happened[drafter] for drafter in (Drafter.EARLY_EXIT, Drafter.LOOKUP)) > 0
    assert min(happened["preemptions"], happened["hits"]) > 0
    return happened


def one_request(**changes: object) -> Generate:
    request = Generate(
        sequence_id=0,
        prompt_ids=[7, 3, 11, 5, 2],
        max_new_tokens=24,
        sampling=SamplingParams(temperature=0.0),
        seed=5,
        stop_token_ids=[],
        exit_layer=2,
        draft_length=3,
    )
    return replace_fields(request, **changes)
