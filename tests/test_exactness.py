"""Whatever is mixed with it and however it is drafted, a row's tokens are those of naive decoding alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from msgspec.structs import replace as replace_fields

from config.settings import EngineSettings
from decoding.blocks import BlockPool
from decoding.engine import Engine
from decoding.messages import Decoded, FinishReason, Generate, SamplingParams
from decoding.scheduler import Scheduler, StepLimits
from tests.oracle import NaiveDecoder
from tests.tiny import make_checkpoint

NUM_LAYERS, VOCAB, MAX_LEN = 5, 61, 384


@dataclass
class Lab:
    """A tiny model in float64 with one runtime for each block size, and its oracle."""

    engines: dict[int, Engine]
    oracle: NaiveDecoder

    def fresh_engine(self, *, block_size: int, num_blocks: int, max_num_seqs: int, budget: int) -> Engine:
        """A new scheduler over an old cache: whatever earlier runs left in it must not matter."""
        loaded = self.engines[block_size]
        scheduler = Scheduler(
            BlockPool(num_blocks=num_blocks, block_size=block_size),
            StepLimits(max_num_seqs, budget),
            device=torch.device("cpu"),
            clock=lambda: 0.0,
        )
        return Engine(loaded.ready, loaded.runtime, scheduler, clock=lambda: 0.0)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    folder = make_checkpoint(
        tmp_path_factory.mktemp("lab"), num_layers=NUM_LAYERS, vocab=VOCAB, dtype=torch.float64
    )
    engines = {
        size: Engine.load(
            EngineSettings(
                model=str(folder),
                dtype="float64",
                device="cpu",
                num_threads=1,
                block_size=size,
                num_blocks=2048 // size,
                max_model_len=MAX_LEN,
            )
        )
        for size in (4, 16)
    }
    return Lab(engines, NaiveDecoder(folder))


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
    return Generate(
        sequence_id=sequence_id,
        prompt_ids=rng.integers(0, VOCAB, size=num_prompt).tolist(),
        max_new_tokens=num_new,
        sampling=sampling,
        seed=int(rng.integers(0, 2**63 - 1)),
        stop_token_ids=stops,
        exit_layer=int(rng.integers(1, NUM_LAYERS)),
        draft_length=int(rng.integers(0, 9)),
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


def check_mix(lab: Lab, seed: int) -> tuple[int, int, int]:
    """One random mix against the oracle: drafted and kept tokens, and preemptions."""
    rng = np.random.default_rng(seed)
    block_size = int(rng.choice([4, 16]))
    smallest = MAX_LEN // block_size
    engine = lab.fresh_engine(
        block_size=block_size,
        num_blocks=smallest if rng.random() < 0.5 else 2048 // block_size,
        max_num_seqs=int(rng.integers(1, 9)),
        budget=int(rng.choice([9, 32, 512])),
    )
    requests = [random_request(rng, i, block_size) for i in range(int(rng.integers(2, 9)))]
    if rng.random() < 0.5:  # A follow-up that shares its prompt with another, for the prefix cache.
        first = requests[0]
        shared = replace_prompt(first, lab.oracle.decode(first), sequence_id=len(requests))
        requests.append(shared)
    mix = run_mix(engine, requests, rng)
    for request in requests:
        expected = lab.oracle.decode(request)
        got = mix.tokens(request.sequence_id)
        if request.sequence_id in mix.left:
            assert got == expected[: len(got)], f"mix {seed}, row {request.sequence_id}"
            continue
        assert got == expected, f"mix {seed}, row {request.sequence_id}"
        ending = mix.events[request.sequence_id][-1].finish_reason
        stopped = expected[-1] in request.stop_token_ids
        assert ending is (FinishReason.STOP if stopped else FinishReason.LENGTH)
    assert engine.report().load.num_used_blocks == 0
    everything = [event for events in mix.events.values() for event in events]
    return (
        sum(event.drafted for event in everything),
        sum(event.kept for event in everything),
        engine.report().load.num_preemptions_total,
    )


def replace_prompt(request: Generate, answer: list[int], *, sequence_id: int) -> Generate:
    return replace_fields(request, prompt_ids=[*request.prompt_ids, *answer], sequence_id=sequence_id)


def check_mixes(lab: Lab, seeds: range) -> None:
    totals = np.array([check_mix(lab, seed) for seed in seeds]).sum(0)
    drafted, kept, preemptions = totals.tolist()
    assert 0 < kept < drafted
    assert preemptions > 0


def test_random_mixes_equal_naive_decoding(lab: Lab) -> None:
    check_mixes(lab, range(30))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_three_hundred_random_mixes_equal_naive_decoding(lab: Lab) -> None:
    check_mixes(lab, range(1000, 1300))


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


@pytest.mark.parametrize("exit_layer", range(1, NUM_LAYERS))
@pytest.mark.parametrize("draft_length", [0, 1, 2, 5, 8])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.2])
def test_every_exit_layer_and_draft_length_gives_the_same_tokens(
    lab: Lab, exit_layer: int, draft_length: int, temperature: float
) -> None:
    request = one_request(
        exit_layer=exit_layer, draft_length=draft_length, sampling=SamplingParams(temperature=temperature)
    )
    engine = lab.fresh_engine(block_size=4, num_blocks=512, max_num_seqs=4, budget=64)
    events = engine.generate([request])[0]
    assert [t for event in events for t in event.token_ids] == lab.oracle.decode(request)
    assert (sum(event.drafted for event in events) > 0) == (draft_length > 0)


def test_a_prompt_that_continues_a_finished_row_reads_only_what_was_computed(lab: Lab) -> None:
    """The last committed token of a finished row fills its block but was never computed."""
    engine = lab.fresh_engine(block_size=4, num_blocks=512, max_num_seqs=4, budget=64)
    first = one_request(max_new_tokens=11)
    answer = [t for event in engine.generate([first])[0] for t in event.token_ids]
    assert (len(first.prompt_ids) + len(answer)) % 4 == 0
    second = one_request(prompt_ids=[*first.prompt_ids, *answer, 9], sequence_id=1)
    events = engine.generate([second])[1]
    assert events[0].num_cached_tokens == 12
    assert [t for event in events for t in event.token_ids] == lab.oracle.decode(second)


def test_a_cached_prompt_still_computes_its_last_token(lab: Lab) -> None:
    engine = lab.fresh_engine(block_size=4, num_blocks=512, max_num_seqs=4, budget=64)
    request = one_request(prompt_ids=list(range(8)))
    engine.generate([request])
    events = engine.generate([request])[0]
    assert events[0].num_cached_tokens == 4
    assert [t for event in events for t in event.token_ids] == lab.oracle.decode(request)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.2])
@pytest.mark.parametrize("filters", [{}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.1}])
def test_drafts_of_a_model_whose_later_layers_add_nothing_are_all_kept(
    tmp_path_factory: pytest.TempPathFactory, temperature: float, filters: dict[str, float]
) -> None:
    """Draft and full model then have the same logits, so the same noise and processors must choose alike."""
    folder = make_checkpoint(
        tmp_path_factory.mktemp("transparent"),
        num_layers=4,
        vocab=VOCAB,
        dtype=torch.float64,
        transparent_from=2,
    )
    engine = Engine.load(
        EngineSettings(model=str(folder), dtype="float64", device="cpu", num_threads=1, max_model_len=64)
    )
    sampling = SamplingParams(temperature=temperature, **filters)
    other = SamplingParams(temperature=1.0, top_k=2)
    rows = [
        one_request(sequence_id=0, exit_layer=2, draft_length=3, sampling=sampling),
        one_request(sequence_id=1, exit_layer=3, draft_length=5, sampling=sampling, seed=6),
        one_request(sequence_id=2, exit_layer=2, draft_length=1, sampling=other, seed=7),
    ]
    for events in engine.generate(rows).values():
        assert sum(event.drafted for event in events) > 0
        assert all(event.kept == event.drafted for event in events)


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(lab: Lab) -> None:
    engine = lab.fresh_engine(block_size=16, num_blocks=128, max_num_seqs=8, budget=64)
    hot = SamplingParams(temperature=1.2)
    requests = [
        one_request(sequence_id=i, seed=s, sampling=hot, draft_length=i) for i, s in enumerate([5, 5, 6])
    ]
    events = engine.generate(requests)
    first, again, other = ([t for e in events[i] for t in e.token_ids] for i in range(3))
    assert first == again != other


def test_a_sequence_id_used_again_brings_its_own_sampling(lab: Lab) -> None:
    engine = lab.fresh_engine(block_size=16, num_blocks=128, max_num_seqs=8, budget=64)
    for temperature, seed in [(0.0, 1), (1.2, 1), (1.2, 2)]:
        request = one_request(seed=seed, sampling=SamplingParams(temperature=temperature))
        events = engine.generate([request])[0]
        assert [t for event in events for t in event.token_ids] == lab.oracle.decode(request)


def test_layer_calls_of_a_cycle_do_not_grow_with_its_rows(lab: Lab) -> None:
    def calls(num_rows: int) -> int:
        engine = lab.fresh_engine(block_size=16, num_blocks=128, max_num_seqs=16, budget=512)
        for row in range(num_rows):
            engine.submit(one_request(sequence_id=row, max_new_tokens=6))
        engine.step()
        before = engine.runtime.model.num_layer_calls
        engine.step()
        return engine.runtime.model.num_layer_calls - before

    # Three drafts at exit layer 2, its last draft's two early layers, and three later layers.
    assert calls(1) == calls(16) == 3 * 2 + NUM_LAYERS


def test_an_aborted_row_frees_its_blocks_at_once(lab: Lab) -> None:
    engine = lab.fresh_engine(block_size=4, num_blocks=512, max_num_seqs=4, budget=64)
    engine.submit(one_request())
    engine.step()
    assert engine.report().load.num_used_blocks > 0
    engine.abort([0, 99])
    assert engine.report().load.num_used_blocks == 0
    assert not engine.has_work
    engine.check_integrity()
