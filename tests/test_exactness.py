"""Whatever is mixed with it and however it is drafted, a row's tokens are those of naive decoding alone."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from decoding.messages import Decoded, Drafter, FinishReason, LogitEdits, SamplingParams
from tests.choosers import RestlessController
from tests.mixes import NUM_LAYERS, VOCAB, Lab, check_mixes, make_lab, one_request
from tests.oracle import NaiveDecoder
from tests.tiny import make_checkpoint


def test_random_mixes_equal_naive_decoding(lab: Lab) -> None:
    check_mixes(lab, range(30))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sixty_random_mixes_equal_naive_decoding(lab: Lab) -> None:
    check_mixes(lab, range(1000, 1060))


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_three_hundred_random_mixes_equal_naive_decoding(lab: Lab) -> None:
    check_mixes(lab, range(1100, 1400))


@pytest.mark.parametrize("num_wrong_from", [0, 1, 7, 23, 24, 30])
def test_no_guess_changes_what_the_oracle_says(tmp_path: Path, num_wrong_from: int) -> None:
    """A guess that is right up to some token, and goes on beyond the last."""
    make_checkpoint(tmp_path, num_layers=NUM_LAYERS, vocab=VOCAB, dtype=torch.float64)
    edits = LogitEdits(frequency_penalty=0.7, min_tokens=3)
    request = one_request(sampling=SamplingParams(temperature=0.9, edits=edits))
    tokens, logprobs = NaiveDecoder(tmp_path).decode_with_logprobs(request)
    assert len(tokens) == 24
    beyond = [*tokens, 1, 2, 3, 4, 5, 6]
    guess = [
        *beyond[:num_wrong_from],
        *((token_id + 1) % VOCAB for token_id in beyond[num_wrong_from:]),
    ]
    guessed, at_once = NaiveDecoder(tmp_path).decode_with_logprobs(request, guess=guess)
    assert guessed == tokens
    np.testing.assert_allclose(at_once, logprobs, rtol=0, atol=1e-11)


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


@pytest.fixture(scope="module")
def transparent(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return make_lab(tmp_path_factory.mktemp("transparent"), transparent_from=2)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.2])
@pytest.mark.parametrize(
    "filters",
    [{}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.1}, {"edits": LogitEdits(frequency_penalty=3.0)}],
    ids=["plain", "top_k", "top_p", "min_p", "frequency_penalty"],
)
def test_drafts_of_a_model_whose_later_layers_add_nothing_are_all_kept(
    transparent: Lab, temperature: float, filters: dict[str, Any]
) -> None:
    """Draft and full model then have the same logits, so the same noise and processors must choose alike."""
    engine = transparent.fresh_engine(block_size=16, num_blocks=128, max_num_seqs=4, budget=512)
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


def test_sixty_four_rows_on_a_pool_for_a_few_all_end_with_the_tokens_of_their_seed(lab: Lab) -> None:
    """Every prompt and seed four times, drafted in four ways."""
    ways = [
        {"drafter": Drafter.EARLY_EXIT, "exit_layer": None, "draft_length": None},
        {"drafter": Drafter.LOOKUP, "exit_layer": 1, "draft_length": 5},
        {"drafter": Drafter.HYBRID, "exit_layer": 3, "draft_length": 4},
        {"drafter": Drafter.NONE, "exit_layer": 2, "draft_length": 0},
    ]
    plain = [
        one_request(prompt_ids=[7, 3, prompt] * 3, seed=seed, sampling=SamplingParams(temperature=heat))
        for prompt, (seed, heat) in product(range(4), [(1, 0.0), (1, 0.9), (2, 0.9), (3, 1.2)])
    ]
    requests = [
        replace(each, sequence_id=index, **way) for index, (way, each) in enumerate(product(ways, plain))
    ]
    # A row comes to 33 tokens, nine blocks; the pool has room for three that are whole.
    engine = lab.fresh_engine(
        block_size=4, num_blocks=28, max_num_seqs=64, budget=96, chooser=RestlessController(1)
    )
    for request in requests:
        engine.submit(request)
    events: dict[int, list[Decoded]] = {request.sequence_id: [] for request in requests}
    while engine.has_work:
        for event in engine.step().decoded:
            events[event.sequence_id].append(event)
        engine.check_integrity()
    expected = [lab.oracle.decode(request) for request in plain]
    for request in requests:
        own = events[request.sequence_id]
        assert [t for event in own for t in event.token_ids] == expected[request.sequence_id % len(plain)]
        assert [event.finish_reason for event in own if event.finish_reason] == [FinishReason.LENGTH]
    load = engine.report().load
    assert load.num_preemptions_total > 0
    assert (load.num_used_blocks, load.num_free_blocks) == (0, 28)
    assert {event.drafter for own in events.values() for event in own if event.kept} == {
        Drafter.EARLY_EXIT,
        Drafter.LOOKUP,
    }


def test_an_aborted_row_frees_its_blocks_at_once(lab: Lab) -> None:
    engine = lab.fresh_engine(block_size=4, num_blocks=512, max_num_seqs=4, budget=64)
    engine.submit(one_request())
    engine.step()
    assert engine.report().load.num_used_blocks > 0
    engine.abort([0, 99])
    assert engine.report().load.num_used_blocks == 0
    assert not engine.has_work
    engine.check_integrity()
