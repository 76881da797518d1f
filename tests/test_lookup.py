"""What is looked up, and that it never changes the text."""

from __future__ import annotations

import numpy as np
import pytest
from msgspec.structs import replace as replace_fields

from decoding.lookup import NgramSearch
from decoding.messages import Drafter, SamplingParams
from tests.mixes import VOCAB, Lab, one_request


def brute_force(token_ids: list[int], count: int) -> tuple[int, ...]:
    """The latest earlier place of the longest ending of five to two ids, read on for `count` ids."""
    for size in range(min(5, len(token_ids)), 1, -1):
        for end in range(len(token_ids) - 1, size - 1, -1):
            if token_ids[end - size : end] == token_ids[-size:]:
                known = list(token_ids)
                for offset in range(count):
                    known.append(known[end + offset])
                return tuple(known[len(token_ids) :])
    return ()


def test_it_finds_what_a_plain_search_finds_as_the_sequence_grows() -> None:
    rng = np.random.default_rng(3)
    num_found = 0
    for _ in range(60):
        search, token_ids = NgramSearch(), rng.integers(0, 4, size=int(rng.integers(1, 12))).tolist()
        for _ in range(12):
            expected = brute_force(token_ids, 6)
            assert search.propose(token_ids, 6) == expected
            num_found += bool(expected)
            token_ids += rng.integers(0, 4, size=int(rng.integers(0, 5))).tolist()
    assert 100 < num_found < 700


@pytest.mark.parametrize("num_between", [0, 1, 50, 1015, 1019, 1020, 1024, 3000])
def test_a_long_run_far_back_goes_before_a_short_one_nearby(num_between: int) -> None:
    between = list(range(100, 100 + num_between))
    token_ids = [9, 1, 2, 3, 4, 5, 77, *between, 4, 5, 88, 1, 2, 3, 4, 5]
    search = NgramSearch()
    assert search.propose(token_ids, 3) == brute_force(token_ids, 3) == (77, *between, 4, 5)[:3]
    token_ids += [60, 61, 4, 5]
    assert search.propose(token_ids, 2) == brute_force(token_ids, 2) == (60, 61)


def test_long_texts_are_searched_to_their_beginning() -> None:
    rng = np.random.default_rng(5)
    for alphabet in (9, 40, 400):
        search, token_ids = NgramSearch(), rng.integers(0, alphabet, size=2500).tolist()
        for _ in range(20):
            assert search.propose(token_ids, 4) == brute_force(token_ids, 4)
            token_ids += rng.integers(0, alphabet, size=int(rng.integers(1, 4))).tolist()


def test_a_repetition_is_carried_on_beyond_its_end() -> None:
    assert NgramSearch().propose([1, 2, 3, 1, 2, 3, 1, 2], 7) == (3, 1, 2, 3, 1, 2, 3)


def test_nothing_is_proposed_for_what_never_stood_before() -> None:
    assert NgramSearch().propose([5], 3) == ()
    assert NgramSearch().propose([5, 6, 7, 8, 7], 3) == ()


@pytest.mark.parametrize("drafter", [Drafter.LOOKUP, Drafter.HYBRID])
@pytest.mark.parametrize("temperature", [0.0, 0.3])
def test_looked_up_drafts_are_kept_and_refused_and_the_text_is_the_oracle_s(
    lab: Lab, drafter: Drafter, temperature: float
) -> None:
    rows = [
        one_request(
            sequence_id=i,
            prompt_ids=([3 + i, 9, 14, 2 + i, 30] * 6)[: 20 + i],
            max_new_tokens=48,
            sampling=SamplingParams(temperature=temperature),
            drafter=[drafter, Drafter.EARLY_EXIT, drafter, Drafter.NONE][i % 4],
            draft_length=[5, 3, 8, 4][i % 4],
            logprobs=0 if i % 3 else None,
            traces_drafts=True,
        )
        for i in range(8)
    ]
    events = lab.fresh_engine(block_size=4, num_blocks=512, max_num_seqs=8, budget=64).generate(rows)
    made_by = {kind: [0, 0] for kind in Drafter}
    for row in rows:
        own = events[row.sequence_id]
        assert [t for event in own for t in event.token_ids] == lab.oracle.decode(row)
        for event in own:
            made_by[event.drafter][0] += event.drafted
            made_by[event.drafter][1] += event.kept
            assert event.drafted_ids is not None
            assert event.drafted_ids[: event.kept] == event.token_ids[: event.kept]
    looked_up, kept = made_by[Drafter.LOOKUP]
    assert 0 < kept < looked_up
    assert made_by[Drafter.EARLY_EXIT][0] > 0
    assert made_by[Drafter.NONE] == [0, 0]


def test_drafts_never_outgrow_what_the_sequence_may_still_get(lab: Lab) -> None:
    row = one_request(prompt_ids=[4, 8] * 10, max_new_tokens=5, drafter=Drafter.LOOKUP, draft_length=8)
    engine = lab.fresh_engine(block_size=4, num_blocks=512, max_num_seqs=8, budget=64)
    events = engine.generate([replace_fields(row, prompt_ids=[v % VOCAB for v in row.prompt_ids])])[0]
    assert len([t for event in events for t in event.token_ids]) == 5
    assert max(event.drafted for event in events) <= 4
