"""A sequence that another engine began goes on exactly as if nothing had happened."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from msgspec.structs import replace as replace_fields

from decoding.messages import Decoded, Drafter, FinishReason, Generate, LogitEdits, SamplingParams
from tests.mixes import Lab, RandomChooser, check_logprob, one_request, random_request


def tokens_of(events: list[Decoded]) -> list[int]:
    return [token_id for event in events for token_id in event.token_ids]


def went_on(lab: Lab, requests: list[Generate], *, seed: int = 0) -> dict[int, list[Decoded]]:
    engine = lab.fresh_engine(
        block_size=(4, 16)[seed % 2],
        num_blocks=1024,
        max_num_seqs=6,
        budget=(9, 64)[seed % 3 > 0],
        chooser=RandomChooser(seed),
    )
    events = engine.generate(requests)
    engine.check_integrity()
    assert engine.report().load.num_used_blocks == 0
    return events


@dataclass(frozen=True, slots=True)
class Whole:
    """A request's uninterrupted answer, by naive decoding, and the log-probabilities beside each token."""

    request: Generate
    answer: list[int]
    logprobs: list[np.ndarray]

    def resumed(self, num_before: int) -> Generate:
        return self.request.resumed(self.answer[:num_before])


def whole(lab: Lab, request: Generate) -> Whole:
    return Whole(request, *lab.oracle.decode_with_logprobs(request))


def check_rest(uncut: Whole, num_before: int, events: list[Decoded]) -> None:
    """The events of a request that was resumed behind so many tokens."""
    request, expected, logprobs = uncut.request, uncut.answer, uncut.logprobs
    assert tokens_of(events) == expected[num_before:]
    stopped = expected[-1] in request.stop_token_ids
    assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1].finish_reason is (FinishReason.STOP if stopped else FinishReason.LENGTH)
    has_begun_before = num_before > 0
    first = events[0]
    assert (first.queued_s is None) == has_begun_before
    assert (first.num_cached_tokens is None) == has_begun_before
    assert (first.prompt_logprobs is None) == (has_begun_before or request.prompt_logprobs is None)
    assert all(event.queued_s is None and event.prompt_logprobs is None for event in events[1:])
    if request.logprobs is not None:
        own = [logprob for event in events for logprob in event.logprobs or []]
        for token_id, logprob, logprobs_V in zip(
            expected[num_before:], own, logprobs[num_before:], strict=True
        ):
            check_logprob(logprob, token_id, logprobs_V, num_top=request.logprobs)


def test_random_mixes_cut_anywhere_go_on_as_naive_decoding_does(lab: Lab) -> None:
    num_drafted = num_kept = num_resumed = 0
    for seed in range(12):
        rng = np.random.default_rng([seed, 77])
        uncut = [whole(lab, random_request(rng, index, 4)) for index in range(6)]
        cuts = [int(rng.integers(0, len(each.answer))) for each in uncut]
        events = went_on(lab, [each.resumed(cut) for each, cut in zip(uncut, cuts, strict=True)], seed=seed)
        for index, (each, cut) in enumerate(zip(uncut, cuts, strict=True)):
            check_rest(each, cut, events[index])
        num_resumed += sum(cut > 0 for cut in cuts)
        num_drafted += sum(event.drafted for each in events.values() for event in each)
        num_kept += sum(event.kept for each in events.values() for event in each)
    assert num_resumed > 40
    assert 0 < num_kept < num_drafted


EDITS = LogitEdits(
    min_tokens=12,
    repetition_penalty=1.3,
    frequency_penalty=0.8,
    presence_penalty=0.5,
    bad_words=[[7, 3], [2]],
)


@pytest.mark.parametrize("drafter", [Drafter.EARLY_EXIT, Drafter.LOOKUP, Drafter.HYBRID])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_every_cut_of_an_answer_goes_on_alike(lab: Lab, drafter: Drafter, temperature: float) -> None:
    request = one_request(
        max_new_tokens=20,
        prompt_ids=[7, 3, 11, 7, 3, 11, 7, 3],
        stop_token_ids=list(range(30, 61)),
        sampling=SamplingParams(temperature=temperature, edits=EDITS),
        drafter=drafter,
        logprobs=3,
        prompt_logprobs=2,
        seed=11,
    )
    uncut = whole(lab, request)
    # Stop tokens were forbidden at first, and one of them ended it when they no longer were.
    assert 12 < len(uncut.answer) < 20
    cuts = range(len(uncut.answer))
    events = went_on(lab, [replace_fields(uncut.resumed(cut), sequence_id=cut) for cut in cuts])
    for cut in cuts:
        check_rest(uncut, cut, events[cut])


def test_what_came_before_is_output_and_not_prompt(lab: Lab) -> None:
    """The negative control: an answer that is taken for prompt goes on otherwise."""
    edits = LogitEdits(frequency_penalty=1.5, min_tokens=20)
    sampling = SamplingParams(temperature=0.9, edits=edits)
    request = one_request(sampling=sampling, stop_token_ids=list(range(40)))
    answer = lab.oracle.decode(request)
    resumed = request.resumed(answer[:9])
    mistaken = replace_fields(
        request, prompt_ids=[*request.prompt_ids, *answer[:9]], max_new_tokens=15, sequence_id=1
    )
    events = went_on(lab, [resumed, mistaken])
    assert tokens_of(events[0]) == answer[9:]
    assert tokens_of(events[1]) != answer[9:]


def test_a_resumed_sequence_that_is_preempted_still_goes_on_alike(lab: Lab) -> None:
    requests = [
        one_request(
            sequence_id=index,
            seed=index,
            max_new_tokens=60,
            sampling=SamplingParams(temperature=0.8, edits=EDITS),
            prompt_logprobs=1 if index % 2 else None,
        )
        for index in range(8)
    ]
    uncut = [whole(lab, request) for request in requests]
    engine = lab.fresh_engine(block_size=4, num_blocks=96, max_num_seqs=8, budget=64)
    events = engine.generate(each.resumed(20 + index) for index, each in enumerate(uncut))
    assert engine.report().load.num_preemptions_total > 0
    for index, each in enumerate(uncut):
        check_rest(each, 20 + index, events[index])
