"""Edits of logits and reports of probabilities are the same with and without speculation."""

from __future__ import annotations

import pytest
from msgspec.structs import replace as replace_fields

from decoding.messages import FinishReason, LogitEdits, SamplingParams
from tests.mixes import Lab, one_request


@pytest.mark.parametrize(
    "edits",
    [
        LogitEdits(allowed_token_ids=[3, 9, 11, 20]),
        LogitEdits(bad_words=[[token_id] for token_id in range(50)]),
        LogitEdits(bad_words=[[a, b] for a in range(61) for b in (51, 45, 30)]),
        LogitEdits(min_tokens=9),
        LogitEdits(logit_bias={4: 5.0, 7: -100.0}),
        LogitEdits(repetition_penalty=1.8),
        LogitEdits(frequency_penalty=5.0),
        LogitEdits(presence_penalty=9.0),
    ],
    ids=lambda edits: next(
        name for name in edits.__struct_fields__ if getattr(edits, name) != getattr(LogitEdits(), name)
    ),
)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_each_edit_acts_alike_whatever_is_drafted(lab: Lab, edits: LogitEdits, temperature: float) -> None:
    """At every draft length the oracle's text, beside rows without edits; and it is not the text without edits."""
    endless = one_request(sampling=SamplingParams(temperature=temperature))
    plain = replace_fields(endless, stop_token_ids=lab.oracle.decode(endless)[5:6])
    request = replace_fields(plain, sampling=SamplingParams(temperature=temperature, edits=edits))
    engine = lab.fresh_engine(block_size=4, num_blocks=512, max_num_seqs=8, budget=64)
    expected = lab.oracle.decode(request)
    assert expected != lab.oracle.decode(plain)
    rows = [
        replace_fields(
            request if length % 2 else plain,
            sequence_id=length,
            draft_length=length // 2,
            exit_layer=1 + length % 4,
        )
        for length in range(10)
    ]
    events = engine.generate(rows)
    for row in rows:
        wanted = expected if row.sampling.edits else lab.oracle.decode(plain)
        assert [t for event in events[row.sequence_id] for t in event.token_ids] == wanted


def test_rules_that_forbid_everything_still_let_some_token_stand(lab: Lab) -> None:
    everything = LogitEdits(allowed_token_ids=[6], bad_words=[[6]], min_tokens=4)
    request = one_request(sampling=SamplingParams(temperature=1.0, edits=everything), stop_token_ids=[6])
    engine = lab.fresh_engine(block_size=4, num_blocks=512, max_num_seqs=8, budget=64)
    assert [t for event in engine.generate([request])[0] for t in event.token_ids] == [6]


def test_a_request_for_no_tokens_computes_the_prompt_and_ends(lab: Lab) -> None:
    engine = lab.fresh_engine(block_size=4, num_blocks=512, max_num_seqs=8, budget=9)
    prompt = list(range(40))
    rows = [
        one_request(prompt_ids=prompt, max_new_tokens=0, prompt_logprobs=2),
        one_request(sequence_id=1, max_new_tokens=12),
    ]
    events = engine.generate(rows)
    (only,) = events[0]
    assert only.token_ids == []
    assert only.finish_reason is FinishReason.LENGTH
    assert only.prompt_logprobs is not None
    assert len(only.prompt_logprobs) == 39
    assert len([t for event in events[1] for t in event.token_ids]) == 12
    engine.check_integrity()


def test_prompts_to_be_scored_are_computed_though_they_are_cached(lab: Lab) -> None:
    engine = lab.fresh_engine(block_size=4, num_blocks=512, max_num_seqs=8, budget=64)
    prompt = list(range(30))
    engine.generate([one_request(prompt_ids=prompt)])
    (first, *_) = engine.generate([one_request(prompt_ids=prompt, prompt_logprobs=0)])[0]
    assert first.num_cached_tokens == 0
    assert first.prompt_logprobs is not None
    assert len(first.prompt_logprobs) == 29
